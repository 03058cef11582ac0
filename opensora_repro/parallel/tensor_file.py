"""A safetensors file that several processes fill together: the header first, then each tensor by one of them.

The format is eight bytes for the header's length, the header in JSON with every tensor's place, and the tensors' bytes
end to end; so processes that share a file system need not send each other what one of them is to write.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """The layout of one file; every process makes the same from the same dtypes and shapes."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        self.path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        end = 0
        # Wide numbers first, so that every tensor begins at a multiple of its element's size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            self._places[name] = begin
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end

    def create(self) -> None:
        """Write the header and reserve the rest. Raises OSError."""
        with open(self.path, "wb") as file:
            file.write(self._header)
            file.truncate(self._size)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write some of the tensors (on the CPU) to their places, to the disk. Raises OSError."""
        with open(self.path, "r+b", buffering=0) as file:
            for name, tensor in tensors.items():
                file.seek(len(self._header) + self._places[name])
                data = memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
                while data:  # one call writes 2 GiB at most
                    data = data[file.write(data) :]
            os.fsync(file.fileno())
