"""Which format an INPUT of `convert` has, by what is in it and not by its name."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from opensora_repro.data.convert.class_folders import SPLITS, WORDNET_ID, class_folders
from opensora_repro.data.convert.tables import OPENSORA_WIDTHS, PANDA_COLUMNS, first_record, json_elements
from opensora_repro.data.convert.tar_reader import TAR_SUFFIXES
from opensora_repro.data.inputs import VIDEO_SUFFIXES
from opensora_repro.data.tables import table_kind
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

FORMATS = {
    "manifest": "our manifest, or another CSV or Parquet table with a column path",
    "opensora": "Open-Sora's CSV without a header: path, caption, num_frames",
    "ucf101": "folders of videos, one a class",
    "imagenet": "folders of pictures, one a class",
    "webdataset": "tar archives",
    "hdvg": "HD-VG-130M's JSON files",
    "panda70m": "Panda-70M's CSV",
}


def recognise(given: str, out: Path) -> str:
    """Return the format's name. Raises DataError, with what was found and what to pass, where it is in doubt."""
    path = Path(given)
    if path.is_dir():
        return _of_folder(path, out)
    lower = given.lower()
    if lower.endswith(TAR_SUFFIXES) and (path.is_file() or glob.has_magic(given)):
        return "webdataset"
    if lower.endswith((".json", ".jsonl")) and path.is_file():
        return _of_json(path)
    if not os.path.lexists(path):
        raise DataError(f"{one_line(given)}: no such file or folder")
    if not lower.endswith((".csv", ".parquet")):
        raise _doubt(given, f"a file that ends in {path.suffix or 'nothing'}")
    return _of_columns(path)


def _of_columns(path: Path) -> str:
    if table_kind(path) == "parquet":
        from opensora_repro.data.tables import open_table

        names, width = open_table(path).schema.names, 0
    else:
        names = first_record(path)
        width = len(names)
    if set(PANDA_COLUMNS) <= set(names):
        return "panda70m"
    if "path" in names:
        return "manifest"
    if "url" in names:
        raise DataError(f"{path}: rows with a url but no path: pass it to data_tools.download")
    if width in OPENSORA_WIDTHS and _is_media(names[0]):
        return "opensora"
    raise _doubt(path, f"the columns {', '.join(names) or 'none'}")


def _of_json(path: Path) -> str:
    first = next(json_elements(path), None)
    if isinstance(first, dict) and "clip" in first and "url" in first:
        return "hdvg"
    raise _doubt(path, "JSON whose entries have no url and clip")


def _of_folder(root: Path, out: Path) -> str:
    names = sorted(os.listdir(root))
    if any(name.lower().endswith(TAR_SUFFIXES) for name in names):
        return "webdataset"
    if jsons := [name for name in names if name.lower().endswith((".json", ".jsonl"))]:
        return _of_json(root / jsons[0])
    folders = class_folders(root, out)
    files = [name for _, folder in folders[:3] for name in sorted(os.listdir(folder))[:100]]
    if any(name.lower().endswith(TAR_SUFFIXES) for name in files):
        return "webdataset"
    pictures = [name for name in files if _is_media(name) and Path(name).suffix.lower() not in VIDEO_SUFFIXES]
    if any(name.startswith("v_") and Path(name).suffix.lower() == ".avi" for name in files):
        return "ucf101"
    if pictures and all(WORDNET_ID.fullmatch(folder.name) or split in SPLITS for split, folder in folders):
        return "imagenet"
    what = "pictures" if pictures else "videos" if any(map(_is_media, files)) else "no videos or pictures"
    raise _doubt(root, f"{len(folders)} folders with {what} in them, {len(names)} names in all")


def _is_media(name: str) -> bool:
    from opensora_repro.data.video import IMAGE_SUFFIXES

    return Path(name).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES


def _doubt(given: str | Path, found: str) -> DataError:
    known = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
    return DataError(f"{one_line(given)}: has {one_line(found)}: which format? Pass --from, one of {known}")
