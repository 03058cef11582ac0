"""Load weights of every family of models: ours, and every published layout.

What a file may lack or carry too much is an explicit list (families.py); anything else stops with one line, so that
nobody trains from noise by accident.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_repro.models.config import ModelConfig
from opensora_repro.run_folder import STATE_FILE
from opensora_repro.weights.families import (
    Network,
    empty_model,
    families_of,
    family_of,
    fits,
    recognise,
    start_of,
)
from opensora_repro.weights.files import (
    NULL_CAPTION,
    TABLES,
    WeightsError,
    WeightsFile,
    check_tensors,
    open_weights,
    recorded_sha256,
    release,
    strip_wrappers,
)
from opensora_repro.weights.initial import fill_initial
from opensora_repro.weights.insertion import inflate
from opensora_repro.weights.layouts import KERNEL, Layout, Trained

SHOWN = 3  # keys named on each side of a mismatch


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, what kept an initial value, and what of the file was not used."""

    source: str
    layout: str  # whose layout it is, in words
    container: str
    wrapper: str  # the keys that held the weights, as "module.state_dict"; empty: none
    notes: tuple[str, ...]  # what was taken off the names or left out, in words
    loaded: tuple[str, ...]
    inserted: tuple[str, ...]  # what the file does not have: temporal attention, a null caption; they begin anew
    dropped: tuple[str, ...]  # position tables, which follow from the config
    num_parameters: int  # elements loaded
    dtype: str  # in the file
    positions: str  # how positions are counted here and were when the file was made
    files: tuple[str, ...]  # all that were opened; none for a state dict

    @property
    def lacks_null_caption(self) -> bool:
        return NULL_CAPTION in self.inserted

    @property
    def inserted_temporal_attention(self) -> bool:
        return inserts_temporal_attention(self.inserted)

    def __str__(self) -> str:
        wrapper = f" under {self.wrapper!r}" if self.wrapper else ""
        parts = [
            f"{self.source}: {self.layout} weights{wrapper}, {len(self.loaded)} tensors loaded "
            f"({self.num_parameters:,} elements, {self.dtype})"
        ]
        parts += self.notes
        temporal = sum(".attn_temp." in key for key in self.inserted)
        others = [key for key in self.inserted if key != NULL_CAPTION]
        if temporal and temporal == len(others):
            parts.append(f"temporal attention inserted at zero ({temporal} tensors)")
        elif others:
            parts.append(f"what the model has besides begins anew ({_counted(others)})")
        if self.lacks_null_caption:
            parts.append("no null caption in them: the empty text is encoded instead")
        if self.dropped:
            parts.append(f"{' and '.join(self.dropped)} not used: {self.positions}")
        return ", ".join(parts)


def load_model_weights(
    model: Network, source: str | Path | Mapping[str, Any] | WeightsFile, *, ema: bool = True
) -> LoadReport:
    """Copy weights into `model`; PixArt weights in an STDiT insert the temporal attention at zero.

    `source` is a state dict, or whatever `open_weights` opens. `ema` prefers averaged weights. A model on the meta
    device comes to the CPU without an initialisation that would be overwritten; what the file lacks is then drawn from
    torch's seed. Raises WeightsError, also for tensors that are not finite and for a checkpoint's file that is no
    longer what was written; the model is unchanged then (one on the meta device: of no use).
    """
    if isinstance(source, Mapping):
        file = strip_wrappers(WeightsFile(Path("state dict"), "memory", "", dict(source)), ema=ema)
        check_tensors(file)
    else:
        file = source if isinstance(source, WeightsFile) else open_weights(source, ema=ema)
    where = str(file.path)
    layout = recognise(file.tensors, where)
    weights, tables, notes = _as_needed(model, layout, file)
    _check_heads(model, file, where)
    inserted = _check_fit(model, layout, weights, where)
    check_recorded(file)
    if not _fill(model, weights, inserted, from_map=file.mapped and file.container != "memory"):
        raise _not_finite(file)
    return LoadReport(
        source=where,
        layout=layout.title,
        container=file.container,
        wrapper=file.wrapper,
        notes=notes,
        loaded=tuple(weights),
        inserted=tuple(inserted),
        dropped=tuple(tables),
        num_parameters=num_elements(weights),
        dtype=dtype_name(weights),
        positions=_positions(model, trained_at(tables)),
        files=tuple(map(str, file.files)),
    )


