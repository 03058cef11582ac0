"""Pictures, each with its caption in a .txt file beside it, become a manifest for stage 1: videos of one frame.

python examples/picture_manifest.py PICTURES data/images/manifest.parquet
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from opensora_repro.data.manifest import MANIFEST, path_from
from opensora_repro.data.tables import write_rows
from opensora_repro.data.video import is_image, probe
from opensora_repro.errors import DataError, run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder, searched with its subfolders")
    parser.add_argument("manifest", type=Path, help="Parquet file to write")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args.pictures, args.manifest))


def run(folder: Path, manifest: Path) -> int:
    rows = []
    for path in sorted(filter(is_image, folder.rglob("*"))):
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        place = path_from(manifest.parent, path)
        # `probe` tells num_frames (1), fps (0), height and width; DecodeError names a picture that cannot be read.
        rows.append(
            {"id": path.relative_to(folder).as_posix(), "path": place, "caption": caption, **asdict(probe(path))}
        )
    if not rows:
        raise DataError(f"{folder}: no pictures in this folder")
    write_rows(manifest, rows, MANIFEST)
    print(f"{len(rows)} pictures: {manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
