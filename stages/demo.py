"""The whole recipe in small: film, split, caption, train three stages, sample, measure, report (`make demo`)."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import load_config
from opensora_repro.errors import run_command
from opensora_repro.files import user_path, write_text

if TYPE_CHECKING:
    from opensora_repro.demo.given import Job
    from opensora_repro.demo.shapes import Motion

RECIPE = "configs/demo.recipe.toml"
STAGES = ("stage1", "stage2", "stage3")
STILLS_A_CLIP = 4
SAMPLE_SEED = 0
GROUPS = ("seen", "never trained")


@dataclass(frozen=True)
class Plan:
    """Where the demo works and how much it makes; the defaults are `make demo`."""

    root: Path
    configs: Path
    videos: int  # long videos of each format for training; one more of each is filmed for validation
    hq_videos: int  # how many of them make the high-quality set of stage 3
    prompts: int  # prompts sampled in each group, seen and never trained, in each format
    given: int  # videos made of given frames, of each task
    seventh: str | None  # a colour that an adapter teaches to the finished model
    overrides: tuple[str, ...]  # handed to every stage


def parse(argv: list[str] | None) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m stages.demo", description=__doc__)
    parser.add_argument("--dir", type=user_path, default=Path("runs/demo"), help="where everything goes (%(default)s)")
    parser.add_argument("--configs", type=user_path, default=Path("configs/demo"), help="folder of stage1..3.toml")
    parser.add_argument("--videos", type=int, default=3, help="long training videos of each format (%(default)s)")
    parser.add_argument("--hq-videos", type=int, default=2, help="of these, how many stage 3 uses (%(default)s)")
    parser.add_argument("--prompts", type=int, default=24, help="of each group and format, to sample (%(default)s)")
    parser.add_argument("--given", type=int, default=4, help="samples of each task with given frames (%(default)s)")
    told = "then teach the model a colour by an adapter: orange, white, pink, lime, azure or violet"
    parser.add_argument("--seventh", metavar="NAME", help=told)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="config changes for all three stages")
    args = parser.parse_args(argv)
    if min(args.videos, args.hq_videos, args.prompts, args.given) < 1 or args.hq_videos > args.videos:
        parser.error("--videos, --hq-videos, --prompts and --given must be at least 1, --hq-videos at most --videos")
    if args.seventh is not None:
        from opensora_repro.demo.shapes import OTHER_COLOURS

        if args.seventh not in OTHER_COLOURS:
            parser.error(f"--seventh {args.seventh}: expected one of {', '.join(OTHER_COLOURS)}")
    counts = (args.videos, args.hq_videos, args.prompts, args.given)
    return Plan(args.dir, args.configs, *counts, args.seventh, tuple(args.overrides))


def main(argv: list[str] | None = None) -> int:
    plan = parse(argv)
    return run_command(lambda: demo(plan))


def demo(plan: Plan) -> int:
    for stage in STAGES:
        load_config(plan.configs / f"{stage}.toml", plan.overrides)  # a mistake shows before anything is filmed
    started = time.monotonic()
    seconds: dict[str, float] = {}
    steps: list[tuple[str, str, Callable[[Plan], Any]]] = [
        ("data", "film long videos, split them at their cuts, join the captions, choose each stage's clips", make_data),
        ("training", "three stages: images, then video, then the best clips in square, wide and tall", follow_recipe),
        ("samples", "sample seen and never-trained combinations", sample_all),
        ("given", "animate pictures, go on with clips, close loops, join clips", sample_given),
    ]
    if plan.seventh:
        steps.append(("decoder", "the autoencoder's decoder learns more colours than the six", teach_decoder))
        steps.append(("seventh", f"an adapter learns a seventh colour, {plan.seventh}, from 60 clips", teach_seventh))
    for number, (name, what, step) in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {what}", flush=True)
        begin = time.monotonic()
        try:
            step(plan)
        except subprocess.CalledProcessError as error:
            print(
                f"error: {name} ended with exit code {error.returncode}; run again, it continues there", file=sys.stderr
            )
            return error.returncode if error.returncode > 0 else 1
        seconds[name] = round(time.monotonic() - begin, 1)

    from opensora_repro.demo.given import rows_of
    from opensora_repro.planning.recipe import RECORD

    trained = json.loads((plan.root / RECORD).read_text(encoding="utf-8"))
    seconds = {"data": seconds["data"], **{stage: trained[stage]["seconds"] for stage in STAGES}, **seconds}
    del seconds["training"]
    records = measure_all(plan)
    given = measure_given(plan)
    summary: dict[str, Any] = {"adherence": table(records), "seconds": seconds, "records": records, "given": given,
                               "given_shares": rows_of(given)}  # fmt: skip
    if plan.seventh:
        summary["seventh"] = measure_seventh(plan)
    write_text(plan.root / "adherence.json", json.dumps(summary, indent=1) + "\n")
    report = write_report(plan, summary)
    print_adherence(summary["adherence"])
    print_given(given)
    if plan.seventh:
        print_adherence(summary["seventh"], f"with the adapter of {plan.seventh}, {seconds['seventh']:.0f} seconds")
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes; open {report.resolve().as_uri()}")
    print(f"your own text: python -m stages.sample {plan.root}/stage3 --prompt 'a cyan square moving up' --out mine")
    return 0


def run(*command: str) -> None:
    """Run one of our command lines in a process of its own, as a user would."""
    print("$ python -m " + " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def make_data(plan: Plan) -> None:
    """Write the manifests: training clips, the best of them, held-out clips, and stills of both."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from opensora_repro.data.manifest import read_manifest, write_manifest
    from opensora_repro.demo.footage import film
    from opensora_repro.planning.recipe import HELD_OUT, TRAIN

    film(plan.root / "footage", videos=plan.videos + 1, returning=plan.videos + 1, seed=0)
    follow_recipe(plan, "--until", "held-out")
    images, manifests = plan.root / "images", {}
    training, held_out = (read_manifest(plan.root / name) for name in (TRAIN, HELD_OUT))
    for prefix, clips in {"": training, "val_": held_out}.items():
        square = clips.filter(pc.equal(clips["width"], clips["height"]))
        manifests[f"{prefix}stage2"] = square
        manifests[f"{prefix}stage1"] = take_stills(square.filter(moves_one_way(square)), images)
    some = training.filter(moves_one_way(training))
    few = take_stills(some.take(list(range(0, len(some), 2))), images, numbers=(1,))  # one of every other clip
    best = pa.array([number < plan.hq_videos for _, number in map(video_of, training["source"].to_pylist())])
    manifests["stage3"] = pa.concat_tables([training.filter(best), few], promote_options="default")
    manifests["val_stage3"] = held_out
    for name, own in manifests.items():
        write_manifest(own, plan.root / f"{name}.parquet")