def inserts_temporal_attention(inserted: Sequence[str]) -> bool:
    """Whether such keys make a video model of an image model."""
    return any(".attn_temp.qkv." in key or key.startswith("temporal_blocks.") for key in inserted)


def _counted(keys: Sequence[str]) -> str:
    """How many tensors of each module there are."""
    counts = Counter(key.split(".")[0] for key in keys)
    return ", ".join(f"{count} of {module}" for module, count in counts.items())


def check_complete(file: WeightsFile, cfg: ModelConfig) -> list[str]:
    """Raise WeightsError unless `file` has what loading it into the model `cfg` needs, in shape, and nothing else.

    Returns the keys that loading would insert.
    """
    model = empty_model(cfg)
    where = str(file.path)
    layout = recognise(file.tensors, where)
    _check_heads(model, file, where)
    return _check_fit(model, layout, _as_needed(model, layout, file)[0], where)


def _as_needed(model: Network, layout: Layout, file: WeightsFile) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """(weights under our keys, position tables that are not used, notes); patches of one frame inflated to several."""
    weights, tables = to_ours(layout, file.tensors, str(file.path))
    frames, notes = model.cfg.patch_size[0], file.notes
    start = start_of(layout, family_of(model.cfg))
    if start is not None:
        for old, new in start.renames.items():
            weights = {key.replace(old, new, 1) if key.startswith(old) else key: x for key, x in weights.items()}
        null, length = weights.get(NULL_CAPTION), getattr(model.cfg, "model_max_length", 0)
        if start.fits_captions and null is not None and null.ndim == 2 and len(null) not in (0, length):
            weights[NULL_CAPTION] = torch.cat([null[:length], null[-1:].expand(max(0, length - len(null)), -1)])
            notes += (f"null caption of {len(null)} tokens brought to {length} (model.model_max_length)",)
    if (
        frames > 1
        and KERNEL in weights
        and weights[KERNEL].shape[2] == 1
        and not inserts_temporal_attention([*weights])
    ):
        weights = inflate(weights, frames)
        notes += (f"patches of one frame inflated to {frames} (model.patch_size)",)
    return weights, tables, notes


def check_recorded(file: WeightsFile) -> None:
    """Raise WeightsError for a checkpoint's file that is no longer what was written."""
    for path in file.files:
        if (path.parent / STATE_FILE).is_file():
            recorded_sha256(path)


