"""Take off what training puts around weights: dicts that hold them, and words before, or within, their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opensora_repro.errors import UserError

NULL_CAPTION = "y_embedder.y_embedding"
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "temp_embed")
BUFFERS = (NULL_CAPTION, *TABLES)  # not trained, so that an average of parameters leaves them out

# Keys of dicts that hold the weights, averaged ones first
EMA_HOLDERS = ("state_dict_ema", "ema", "ema_model", "model_ema", "ema_state_dict")
HOLDERS = ("state_dict", "model", "module", "model_state_dict")
# Words that wrapping modules put into names. Those of the first line stand anywhere and are no model's own: compiled,
# FSDP (also as of old), checkpointed, Lightning's. The others come first alone: data parallel, a trainer's, averages.
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")
OUTER = ("module", "model", "online_model")
EMA_OUTER = ("ema_model", "model_ema", "ema")
COUNTERS = ("initted", "step", "n_averaged", "num_updates", "decay")  # that averaging modules keep beside the weights


class NameClash(UserError):
    """Two tensors of one copy of the weights would have one name; the message is one line."""


def take_out(content: Mapping[Any, Any], *, ema: bool) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The weights in nested dicts, and the keys that led to them, outermost first.

    `ema` prefers averaged weights where both are there; they take what is not averaged from the others.
    """
    first, second = (EMA_HOLDERS, HOLDERS) if ema else (HOLDERS, EMA_HOLDERS)
    held = {key: content[key] for key in (*first, *second) if _holds(content.get(key))}
    if not held:
        return dict(content), ()
    key = next(iter(held))
    tensors, inner = take_out(held[key], ema=ema)
    if key in EMA_HOLDERS:
        names = {_bare(str(name))[0] for name in tensors}
        for holder in HOLDERS:
            others = take_out(held[holder], ema=False)[0] if holder in held else {}
            bare = {_bare(str(name))[0]: value for name, value in others.items()}
            tensors |= {name: bare[name] for name in BUFFERS if name in bare and name not in names}
    return tensors, (key, *inner)


def _holds(value: Any) -> bool:
    """Whether there are tensors in it, at whatever depth."""
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) or _holds(item) for item in value.values())


def strip_names(tensors: Mapping[Any, Any], *, ema: bool) -> tuple[dict[str, Any], list[str]]:
    """The weights under the model's own names, and what to tell the user of it.

    Where a file has the trained and the averaged weights side by side, `ema` chooses; what that copy lacks (buffers,
    and parameters that were not trained) comes from the other. Raises NameClash.
    """
    copies: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    origin: dict[tuple[bool, str], str] = {}
    words: dict[str, None] = {}
    for key, value in tensors.items():
        name, taken = _bare(str(key))
        averaged = any(word in EMA_OUTER for word in taken)
        if name in copies[averaged]:
            raise NameClash(f"{origin[averaged, name]} and {key} are both {name}, once wrappers' words are taken off")
        copies[averaged][name], origin[averaged, name] = value, str(key)
        words |= dict.fromkeys(taken)
    if not words:
        return copies[False], []
    notes = [f"{' and '.join(f'{word}.' for word in words)} taken off the names"]
    counters = _drop_counters(copies)
    if counters:
        notes.append(f"{' and '.join(counters)} left out (no weights)")
    if not copies[True] or not copies[False]:
        return copies[True] or copies[False], notes
    chosen, other = copies[ema], copies[not ema]
    filled = {name: value for name, value in other.items() if name not in chosen}
    kind, rest = ("averaged", "trained") if ema else ("trained", "averaged")
    notes.append(f"the {kind} of two copies taken" + (f", {len(filled)} tensors of the {rest} one" if filled else ""))
    return {**chosen, **filled}, notes


def _bare(name: str) -> tuple[str, list[str]]:
    """The name without wrappers' words, and these."""
    own: list[str] = []
    words: list[str] = []
    for part in name.split("."):
        wraps = part in INNER or (not own and part in (*OUTER, *EMA_OUTER))
        (words if wraps else own).append(part)
    return (".".join(own), words) if own else (name, [])


def _drop_counters(copies: Mapping[bool, dict[str, Any]]) -> list[str]:
    found = []
    for copy in copies.values():
        for name in COUNTERS:
            if isinstance(copy.get(name), Tensor) and copy[name].numel() == 1:
                del copy[name]
                found.append(name)
    return found
