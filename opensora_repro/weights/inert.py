"""What training scripts pickle beside the tensors: arguments, paths, numbers of numpy. Read as data, never as classes.

`torch.load(weights_only=True)` knows tensors and plain containers alone. For the few classes that public files hold
besides, it is given stand-ins under their names, which keep what the pickle says and do nothing: neither the class is
imported nor any code of it run. A pickle that asks for anything else is refused as before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMPY = ("scalar", "_reconstruct")
# Module: classes and functions. The types of `builtins` are what OmegaConf notes of its values.
OBJECTS = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13's name for it
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": _NUMPY,
    "numpy._core.multiarray": _NUMPY,  # numpy 2's name for it
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "PathNode", "StringNode"),
    "typing": ("Any",),
    "builtins": ("bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "time": ("struct_time",),
    "ml_collections.config_dict.config_dict": ("ConfigDict", "FieldReference"),
}
DICTS = {
    "addict.addict": ("Dict",),
    "easydict": ("EasyDict",),
    "mmcv.utils.config": ("ConfigDict",),
    "mmengine.config.config": ("ConfigDict",),
    "yacs.config": ("CfgNode",),
}


def _default_dict(*factory: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


class _Inert:
    """Keeps what it was made of."""

    content: tuple[Any, ...]
    state: Any

    def __new__(cls, *content: Any) -> _Inert:
        self = super().__new__(cls)
        self.content, self.state = content, None
        return self

    def __init__(self, *content: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_ins() -> list[Any]:
    """As torch looks them up: by module and name, or, since 2.6, beside a name; before that, dicts are refused."""
    objects: list[Any] = [
        type(name, (_Inert,), {"__module__": module, "__qualname__": name})
        for module, names in OBJECTS.items()
        for name in names
    ]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        return objects
    dicts = [(OrderedDict, f"{module}.{name}") for module, names in DICTS.items() for name in names]
    return [*objects, *dicts, (_default_dict, "collections.defaultdict")]


_STAND_INS = _stand_ins()


@contextmanager
def inert_containers() -> Iterator[None]:
    """Within it torch reads the classes above as stand-ins."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(_STAND_INS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
