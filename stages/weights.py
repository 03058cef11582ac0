"""Published weights: what there is, what a file holds, fetching, checking and converting it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from opensora_repro.errors import FAILURE, GOES_ON, run_command
from opensora_repro.files import user_path

if TYPE_CHECKING:
    from opensora_repro.models.config import TrainedConfig
    from opensora_repro.weights.catalog import Entry
    from opensora_repro.weights.export import Grid
    from opensora_repro.weights.files import WeightsFile
    from opensora_repro.weights.published import Published

SIGMA_TOKENS = 300  # of captions; PixArt-alpha's have 120
FORMATS = ("opensora", "pixart", "diffusers", "safetensors")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    source = "a weights file, a checkpoint, a run, a folder of Open-Sora's training or of diffusers, or a fetched NAME"
    add("list", run_list, "show the published weights that can be fetched, with size and licence")
    models = add("models", run_models, "show the sizes of models that can be trained, with their parameters")
    models.add_argument(
        "--caption-channels", type=int, default=4096, metavar="N", help="of the text encoder (default: %(default)s)"
    )
    inspect = add("inspect", run_inspect, "say whose weights these are, the model they make, and how to use them")
    fetch = add("fetch", run_fetch, "fetch published weights into the hub's cache, resuming, and verify them")
    fetch.add_argument("name", metavar="NAME", help="as `list` shows it")
    verify = add("verify", run_verify, "read everything: complete, finite, and unchanged where a sha256 is known")
    convert = add("convert", run_convert, "write weights in another layout")
    convert.add_argument("--to", choices=FORMATS, required=True)
    places = "a file; for diffusers a folder, as of a release"
    convert.add_argument("--out", type=user_path, required=True, metavar="PATH", help=places)
    merge = add("merge", run_merge, "write weights with adapters (LoRA) added, as one file that samples by itself")
    lora = "a run with [lora], its checkpoint, peft's folder or file; repeatable: they add up"
    merge.add_argument("--lora", action="append", required=True, metavar="PATH[:WEIGHT]", help=lora)
    merge.add_argument("--out", type=user_path, required=True, metavar="FILE", help="a safetensors file")
    card = add("card", run_card, "write a run's model card: recipe, data, evaluation, samples, what it was made from")
    card.add_argument("--out", type=user_path, required=True, metavar="FILE", help="such as README.md")
    push = add("push", run_push, "send a run's weights, config and model card to a hub, once --yes is given")
    for command in (card, push):
        command.add_argument(
            "source", metavar="RUN", type=user_path, help="a run (its newest checkpoint), or a checkpoint"
        )
        command.add_argument(
            "--license", default="", metavar="NAME", help="of these weights, as hubs call it: apache-2.0"
        )
        command.add_argument("--no-ema", action="store_true", help="the trained weights, not their moving average")
    push.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub (HF_ENDPOINT, HF_TOKEN)")
    push.add_argument("--yes", action="store_true", help="send it; without it what would go where is printed, no more")
    push.add_argument(
        "--public", action="store_true", help="for all to see; a repository that is made is private otherwise"
    )
    for command in (inspect, verify, convert, merge):
        command.add_argument("source", metavar="FILE", type=user_path, help=source)
        command.add_argument("--no-ema", action="store_true", help="the trained weights, not their moving average")
        command.add_argument("--num-heads", type=int, metavar="N", help="attention heads, where the file cannot tell")
        command.add_argument("--family", choices=("dit", "latte"), help="whose these are, where the file cannot tell")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: args.run(args), kept=GOES_ON if args.command == "fetch" else "")


def run_list(args: argparse.Namespace) -> int:
    from opensora_repro.weights.catalog import load_catalog

    entries = load_catalog()
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        print(f"{entry.name:<{width}}  {_size(entry):>8}  {entry.licence:<16}  {entry.about}")
    print("\nfetch one: python -m stages.weights fetch NAME")
    return 0


def _size(entry: Entry) -> str:
    return f"{entry.about_bytes / 1e9:.2f} GB" if entry.about_bytes else "?"


def run_models(args: argparse.Namespace) -> int:
    from opensora_repro.models.config import SIZES, STDiT2Config, STDiT3Config, STDiTConfig
    from opensora_repro.planning.parameters import count_parameters

    kinds: dict[str, Callable[..., TrainedConfig]] = {
        "PixArt": partial(STDiTConfig, temporal_attention=False),
        "STDiT": STDiTConfig,
        "STDiT2": STDiT2Config,
        "STDiT3": STDiT3Config,
    }
    columns = " ".join(f"{kind:>13}" for kind in kinds)
    print(f"{'':>5} {'hidden_size':>12} {'depth':>6} {'num_heads':>10} {columns}  parameters")
    for name, (width, depth, heads) in SIZES.items():
        counts = []
        for build in kinds.values():
            size = {"hidden_size": width, "depth": depth, "num_heads": heads}
            cfg = build(**size, caption_channels=args.caption_channels)
            fits = width % 3 == 0 or "ar" not in cfg.conditions  # a third for each of height, width and their ratio
            counts.append(f"{count_parameters(cfg):>13,}" if fits else f"{'-':>13}")
        print(f"{name + '/2':>5} {width:>12} {depth:>6} {heads:>10} {' '.join(counts)}")
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    from opensora_repro.weights.catalog import fetch, find_entry

    entry = find_entry(args.name)
    print(f"{entry.name}: {_size(entry)}, licence {entry.licence}")
    with progress("verifying") as on_bytes:
        path = fetch(entry, progress=on_bytes)
    print(path)
    if entry.layout not in ("diffusers-vae", "opensora-vae", "transformers-t5"):  # those are found by their names
        print(f"look into it: python -m stages.weights inspect {shlex.quote(str(path))}")
    return 0


def open_source(args: argparse.Namespace) -> tuple[WeightsFile, Published]:
    from opensora_repro.weights.files import open_weights
    from opensora_repro.weights.published import describe

    file = open_weights(args.source, ema=not args.no_ema)
    return file, describe(file, num_heads=args.num_heads, family=args.family)


def run_inspect(args: argparse.Namespace) -> int:
    from opensora_repro.weights.families import architectures_from
    from opensora_repro.weights.load import dtype_name, num_elements, to_ours

    file, found = open_source(args)
    weights, tables = to_ours(found.layout, file.tensors, str(file.path))
    data, sample = found.config.data, found.config.sample
    wrapper = f", under {file.wrapper!r}" if file.wrapper else ""
    facts = {
        "file": file.path,
        "layout": f"{found.layout.title} ({file.container}{wrapper})",
        **({"names": ", ".join(file.notes)} if file.notes else {}),
        "tensors": f"{len(weights)}, {num_elements(weights):,} elements, {dtype_name(weights)}",
        "tables": ", ".join(f"{key} {list(value.shape)}" for key, value in tables.items()) or "none",
        "made at": f"{found.trained}" if str(found.trained) else "not told by the file",
        "samples": f"{data.num_frames} frame(s), {data.height}x{data.width}; "
        f"{sample.sampler}, {sample.steps} steps, guidance {sample.guidance:g}",
    }
    for key, value in facts.items():
        print(f"{key:>10}  {value}")
    for key, value in asdict(found.model).items():
        print(f"{'model.' + key:>32} = {value}")
    source = shlex.quote(str(args.source))
    print(f"sample it: python -m stages.sample {source} {_options(args, found)} --out OUT --seed 0")
    if found.family.name == "pixart" and found.model.model_max_length == SIGMA_TOKENS:
        print("note: captions of 300 tokens are PixArt-Sigma's, whose autoencoder is SDXL's: give it with --vae")
    for architecture in architectures_from(found.family):
        chosen = "" if architecture == "stdit" else f" with model.architecture={architecture}"
        print(f"train from it: init.weights={source}{chosen}")
    return 0


def _options(args: argparse.Namespace, found: Published) -> str:
    prompt = "--label 0" if found.model.conditioning == "class" else '--prompt "your text"'
    told = {"--num-heads": args.num_heads, "--family": args.family}
    return " ".join([*(f"{name} {value}" for name, value in told.items() if value is not None), prompt])


def run_verify(args: argparse.Namespace) -> int:
    from opensora_repro.weights.catalog import load_catalog
    from opensora_repro.weights.files import recorded_sha256, release
    from opensora_repro.weights.load import all_finite, check_complete, to_ours

    file, found = open_source(args)
    check_complete(file, found.model)
    weights, _ = to_ours(found.layout, file.tensors, str(file.path))
    bad = []
    with progress("reading") as on_bytes:
        done = 0
        for key, value in weights.items():
            if not all_finite(value):
                bad.append(key)
            done += value.nbytes
            on_bytes(done)
            if file.mapped:
                release(value)
    if bad:
        print(
            f"error: {file.path}: {len(bad)} tensors hold values that are not finite, first {bad[0]}", file=sys.stderr
        )
        return FAILURE
    known = {item.sha256: entry.name for entry in load_catalog() for item in entry.files if item.sha256}
    # Files of folders are all called alike.
    expected = {entry.name: entry.files[0].sha256 for entry in load_catalog() if not entry.folder}
    for path in file.files:
        with progress(f"sha256 of {path.name}") as on_bytes:
            digest = recorded_sha256(path, on_bytes)
        print(f"{digest}  {path}" + (f"  ({known[digest]})" if digest in known else ""))
        if expected.get(path.name, "") not in ("", digest):
            print(f"note: the published {path.name} has another sha256, {expected[path.name]}")
    print(f"{file.path}: whole {found.layout.title} weights, {len(weights)} tensors, all finite")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from opensora_repro.weights.card import placeless
    from opensora_repro.weights.export import export, is_pipeline
    from opensora_repro.weights.load import check_complete, check_finite, check_recorded, to_ours

    file, found = open_source(args)
    check_complete(file, found.model)
    check_recorded(file)
    weights, _ = to_ours(found.layout, file.tensors, str(file.path))
    check_finite(file, weights)
    export(weights, found.model, grid_of(found), args.to, args.out, placeless(found.config))
    print(f"{found.layout.title} weights, {len(weights)} tensors, written as {args.to}: {args.out}")
    if args.to == "diffusers" and is_pipeline(found.model):
        load = f"DiffusionPipeline.from_pretrained({str(args.out)!r}, trust_remote_code=True)"
        print("note: diffusers has no class for this model, so the folder is a pipeline with code, an import of this")
        print(f'      package, and refused without trust_remote_code: {load}("your text").frames')
    else:
        note_objective(found)
    return 0


def grid_of(found: Published) -> Grid:
    """Tokens of the samples that the weights' config makes."""
    from opensora_repro.models.stdit import PIXELS_A_LATENT
    from opensora_repro.weights.export import Grid

    frames, rows, cols = found.model.patch_size
    data = found.config.data
    return Grid(
        -(-data.num_frames // frames), data.height // PIXELS_A_LATENT // rows, data.width // PIXELS_A_LATENT // cols
    )


def note_objective(found: Published) -> None:
    """Say what a file of weights alone does not tell."""
    trained, assumed = found.config.diffusion, found.family.diffusion
    if (trained.objective, trained.schedule) != (assumed.objective, assumed.schedule):
        told = f"diffusion.objective={trained.objective}"
        told += f" diffusion.schedule={trained.schedule}" if trained.schedule else ""
        taken = assumed.schedule or {"iddpm": "IDDPM"}.get(assumed.objective, assumed.objective)
        print(f"note: trained with {told}, which the file does not tell: stages.sample would take it")
        print(f"      for {taken}; sample the checkpoint, or train on from this with {told}")


def run_merge(args: argparse.Namespace) -> int:
    from opensora_repro.weights.adapters import add_adapters, check_adapters, read_adapter
    from opensora_repro.weights.export import export
    from opensora_repro.weights.families import empty_model
    from opensora_repro.weights.load import load_model_weights

    file, found = open_source(args)
    adapters = [read_adapter(spec, ema=not args.no_ema) for spec in args.lora]
    check_adapters(adapters, found.model)
    model = empty_model(found.model)
    print(load_model_weights(model, file))
    add_adapters(model, adapters)
    export(model.state_dict(), found.model, grid_of(found), "safetensors", args.out)
    for adapter in adapters:
        print(adapter)
    print(f"written: {args.out}")
    note_objective(found)
    return 0


def run_card(args: argparse.Namespace) -> int:
    from opensora_repro.files import write_text
    from opensora_repro.weights.card import CARD, share

    name = args.source.resolve().name
    write_text(args.out, share(args.source, name=name, licence=args.license, ema=not args.no_ema).texts[CARD])
    print(args.out)
    return 0


def run_push(args: argparse.Namespace) -> int:
    """Say what goes where; send it if told to."""
    from opensora_repro.weights.card import share
    from opensora_repro.weights.push import check_repo, endpoint, push

    check_repo(args.repo)
    shared = share(args.source, name=args.repo, licence=args.license, ema=not args.no_ema)
    seen = "public" if args.public else "private, if it is not there yet"
    print(f"{shared.checkpoint} -> {endpoint()}/{args.repo} ({seen})")
    for name, size in shared.sizes().items():
        print(f"{size:>16,}  {name}")
    if not args.yes:
        print("nothing was sent: look at the card (stages.weights card), then add --yes")
        return 0
    print(push(shared, args.repo, public=args.public))
    return 0


@contextmanager
def progress(label: str) -> Iterator[Callable[[int], None]]:
    """Shows the bytes done on stderr once the work has taken two seconds."""
    from tqdm import tqdm

    with tqdm(desc=label, unit="B", unit_scale=True, delay=2, mininterval=0.5 if sys.stderr.isatty() else 15.0) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show


if __name__ == "__main__":
    sys.exit(main())
