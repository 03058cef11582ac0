"""Processes that share one video by frames, each comparing itself with the same model run whole in that process.

The processes of a group are started once, from a server that has imported torch already, and run all cases.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import collectives
from opensora_repro.errors import EngineError
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.sequence import (
    FrameParallel,
    SequenceParallelAttention,
    apply_sequence_parallelism,
)
from tests.processes import forked
from tests.video_models import CONFIGS, build, conditions

LENGTH, CHANNELS = 6, 12  # of captions
Errors = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A forward and a backward pass; latents of 6x10 have 15 places, which no group here divides."""

    frames: int
    patch: tuple[int, int, int] = (1, 2, 2)
    side: tuple[int, int] = (6, 10)
    checkpointing: str = "none"
    drop: bool = False
    mask: bool = True
    ddp: bool = False
    first_frame: int = 0
    network: str = "stdit"
    given: tuple[int, ...] = ()  # frames of the first sample that are given; of the second one the first alone


FLOAT32_CASES = {
    "four frames": Case(4),
    "four frames, recomputed": Case(4, checkpointing="full"),
    "five frames, recomputed, dropped caption": Case(5, checkpointing="full", drop=True),
    "five frames": Case(5),
    "one frame": Case(1),
    "one frame, recomputed": Case(1, checkpointing="full"),
    "seven frames, dropped caption": Case(7, drop=True),
    "seven frames, selective": Case(7, side=(6, 40), checkpointing="selective"),
    "seven frames, no mask": Case(7, mask=False),
    "seven frames, later part of a video": Case(7, first_frame=3),
    "three places": Case(5, side=(2, 6), checkpointing="full"),
    "two frames a token, seven frames": Case(7, patch=(2, 2, 2), checkpointing="full"),
    "two frames a token, five frames": Case(5, patch=(2, 2, 2)),
    "five frames under DDP, recomputed": Case(5, checkpointing="full", ddp=True),
    "five frames, two given": Case(5, given=(0, 3)),
    "STDiT2, seven frames": Case(7, network="stdit2"),
    "STDiT2, later part of a video, three given": Case(5, first_frame=3, given=(1, 2, 4), network="stdit2"),
    "STDiT3, four frames": Case(4, network="stdit3"),
    "STDiT3, seven frames, two given, recomputed": Case(7, given=(0, 6), checkpointing="full", network="stdit3"),
    "STDiT3, two frames a token, given": Case(5, patch=(2, 2, 2), given=(2, 3), network="stdit3"),
    "STDiT3, one frame": Case(1, network="stdit3"),
    "STDiT3, later part of a video, under DDP": Case(5, first_frame=2, ddp=True, network="stdit3"),
}


