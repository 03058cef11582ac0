"""What pyproject.toml cannot say: configs/ and checkpoints/ lie beside the library, and within it once installed."""

from setuptools import find_packages, setup

# opensora_repro.files.shipped finds these in either place.
BROUGHT_ALONG = {
    "configs": ["**/*.toml", "slurm.sbatch", "cluster/*"],
    "checkpoints": ["catalog.toml", "demo/**/*"],
}

setup(
    packages=[
        *find_packages(include=["opensora_repro*", "stages*", "data_tools*"]),
        *(f"opensora_repro.{folder}" for folder in BROUGHT_ALONG),
    ],
    package_dir={f"opensora_repro.{folder}": folder for folder in BROUGHT_ALONG},
    package_data={
        "opensora_repro": ["py.typed", "**/templates/*", "data/sides.txt"],
        "stages": ["py.typed"],
        "data_tools": ["py.typed"],
        **{f"opensora_repro.{folder}": patterns for folder, patterns in BROUGHT_ALONG.items()},
    },
)