def check_finite(file: WeightsFile, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightsError where the file's weights hold a value that is not finite."""
    if not all(map(all_finite, weights.values())):
        raise _not_finite(file)


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it. A finite sum tells at a fraction of the price."""
    if tensor.element_size() == 1:  # of eight bits, which torch does not add up
        tensor = tensor.float()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _not_finite(file: WeightsFile) -> WeightsError:
    """Names the first such tensor as the file does."""
    bad = [key for key, value in file.tensors.items() if not all_finite(value)]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return WeightsError(
        f"{file.path}: {bad[0] if bad else 'a tensor'}{more} holds values that are not finite (NaN or infinite): "
        "nothing can be made of them; take weights from before they were"
    )


def _fill(model: Network, weights: Mapping[str, Tensor], inserted: list[str], *, from_map: bool) -> bool:
    """Copy tensor by tensor, so that few of them are in memory twice, and give what the file lacks its first value.

    False where some are not finite; a model that has weights already keeps them then.
    """
    fresh = next(model.parameters()).is_meta
    if fresh:  # to_empty() does so, too, and imports a compiler
        room = {key: torch.empty(value.shape, dtype=value.dtype) for key, value in model.state_dict().items()}
        model.load_state_dict(room, assign=True)
    elif not all(map(all_finite, weights.values())):
        return False
    own = model.state_dict()

    @torch.no_grad()
    def copy(key: str) -> bool:
        own[key].copy_(weights[key])
        if from_map:
            release(weights[key])
        return not fresh or all_finite(own[key])  # just written, so that looking at it costs little

    @torch.no_grad()
    def start(key: str) -> bool:
        """As in a new model; the same whatever else is drawn before or beside."""
        if fresh or not key.endswith(".attn_temp.qkv.weight"):
            fill_initial(model, key, own[key], (torch.initial_seed(), names.index(key)))
        return True

    names = list(own)
    return all(_side_by_side([partial(copy if key in weights else start, key) for key in names]))


def _side_by_side(jobs: Sequence[Callable[[], bool]]) -> list[bool]:
    """Run jobs on as many threads as torch uses, each of one thread: copying and drawing would wait for each other."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [done.result() for done in [pool.submit(job) for job in jobs]]
    finally:
        torch.set_num_threads(threads)


def _check_heads(model: Network, file: WeightsFile, where: str) -> None:
    """Shapes do not tell the number of heads; what comes with the file may."""
    heads = file.facts.get("num_heads", model.cfg.num_heads)
    if heads != model.cfg.num_heads:
        raise WeightsError(
            f"{where}: made with {heads} attention heads, the model has {model.cfg.num_heads}: "
            f"set model.num_heads={heads}"
        )


def _check_fit(model: Network, layout: Layout, weights: Mapping[str, Tensor], where: str) -> list[str]:
    """Return the keys that the file lacks and may lack; raise WeightsError at any other difference."""
    expected = {key: value.shape for key, value in model.state_dict().items()}
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    other = [key for key in expected if key in weights and weights[key].shape != expected[key]]
    family = family_of(model.cfg)
    fitting, start = fits(layout, family), start_of(layout, family)
    if fitting and not extra and not other:
        anew = set(matching(expected, start.lacks)) if start is not None else set()  # all of them or none
        rest = set(missing) - anew
        if rest == set(matching(rest, layout.lacks)) and (anew <= set(missing) or not anew & set(missing)):
            return missing
    share = 100 * (len(expected) - len(missing) - len(other)) / len(expected)
    parts = [f"{layout.title} weights, {share:.1f} % of the model's {len(expected)} tensors found"]
    if not fitting:
        parts.append(f"they are a {' or '.join(families_of(layout))} model's, this is a {family.name}")
    if other:
        parts.append(f"{len(other)} shapes differ ({_shapes(other[0], weights[other[0]].shape, expected[other[0]])})")
    if missing:
        parts.append(f"{len(missing)} are missing (first {', '.join(missing[:SHOWN])})")
    if extra:
        parts.append(f"{len(extra)} are unknown (first {', '.join(extra[:SHOWN])})")
    raise WeightsError(f"{where} does not fit the model: {'; '.join(parts)}{_advice(model, layout, weights)}")


def _shapes(key: str, there: torch.Size, here: torch.Size) -> str:
    transposed = ", transposed" if list(there) == list(here)[::-1] else ""
    return f"first {key}: {list(there)} there, {list(here)} in the model{transposed}"


def _advice(model: Network, layout: Layout, weights: Mapping[str, Tensor]) -> str:
    """Name the config keys under which the weights would fit, or say that they are another model's."""
    family = family_of(model.cfg)
    related = fits(layout, family) or any(other.network is family.network for other in families_of(layout).values())
    if not related:
        return f"; {layout.title} weights fit no {family.name} model"
    try:
        facts = family.facts(weights)
    except ValueError:
        return ""
    changes = [f"model.{key}={_value(value)}" for key, value in facts.items() if value != getattr(model.cfg, key)]
    return f"; the weights were made with {', '.join(changes)}" if changes else ""


def _value(value: Any) -> str:
    """As a config file and the command line have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _positions(model: Network, trained: Trained) -> str:
    """What a reader of the report must know of positions: they follow from the config, not from the file."""
    if not any(field.name == "space_scale" for field in fields(model.cfg)):
        return "positions follow from the size of the sample"
    here = f"positions are index / {model.cfg.space_scale:.4g}"
    if trained.space_scale is None:
        return f"{here} (model.space_scale)"
    return f"{here} (model.space_scale), in the file index / {trained.space_scale:.4g} at {trained}"


def to_ours(layout: Layout, tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under our keys, position tables that are not used). Raises WeightsError."""
    weights = dict(tensors)
    try:
        if layout.to_ours is not None:
            beside = {key: weights.pop(key) for key in (NULL_CAPTION,) if key in weights}
            weights = layout.to_ours(weights) | beside
    except (KeyError, ValueError, RuntimeError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise WeightsError(f"{where}: not whole {layout.title} weights: {reason}") from None
    kernel = weights.get(KERNEL)
    if kernel is not None and kernel.ndim == 4:  # an image model's patches have no frame axis
        weights[KERNEL] = kernel.unsqueeze(2)
    tables = {key: weights.pop(key) for key in TABLES if key in weights}
    other = next((key for key, value in weights.items() if not value.is_floating_point()), None)
    if other is not None:
        raise WeightsError(
            f"{where}: {other} holds {str(weights[other].dtype).removeprefix('torch.')}, expected floating-point "
            "numbers: take the weights that these quantised ones were made of"
        )
    return weights, tables


def matching(keys: Iterable[str], patterns: Iterable[str]) -> list[str]:
    whole = [re.compile(pattern) for pattern in patterns]
    return [key for key in keys if any(pattern.fullmatch(key) for pattern in whole)]


def trained_at(tables: Mapping[str, Tensor]) -> Trained:
    """Read the sizes and scales off stored position tables ([1, S, D] sines and cosines of index / scale)."""
    whole = {key: table for key, table in tables.items() if table.ndim == 3}
    spatial = next((whole[key] for key in ("pos_embed", "pos_embed_spatial") if key in whole), None)
    temporal = next((whole[key] for key in ("pos_embed_temporal", "temp_embed") if key in whole), None)
    places = None if spatial is None else spatial.shape[1]
    side = math.isqrt(places) if places else 0
    return Trained(
        rows=side if places and side * side == places else None,
        places=places,
        frames=None if temporal is None else temporal.shape[1],
        space_scale=None if spatial is None else _scale(spatial[0], spatial.shape[2] // 2),
        time_scale=None if temporal is None else _scale(temporal[0], temporal.shape[2]),
    )


def _scale(table: Tensor, width: int) -> float | None:
    """The scale of index / scale, read off one axis's [sin | cos], the first `width` channels of the table's row 1."""
    half = width // 2
    if len(table) < 2 or half < 1:
        return None
    slow = round(half * math.log(64, 10000))  # turns once in some 400 positions: neither wraps nor drowns in rounding
    angle = math.atan2(float(table[1, slow]), float(table[1, half + slow]))
    if not math.isfinite(angle):
        return None
    position = Fraction(angle * 10000 ** (slow / half)).limit_denominator(64)
    return float(1 / position) if position > 0 else None


def num_elements(weights: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())


def dtype_name(weights: Mapping[str, Tensor]) -> str:
    """The dtype that most elements have, and that there are others."""
    counts: dict[torch.dtype, int] = {}
    for value in weights.values():
        counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    most = max(counts, key=lambda dtype: counts[dtype])
    return str(most).removeprefix("torch.") + (" and others" if len(counts) > 1 else "")