def video_of(source: str) -> tuple[str, int]:
    """The kind of a long video, a format or "back", and its number among its like."""
    kind, number = Path(source).stem.split("_")
    return kind, int(number)


def moves_one_way(clips: Any) -> Any:
    """Which clips show a motion that does not come back."""
    import pyarrow as pa

    return pa.array([video_of(source)[0] != "back" for source in clips["source"].to_pylist()], pa.bool_())


def take_stills(clips: Any, folder: Path, numbers: Sequence[int] = range(STILLS_A_CLIP)) -> Any:
    """Save `numbers` of every clip's evenly spaced frames as png; the caption keeps colour and shape only."""
    import pyarrow as pa
    from tqdm import tqdm

    from opensora_repro.data.video import read_frames
    from opensora_repro.data.write import write_png

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip in tqdm(clips.to_pylist(), desc="stills", unit="clip"):
        for still in numbers:
            frame = int(clip["num_frames"]) * (2 * still + 1) // (2 * STILLS_A_CLIP)
            path = folder / f"{clip['id']}-{frame:04d}.png"
            if not path.exists():
                write_png(path, read_frames(Path(clip["path"]), start=frame, count=1)[0])
            caption = str(clip["caption"]).split(" moving ")[0]
            first, time = clip["start_frame"] + frame, clip["start_time"] + frame / clip["fps"]
            lineage = {"start_frame": first, "end_frame": first + 1, "start_time": time, "end_time": time}
            still_row = {"id": path.stem, "path": str(path.resolve()), "caption": caption, "num_frames": 1}
            rows.append(clip | still_row | lineage)
    return pa.Table.from_pylist(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling


def follow_recipe(plan: Plan, *options: str) -> None:
    """Do the recipe's steps in this demo's folder and with its changes; run again, it passes over what is done."""
    root, footage = plan.root, plan.root / "footage"
    words = [f"input={footage}", f"captions={footage / 'captions.csv'}", f"out={root}"]
    words.append(f"held_out=*_{plan.videos:02d}.mp4")
    for stage in STAGES:
        clips = {"data.manifest": root / f"{stage}.parquet", "data.val_manifest": root / f"val_{stage}.parquet"}
        words.append(f"{stage}.config={plan.configs / f'{stage}.toml'}")
        words += [f"{stage}.{key}={path}" for key, path in clips.items()]
        words += [f"{stage}.{change}" for change in plan.overrides]
    run("stages.recipe", RECIPE, *words, *options)


def sample_groups(plan: Plan) -> dict[str, list[Motion]]:
    """The prompts of the two groups: seen ones in a fixed random order, the few never-trained ones in turn."""
    import numpy as np

    from opensora_repro.demo.shapes import motions

    seen, held_out = motions(held_out=False), motions(held_out=True)
    order = np.random.default_rng(0).permutation(len(seen))
    chosen = [seen[i] for i in order], held_out
    return {group: [own[i % len(own)] for i in range(plan.prompts)] for group, own in zip(GROUPS, chosen, strict=True)}


def sample_folder(plan: Plan, format_: str) -> Path:
    return plan.root / "samples" / format_.replace(":", "x")


def sample_all(plan: Plan) -> None:
    """Sample the prompts of both groups in each format, the seen ones first."""
    from opensora_repro.demo.footage import SIZE
    from opensora_repro.demo.shapes import FORMATS, pixels

    for format_, picture in FORMATS.items():
        folder = sample_folder(plan, format_)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(m.caption for chosen in sample_groups(plan).values() for m in chosen) + "\n")
        width, height = pixels(picture, SIZE)
        sample(plan, "--prompts", str(prompts), "--out", str(folder), "--width", str(width), "--height", str(height))


