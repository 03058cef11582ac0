"""A dataset tool of your own: how colourful the middle frame of each clip is, as a column that data_tools.filter reads.

python examples/colourfulness.py INPUT --out DIR
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.manifest import MANIFEST, Absolute, path_from, reject, write_outcome
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.tables import open_table, with_types
from opensora_repro.data.video import DecodeError, read_pictures_at
from opensora_repro.errors import run_command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help=INPUT_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args.input, args.out))


def run(given: str, out: Path) -> int:
    manifest = manifest_of(given, out, Runner())  # a folder of videos is probed first
    rows, rejects, absolute = [], [], Absolute(manifest.parent)
    for batch in open_table(manifest).batches():
        for row in absolute(batch).to_pylist():
            try:
                (picture,) = read_pictures_at(row["path"], [row["num_frames"] // 2])
            except DecodeError as error:
                rejects.append(reject(row["id"], row["path"], "colourfulness", str(error)))
            else:
                rows.append(row | {"path": path_from(out, Path(row["path"])), "colourfulness": colourfulness(picture)})
    write_outcome(out, rows, rejects, with_types(rows, MANIFEST))  # the user's own columns are kept
    print(f"{len(rows)} rows, {len(rejects)} rejected: {out / 'manifest.parquet'}")
    return 0


def colourfulness(picture: np.ndarray) -> float:
    """Of uint8 [H, W, 3], after Hasler and Suesstrunk (2003): 0 is grey, 60 and more very colourful."""
    red, green, blue = picture.astype(np.float64).transpose(2, 0, 1)
    one, other = red - green, (red + green) / 2 - blue
    return float(np.hypot(one.std(), other.std()) + 0.3 * np.hypot(one.mean(), other.mean()))


if __name__ == "__main__":
    sys.exit(main())