def make_model(patch: tuple[int, int, int] = (1, 2, 2), temporal_attention: bool = True, network: str = "stdit") -> Any:
    """The same on every rank; no branch is silent."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32, "depth": 2, "num_heads": 4, "caption_channels": CHANNELS, "model_max_length": LENGTH,
        "patch_size": patch,
    }  # fmt: skip
    if network == "stdit":
        model: Any = STDiT(STDiTConfig(**size, temporal_attention=temporal_attention))
    else:
        model = build(STDiT3Config(**size) if network == "stdit3" else STDiT2Config(**size | {"hidden_size": 48}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_inputs(case: Case, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Arguments, keyword arguments, and a gradient for the output; the same on every rank."""
    generator = torch.Generator().manual_seed(case.frames)
    latents = torch.randn(batch, 4, case.frames, *case.side, generator=generator)
    text = torch.randn(batch, LENGTH, CHANNELS, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[2], [LENGTH]] * (batch // 2)) if case.mask else None
    kwargs: dict[str, Any] = {"first_frame": case.first_frame}
    if case.drop:
        kwargs["drop_text"] = torch.arange(batch) == 1
    if case.given:
        kwargs["frame_mask"] = torch.ones(batch, case.frames, dtype=torch.bool)
        kwargs["frame_mask"][0, list(case.given)] = False
        kwargs["frame_mask"][1:, 0] = False
    kwargs |= conditions(CONFIGS[case.network], batch)
    expected = torch.randn(batch, 8, case.frames, *case.side, generator=generator)
    return (latents, torch.rand(batch, generator=generator) * 1000, text, mask), kwargs, expected


def share_out(model: STDiT, ddp: bool = False) -> FrameParallel:
    """Made sequence parallel over all processes; parameters and state-dict keys stay."""
    names, parameters = list(model.state_dict()), list(model.parameters())
    apply_sequence_parallelism(model, group())
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    return FrameParallel(DistributedDataParallel(model) if ddp else model, group(), model.cfg.patch_size[0])


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gradients(model: STDiT, average: bool) -> dict[str, Tensor]:
    """Every parameter's gradient, averaged over the ranks as DDP would."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    if average:
        flat = torch.cat([grad.flatten() for grad in found.values()])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([grad.numel() for grad in found.values()])
        found = {name: part.view_as(found[name]) for name, part in zip(found, parts, strict=True)}
    return found


def worst(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor over its largest value."""
    assert ours.keys() == expected.keys()
    return max(((ours[k] - expected[k]).abs().max() / expected[k].abs().max()).item() for k in expected)


def worst_norm(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As `worst`, but norm of the difference over norm: rounding's typical size, not its luckless peak."""
    return max(((ours[k] - expected[k]).norm() / expected[k].norm()).item() for k in expected)


def passes(case: Case, shared: bool, autocast: bool = False) -> dict[str, Tensor]:
    """The output and all parameter gradients, run whole or shared out."""
    model = make_model(case.patch, network=case.network)
    model.activation_checkpointing = case.checkpointing
    call: Callable[..., Tensor] = share_out(model, case.ddp) if shared else model
    arguments, kwargs, expected = make_inputs(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(*arguments, **kwargs)
    assert out.dtype == torch.float32
    (out * expected).sum().backward()
    return {"output": out.detach(), **gradients(model, average=shared and not case.ddp)}


# ---------------------------------------------------------------------------------------------------------------------
# What is checked: each returns errors by name, or asserts


def check_float32() -> Errors:
    return {name: worst(passes(case, shared=True), passes(case, shared=False)) for name, case in FLOAT32_CASES.items()}


def check_two_forwards() -> Errors:
    """Two videos of unlike lengths are run forward before either runs backward, and layers are recomputed."""
    errors = {}
    first, second = Case(5, drop=True), Case(7)  # of the same length a rank (two each of four, or four each of two)
    for order in ("together", "first to last", "last to first"):
        results = []
        for shared in (True, False):
            model = make_model()
            model.activation_checkpointing = "full"
            call: Callable[..., Tensor] = share_out(model) if shared else model
            losses = []
            for case in (first, second):
                arguments, kwargs, expected = make_inputs(case)
                losses.append((call(*arguments, **kwargs) * expected).sum())
            if order == "together":
                losses = [losses[0] + losses[1]]
            for loss in reversed(losses) if order == "last to first" else losses:
                loss.backward()
            results.append(gradients(model, average=shared))
        errors[order] = worst(*results)
    return errors


def check_autocast() -> Errors:
    """How far bf16 run shared out is from bf16 run whole, and how far that is from float32."""
    errors = {}
    for checkpointing in ("none", "full"):
        case = Case(5, checkpointing=checkpointing)
        exact = passes(case, shared=False)
        whole, ours = passes(case, shared=False, autocast=True), passes(case, shared=True, autocast=True)
        kind = "recomputed" if checkpointing == "full" else "kept"
        errors[f"{kind}: whole to float32"] = worst_norm(whole, exact)
        errors[f"{kind}: shared to float32"] = worst_norm(ours, exact)
        errors[f"{kind}: shared to whole"] = worst_norm(ours, whole)
    return errors


def check_sampling() -> Errors:
    """No gradients, and guidance's doubled batch with one mask for both halves."""
    errors = {}
    modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "gradients": nullcontext,
    }  # fmt: skip
    for name, mode in modes.items():
        model = make_model().eval()
        (latents, timestep, text, mask), _, _ = make_inputs(Case(7))
        doubled = latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2), torch.cat([text, text.flip(1)]), mask
        drop_text = torch.tensor([False, False, True, True])
        with mode():
            expected = model(*doubled, drop_text=drop_text)
            guided = model(*doubled[:2], torch.cat([text, model.null_condition().expand_as(text)]), mask)
            prepared = model.prepare_text(text, mask, null=model.null_condition())
            shared = share_out(model)
            ours = shared(*doubled, drop_text=drop_text)
            ours_guided = shared(latents, timestep, prepared)
        errors[name] = worst({"": ours.detach()}, {"": expected.detach()})
        errors[f"{name}, prepared text"] = worst({"": ours_guided.detach()}, {"": guided.detach()})
    return errors


def check_data_parallel() -> Errors:
    """Two groups, a batch of their own each, under one DDP over all processes: the gradient of both batches' mean."""
    size = dist.get_world_size()
    halves = [list(range(size // 2)), list(range(size // 2, size))]
    groups = [dist.new_group(ranks) for ranks in halves]
    mine = int(dist.get_rank() in halves[1])
    cases = [Case(5), Case(7, drop=True)]
    results = []
    for shared in (True, False):
        model = make_model()
        model.activation_checkpointing = "full"
        call: Callable[..., Tensor] = model
        if shared:
            apply_sequence_parallelism(model, groups[mine])
            call = FrameParallel(DistributedDataParallel(model), groups[mine], 1)
        for case in cases[mine : mine + 1] if shared else cases:
            arguments, kwargs, expected = make_inputs(case)
            loss = (call(*arguments, **kwargs) * expected).sum()
            (loss if shared else loss / 2).backward()
        results.append(gradients(model, average=False))
    return {"two groups": worst(*results)}


def check_replaced_projections() -> Errors:
    """As tensor parallelism does it: projections and `num_heads` become a rank's share, here two heads of four."""

    def replace_projections(model: STDiT) -> STDiT:
        torch.manual_seed(7)
        for block in model.blocks:
            block.attn_temp.qkv, block.attn_temp.proj = torch.nn.Linear(32, 48), torch.nn.Linear(16, 32)
            block.attn_temp.num_heads = 2
        return model

    arguments, kwargs, _ = make_inputs(Case(5))
    shared = make_model()
    call = share_out(shared)
    replace_projections(shared)
    expected = replace_projections(make_model())(*arguments, **kwargs)
    return {"output": worst({"": call(*arguments, **kwargs).detach()}, {"": expected.detach()})}


def check_tensor_parallel() -> Errors:
    """The layers of every network cut over all processes, alone and where activations are recomputed."""
    from colossalai.shardformer import ShardConfig, ShardFormer

    from opensora_repro.parallel.colossal import TensorPolicy
    from opensora_repro.parallel.tensor import tensor_cuts

    errors = {}
    for network, checkpointing in (("stdit", "none"), ("stdit2", "none"), ("stdit3", "full")):
        case, results = Case(3, given=(1,), network=network), []
        for cut in (True, False):
            model = make_model(network=network)
            model.activation_checkpointing = checkpointing
            if cut:
                how = ShardConfig(tensor_parallel_process_group=group(), enable_tensor_parallelism=True)
                ShardFormer(how).optimize(model, TensorPolicy())
            arguments, kwargs, expected = make_inputs(case)
            out = model(*arguments, **kwargs)
            (out * expected).sum().backward()
            found = {"output": out.detach(), **gradients(model, average=False)}
            for name, how_cut in tensor_cuts(model).items():
                pieces = [torch.empty_like(found[name]) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, found[name].contiguous())
                found[name] = how_cut.join(pieces)
            results.append(found)
        errors[network] = worst(*results)
    return errors


def check_counts() -> Errors:
    """The benchmark's counts of both sides are its formulas'."""
    size, sizes = dist.get_world_size(), collectives.Sizes(T=4, height=8, width=8, D=32, depth=2, heads=4)
    assert collectives.count_phases(collectives.our_step(sizes, group())) == collectives.our_formula(sizes, size)
    of_pairs = collectives.our_step(sizes, group(), "STDiT3")
    assert collectives.count_phases(of_pairs) == collectives.our_formula(sizes, size)
    everywhere = collectives.count_phases(collectives.everywhere_step(sizes, group()))
    assert everywhere == collectives.everywhere_formula(sizes, size)
    return {}


def check_refusals() -> Errors:
    """Each is one line for the user, and no rank is left waiting."""
    arguments, _, _ = make_inputs(Case(4))
    pixart = make_model(temporal_attention=False)
    assert _refusal(lambda: apply_sequence_parallelism(pixart, group())).startswith(
        f"parallel.sp_size={dist.get_world_size()} needs model.temporal_attention=true: "
    )
    assert "FrameParallel needs" in _refusal(lambda: FrameParallel(make_model(), group(), 1))
    model = make_model()
    apply_sequence_parallelism(model, group())
    assert "that FrameParallel did not give it" in _refusal(lambda: model(*arguments))
    return {}


def check_group_of_one() -> Errors:
    """Nothing is replaced, and the call is the model's own."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = make_model()
    arguments, kwargs, _ = make_inputs(Case(5, first_frame=2))
    apply_sequence_parallelism(model, alone)
    assert not any(isinstance(module, SequenceParallelAttention) for module in model.modules())
    assert torch.equal(FrameParallel(model, alone, 1)(*arguments, **kwargs), model(*arguments, **kwargs))
    return {}


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except EngineError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was refused")


CHECKS: dict[str, Callable[[], Errors]] = {
    "float32": check_float32,
    "two forwards": check_two_forwards,
    "autocast": check_autocast,
    "sampling": check_sampling,
    "data parallel": check_data_parallel,
    "replaced projections": check_replaced_projections,
    "tensor parallel": check_tensor_parallel,
    "counts": check_counts,
    "refusals": check_refusals,
    "group of one": check_group_of_one,
}


# ---------------------------------------------------------------------------------------------------------------------
# The processes


def run_checks(size: int, folder: Path, seconds: float = 200) -> dict[str, Any]:
    """Run all checks on `size` processes: each check's errors, the worst of any rank, or what it raised, as a str."""
    folder.mkdir(parents=True)
    workers = [forked.Process(target=_work, args=(rank, size, str(folder)), daemon=True) for rank in range(size)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.exitcode is None:
            worker.kill()
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    assert len(ranks) == size, f"only {len(ranks)} of {size} processes came to an end"
    merged: dict[str, Any] = {}
    for check in CHECKS:
        found = [rank.get(check, "not reached") for rank in ranks]
        told = next((errors for errors in found if isinstance(errors, str)), None)
        merged[check] = told or {name: max(errors[name] for errors in found) for name in found[0]}
    return merged


def _work(rank: int, size: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    results: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            results[name] = check()
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other ranks may wait for what this one did not send
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
