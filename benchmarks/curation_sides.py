"""Others' ways from footage to clips, for `benchmarks.curation`; a package that is not there raises ImportError.

    python -m benchmarks.curation_sides SIDE FOLDER OUT

Each takes a folder of videos, and tells as JSON how many clips it made, or scored. Where an ffmpeg binary is needed it
is the one on the path, or that of the package imageio-ffmpeg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def decode(folder: Path, out: Path) -> int:
    """Nothing but every frame of every video: the limit. In one thread, as a worker has."""
    import av

    from opensora_repro.data.video import open_video

    for path in videos_in(folder):
        with open_video(path) as (container, stream):
            stream.thread_type = av.codec.context.ThreadType.NONE
            for _ in container.decode(stream):
                pass
    return 0


def scenedetect_ffmpeg(folder: Path, out: Path) -> int:
    """PySceneDetect's ContentDetector and split_video_ffmpeg, at their defaults: an ffmpeg a scene."""
    import scenedetect

    put_ffmpeg_on_the_path(out)
    for path in videos_in(folder):
        scenes = scenedetect.detect(str(path), scenedetect.ContentDetector(), start_in_scene=True)
        if scenedetect.split_video_ffmpeg(str(path), scenes, out):
            raise RuntimeError(f"{path}: ffmpeg failed")
    return len(list(out.glob("*.mp4")))


def scenedetect_pyav(folder: Path, out: Path) -> int:
    """The same without an ffmpeg binary: seek, decode and encode each scene through PyAV."""
    from benchmarks.split import cut_theirs

    for path in videos_in(folder):
        (out / path.stem).mkdir()
        cut_theirs(path, out / path.stem, 22)
    return len(list(out.glob("*/*.mp4")))


def video2dataset(folder: Path, out: Path) -> int:
    """Its CutDetectionSubsampler, then its ClippingSubsampler with exact cuts, as it is configured for scenes.

    Of the package these two modules alone: all of it needs a torch of 2023.
    """
    put_ffmpeg_on_the_path(out)
    for name in ("video2dataset", "video2dataset.subsamplers"):
        sys.modules[name] = bare_package(name)
    detection = import_module("video2dataset.subsamplers.cut_detection_subsampler")
    clipping = import_module("video2dataset.subsamplers.clipping_subsampler")
    count = 0
    for path in videos_in(folder):
        kind = path.suffix.removeprefix(".")
        streams, cuts, error = detection.CutDetectionSubsampler()({"video": [path.read_bytes()]})
        if error:
            raise RuntimeError(f"{path}: {error}")
        spans = [[frame / cuts["original_fps"] for frame in span] for span in cuts["cuts_original_fps"]]
        cut = clipping.ClippingSubsampler(5, {"video": kind}, precision="exact")
        clips, _, error = cut(streams, {"clips": spans, "key": path.stem})
        if error:
            raise RuntimeError(f"{path}: {error}")
        for number, clip in enumerate(clips["video"]):
            (out / f"{path.stem}-{number}.{kind}").write_bytes(clip)
        count += len(clips["video"])
    return count


def data_juicer_split(folder: Path, out: Path) -> int:
    """Its video_split_by_scene_mapper at its defaults."""
    put_ffmpeg_on_the_path(out)
    module = import_module("data_juicer.ops.mapper.video_split_by_scene_mapper")
    split = module.VideoSplitBySceneMapper(save_dir=str(out))
    split.process_single({"videos": [str(path) for path in videos_in(folder)], "text": ""})
    return len(videos_in(out))


def data_juicer_motion(folder: Path, out: Path) -> int:
    """Its video_motion_score_filter at its defaults (two frames a second, whole size), on the clips of a folder."""
    module = import_module("data_juicer.ops.filter.video_motion_score_filter")
    motion = module.VideoMotionScoreFilter()
    motion.setup_model()
    clips = videos_in(folder)
    for clip in clips:
        motion.compute_stats_single({"videos": [str(clip)], "text": "", "__dj__stats__": {}})
    return len(clips)


SIDES = {
    "decode": decode,
    "PySceneDetect + ffmpeg": scenedetect_ffmpeg,
    "PySceneDetect + PyAV": scenedetect_pyav,
    "video2dataset": video2dataset,
    "data-juicer split": data_juicer_split,
    "data-juicer motion": data_juicer_motion,
}


def videos_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".webm"))


def bare_package(name: str) -> ModuleType:
    """Return a package without what its __init__ imports, so that one of its modules can be had alone."""
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    module = ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations or ())
    return module


def put_ffmpeg_on_the_path(out: Path) -> None:
    if shutil.which("ffmpeg") is None:
        binary: Any = import_module("imageio_ffmpeg")
        folder = out / "bin"
        folder.mkdir()
        (folder / "ffmpeg").symlink_to(binary.get_ffmpeg_exe())
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        told: dict[str, Any] = {"count": SIDES[args.side](args.folder, args.out)}
    except ImportError as error:
        told = {"missing": str(error)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
