"""Compile every kernel for an H100, as a training of XL/2 would launch it, on a machine that need not have one.

    python -m tests.kernel_compile CACHE

Prints each kernel's name and whether it reads and writes several elements at once ("wide").
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **options: Any) -> None:
    """In place of a launch: compile for what would have been launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    signature, constants, known = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        multiple = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if multiple:
            known[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, known)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    code = found.asm["ptx"]
    loads = "ld.global.v4" in code or "cp.async.cg.shared.global" in code  # which are of 16 bytes
    wide = loads and ("st.global.v4" in code or "st.global.v2" in code)
    print(f"{kernel.__module__.rsplit('.', 1)[1]}.{kernel.__name__}", "wide" if wide else "narrow", flush=True)


def launch_all() -> None:
    from opensora_repro.kernels import ops

    B, T, S, D, H = 1, 4, 16, 1152, 16

    def make(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype).requires_grad_()

    x, y = make(torch.float32, B, T, S, D), make(torch.bfloat16, B, T, S, D)
    shift, scale, gate = (make(torch.float32, B, 1, 1, D) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        total, normed = ops.residual_norm_modulate(x, gate, y, shift, scale, 1e-6)
        (total.sum() + normed.sum()).backward()
        ops.gate_residual(x, gate, y).sum().backward()
        ops.bias_gelu(make(torch.bfloat16, T * S, 4 * D), make(torch.float32, 4 * D)).sum().backward()
        ops.time_attention(make(torch.bfloat16, B, T, S, 3 * D), H).sum().backward()
    params = [torch.empty(1 << 16)]
    ops.adamw(
        params, params, params, params, [torch.ones(())], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        averages=params, average_weight=0.1,
    )  # fmt: skip


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
    from triton.runtime.jit import JITFunction

    from opensora_repro.kernels import ops

    JITFunction.run = compile_launch
    ops.interpreted = lambda: True  # the dispatcher may take the kernels for a CPU's tensors
    ops.choose("triton", "cpu")
    launch_all()


if __name__ == "__main__":
    main()
