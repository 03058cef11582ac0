"""Give the clips of a manifest their captions: from files made elsewhere, from a model, or from an endpoint.

    python -m data_tools.caption INPUT --template FILE.csv
    python -m data_tools.caption INPUT --sidecar FILE|FOLDER --out DIR
    python -m data_tools.caption INPUT --model NAME|FOLDER --out DIR
    python -m data_tools.caption INPUT --endpoint URL --endpoint-model NAME --out DIR

INPUT is a manifest; a folder, a file, a pattern or a table of paths is probed first. --template writes a list to fill
in with a spreadsheet, a row a clip, which is then the sidecar. A sidecar is joined by key, never by order: a FOLDER of
.txt or .json files with a clip's id, its file's name or its source's name each; or a list (CSV, Parquet, JSON, JSON
lines) of `id, caption`; of `path, caption` or `source, caption`, where a source's caption goes to all its clips; of
`source, caption` with `start_frame, end_frame` or `start_time, end_time`; or as WebVid, Panda-70M, Open-Sora-Plan and
HD-VG-130M have it. A clip gets the caption whose span holds its middle. MODEL is a folder, or a name in the hub's cache
(nothing is downloaded), of a BLIP-2, Gemma 3, InternVL, LLaVA (1.5, NeXT, NeXT-Video, OneVision), Qwen2-VL, Qwen2.5-VL,
Qwen3-VL, Qwen3.5, SmolVLM or Video-LLaVA. An endpoint is any API of chat completions.

--rewrite makes short captions detailed with the endpoint: those of --sidecar or --model, else the manifest's own, else
what the endpoint itself wrote; the short one stays in `caption_original`.

DIR receives `manifest.parquet` with `caption` and `caption_flag`, `rejects.parquet` (clips without a caption, with the
reason) and a record of everything written, so that a second run asks only for what is new. Thoughts, chat markers and
courtesies around a caption are cut. Flags: empty, thoughts, refusal (these are rejected), loop (repeats itself),
truncated (was cut at --max-tokens), opener (begins "The video shows").
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.caption.options import AskedArguments, check_asked
from opensora_repro.data.caption.text import Caption, judged
from opensora_repro.data.jobs.course import Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, runner_of
from opensora_repro.data.jobs.steps import AskStep, ModelStep, NeedsAllRows
from opensora_repro.data.options import any_path, argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.tables import Again
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import one_line

if TYPE_CHECKING:
    from opensora_repro.data.caption.chat import Endpoint
    from opensora_repro.data.caption.endpoints import Endpoints

SOURCES = ("sidecar", "model", "endpoint")
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arguments(AskedArguments, RunnerArguments):
    """What the command line says."""

    input: str = argument(INPUT_HELP, type=any_path)
    out: str = option("folder for manifest.parquet and rejects.parquet", "", type=any_path, metavar="DIR")
    template: str = option(
        "write a list of the clips to fill in (.csv), nothing else", "", type=local_path, metavar="FILE"
    )
    sidecar: str = option("list of captions, or folder with a text file a clip", "", type=local_path, metavar="PATH")
    model: str = option(
        "vision-language model: folder, or name in the hub's cache", "", type=local_path, metavar="MODEL"
    )
    endpoint: list[str] = option(
        "chat-completions API, such as http://localhost:8000/v1; again for more servers of the same model",
        None,
        action="append",
        metavar="URL",
    )
    endpoint_model: str = option("the endpoint's model", "", metavar="NAME")
    rewrite: bool = option("make short captions detailed, with the endpoint", False)
    keep_flagged: bool = option("keep empty and refusing captions, flagged", False)


build_parser = partial(parser_of, Arguments, "data_tools.caption", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("caption", args)(lambda: template(args) if args.template else caption(args)))


def check(args: Arguments) -> None:
    """Raise UserError for options that do not go together."""
    sources = [name for name in SOURCES if getattr(args, name)]
    if not sources:
        raise DataError("nothing to take captions from: give --sidecar, --model or --endpoint (or --template)")
    if not args.out:
        raise DataError("--out DIR is missing: the folder for manifest.parquet and rejects.parquet")
    if args.rewrite and not args.endpoint:
        raise DataError("--rewrite: needs --endpoint and --endpoint-model, which do it")
    if len(sources) > (2 if args.rewrite else 1) or {"sidecar", "model"} <= set(sources):
        raise DataError(f"{' and '.join(f'--{name}' for name in sources)}: give one of them")
    if bool(args.endpoint) != bool(args.endpoint_model):
        raise DataError("--endpoint and --endpoint-model: give both, the address and the model's name there")
    check_asked(args, endpoint=bool(args.endpoint))


def template(args: Arguments) -> int:
    """Write the list to fill in; returns the exit status."""
    from opensora_repro.data.caption.lists import write_template
    from opensora_repro.data.inputs import TABLE_SUFFIXES
    from opensora_repro.data.manifest import read_manifest

    if given := [f"--{name}" for name in SOURCES if getattr(args, name)]:
        raise DataError(f"--template and {given[0]}: give one of them")
    manifest = Path(args.input)
    if args.out:
        manifest = manifest_of(args.input, Path(args.out), runner_of(args))
    elif manifest.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{args.input}: is no manifest; add --out DIR, where it is probed first")
    clips = read_manifest(manifest, need_captions=False)
    empty = write_template(Path(args.template), clips.to_pylist())
    print(f"{len(clips)} clips, {empty} without a caption: fill in {args.template}, then pass it to --sidecar")
    return 0


def caption(args: Arguments) -> int:
    """Caption all clips, then write the manifest and the rejects; returns the exit status."""
    from opensora_repro.data.caption.outcome import write_captioned
    from opensora_repro.data.manifest import open_manifest

    check(args)
    runner, out = runner_of(args), Path(args.out)
    endpoint = None
    if args.endpoint:
        from opensora_repro.data.caption import ask

        endpoint = ask.endpoint_of(args.endpoint, args.endpoint_model, args)
    if endpoint and not out.exists():
        endpoint.check_reachable()  # before any work; a run that may have all its answers needs no server
    with Records(out) as records:
        manifest = manifest_of(args.input, out, runner)
        clips = open_manifest(manifest, need_captions=False)
        captions = first_captions(args, Again(clips.rows), endpoint, records, runner)
        short = captions if args.rewrite else None
        if args.rewrite and endpoint:
            captions = ask.rewritten(captions, args, endpoint, records)
    counts = write_captioned(clips, captions, short, out, keep_flagged=args.keep_flagged)
    if counts.unwrapped:
        print(f"{counts.unwrapped} captions had thoughts, chat markers or courtesies around them, which were cut")
    flagged = "".join(f", {count} flagged {flag}" for flag, count in sorted(counts.flags.items()))
    rejected = counts.clips - counts.captioned
    print(f"{counts.captioned} of {counts.clips} clips captioned{flagged}, {rejected} rejected: {one_line(out)}")
    if not counts.captioned:
        source = args.sidecar or args.model or ", ".join(args.endpoint)
        raise DataError(f"{source}: no clip found its caption; the reasons are in {out / 'rejects.parquet'}")
    return 0


def first_captions(
    args: Arguments, rows: Iterable[Record], endpoint: Endpoint | Endpoints | None, records: Records, runner: Runner
) -> Iterable[Caption]:
    """Return every clip's caption before any rewriting; made anew whenever they are asked for."""
    if args.sidecar:
        from opensora_repro.data.caption.join import captions_of

        return captions_of(Path(args.sidecar), rows)
    if args.model:
        from opensora_repro.frozen.captioning import from_model

        return from_model(rows, args.model, args, Keeping(records, "model"), runner)
    if args.rewrite and any(row["caption"].strip() for row in rows):
        return Again(lambda: (judged(row["caption"]) for row in rows))
    from opensora_repro.data.caption.ask import from_endpoint

    assert endpoint is not None
    return from_endpoint(rows, args, endpoint, records, runner)


# ---- as a step of a line, see jobs/steps.py


def steps_of(args: Arguments, columns: Mapping[str, str]) -> list[ModelStep | AskStep]:
    """Return what is done clip by clip. Raises NeedsAllRows."""
    if args.sidecar:
        raise NeedsAllRows("caption (which names of a list mean which clips)")
    if args.rewrite:
        raise NeedsAllRows("caption (--rewrite)")
    if args.model:
        from opensora_repro.frozen.captioning import model_step

        return [model_step(Path(args.out), args.model, args, runner_of(args), columns, args.keep_flagged)]
    from opensora_repro.data.caption import ask

    endpoint = ask.endpoint_of(args.endpoint, args.endpoint_model, args)
    return [ask.endpoint_step(Path(args.out), args, endpoint, columns, args.keep_flagged)]


if __name__ == "__main__":
    sys.exit(main())