def sample(plan: Plan, *options: str) -> None:
    """One call of `stages.sample`, in this process: what is imported and read for all of them is so once."""
    from stages.sample import main

    command = [str(plan.root / "stage3"), *options, "--seed", str(SAMPLE_SEED), "--overwrite"]
    print("$ python -m stages.sample " + shlex.join(command), flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(command)
    if code:
        raise subprocess.CalledProcessError(code, command)


def given_jobs(plan: Plan) -> list[tuple[Job, Path]]:
    """What is sampled with given frames, and the file of each; what they are given lies beside them."""
    from opensora_repro.data.manifest import read_manifest
    from opensora_repro.demo.given import make_jobs

    data = load_config(plan.configs / "stage3.toml", plan.overrides).data
    clips, others = (read_manifest(plan.root / f"{name}.parquet") for name in ("val_stage2", "stage2"))  # square ones
    folder = plan.root / "given"
    jobs = make_jobs(clips, others, data, folder / "files", plan.given)
    return [(job, folder / job.task / f"{number % plan.given:02d}" / "0000.mp4") for number, job in enumerate(jobs)]


def sample_given(plan: Plan) -> None:
    for job, path in given_jobs(plan):
        sample(plan, "--prompt", job.motion.caption, *job.options, "--out", str(path.parent))


def seventh_prompts(plan: Plan) -> list[Motion]:
    """Of the seventh colour, then of the six."""
    from opensora_repro.demo.seventh import motions_of

    own = motions_of(plan.seventh or "")
    return [own[number % len(own)] for number in range(plan.prompts)] + sample_groups(plan)["seen"]


def decoder_folder(plan: Plan) -> Path:
    return plan.root / "seventh" / "vae"


def teach_decoder(plan: Plan) -> None:
    """Train the decoder on, for any colour. Latents stay what they are, and with them the model."""
    if not decoder_folder(plan).exists():
        places = {
            "run.dir": plan.root / "seventh" / "stage0",
            "data.manifest": plan.root / "seventh/drawn/manifest.parquet",
        }
        settings = [f"{key}={value}" for key, value in places.items()]
        run("opensora_repro.demo.autoencoder", "--out", str(decoder_folder(plan)), *settings)


def teach_seventh(plan: Plan) -> None:
    """Train an adapter on clips of the seventh colour and others; sample with it."""
    from opensora_repro.demo.seventh import SETTINGS, film_clips

    folder = plan.root / "seventh"
    manifest = film_clips(folder / "clips", plan.seventh or "", plan.root / "stage3.parquet")
    places = {"run.dir": folder / "adapter", "init.weights": plan.root / "stage3", "data.manifest": manifest,
              "data.val_manifest": plan.root / "val_stage3.parquet", "data.cache": folder / "cache"}  # fmt: skip
    settings = [f"{key}={value}" for key, value in {**places, **SETTINGS}.items()]
    run("stages.stage3_hq", str(plan.configs / "stage3.toml"), *settings, *plan.overrides)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(motion.caption for motion in seventh_prompts(plan)) + "\n")
    options = {
        "--prompts": prompts,
        "--lora": folder / "adapter",
        "--vae": decoder_folder(plan),
        "--out": folder / "samples",
    }
    sample(plan, *(str(word) for option in options.items() for word in option))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and reporting


def measure_all(plan: Plan) -> list[dict[str, Any]]:
    """One record a written file: group, format, caption, path, what its pixels show and whether that agrees."""
    from dataclasses import asdict

    from opensora_repro.demo.adherence import measure_file
    from opensora_repro.demo.shapes import FORMATS

    chosen = [(group, motion) for group, own in sample_groups(plan).items() for motion in own]
    records = []
    for format_ in FORMATS:
        for index, (group, motion) in enumerate(chosen):
            path = sample_folder(plan, format_) / f"{index:04d}.mp4"
            seen = measure_file(path)
            records.append({"group": group, "format": format_, "caption": motion.caption, "path": str(path),
                            "seen": asdict(seen), "agrees": seen.agrees(motion)})  # fmt: skip
    return records


def measure_given(plan: Plan) -> list[dict[str, Any]]:
    """One record a file of `sample_given`."""
    import numpy as np
    import torch

    from opensora_repro.data.video import probe, read_frames
    from opensora_repro.demo.given import judge
    from opensora_repro.frozen.vae import open_vae

    vae = open_vae(load_config(plan.configs / "stage3.toml", plan.overrides).vae, "cpu", torch.float32)
    records = []
    for job, path in given_jobs(plan):
        frames = np.asarray(read_frames(path, start=0, count=probe(path).num_frames))
        told = {"task": job.task, "caption": job.motion.caption, "path": str(path), "given": list(map(str, job.given))}
        records.append(told | judge(job, frames, vae))
    return records


def measure_seventh(plan: Plan) -> dict[str, dict[str, float]]:
    """Shares of the seventh colour's videos and of the six others'."""
    from opensora_repro.demo.adherence import measure_file, shares
    from opensora_repro.demo.shapes import COLOURS, OTHER_COLOURS

    seventh = plan.seventh or ""
    rows: dict[str, list[dict[str, Any]]] = {seventh: [], "the six": []}
    for index, motion in enumerate(seventh_prompts(plan)):
        seen = measure_file(
            plan.root / "seventh" / "samples" / f"{index:04d}.mp4", COLOURS | {seventh: OTHER_COLOURS[seventh]}
        )
        rows[seventh if motion.colour == seventh else "the six"].append({"agrees": seen.agrees(motion)})
    return {name: shares(own) for name, own in rows.items()}


def table(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Shares of each group and format, by their names: "seen 1:1"."""
    from opensora_repro.demo.adherence import shares
    from opensora_repro.demo.report import group_of

    rows: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: GROUPS.index(record["group"])):
        rows.setdefault(group_of(record), []).append(record)
    return {name: shares(own) for name, own in rows.items()}


def print_adherence(
    adherence: dict[str, dict[str, float]], title: str = "prompt adherence, measured from the written mp4 files"
) -> None:
    print(f"\n{title}")
    print(f"{'':>18}{'colour':>10}{'shape':>10}{'direction':>11}")
    for name, row in adherence.items():
        print(f"{name:>18}{row['colour']:>10.2f}{row['shape']:>10.2f}{row['direction']:>11.2f}")


def print_given(records: list[dict[str, Any]]) -> None:
    from opensora_repro.demo.given import PARTS, rows_of

    print(f"\nwith given frames, {len(records)} videos")
    print(f"{'':>18}" + "".join(f"{part:>10}" for part in PARTS))
    for name, row in rows_of(records).items():
        print(f"{name:>18}" + "".join(f"{row[part]:>10.2f}" for part in PARTS))


def write_report(plan: Plan, summary: dict[str, Any]) -> Path:
    from opensora_repro.demo import report

    out = plan.root / "report.html"
    report.write_report(plan.root, out, title="Three stages, end to end", summary=summary)
    return out


if __name__ == "__main__":
    sys.exit(main())
