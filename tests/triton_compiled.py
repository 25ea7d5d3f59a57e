"""Compiles every Triton kernel for NVIDIA GPUs on a machine without one, and prints what each needs, a JSON line a kernel.

    python tests/triton_compiled.py [80 90 … float16 bfloat16 …]

The library's own launches run on CPU tensors at Llama sizes, with a driver that compiles (triton's own ptxas) and starts
nothing; their results are not read. `shared` is bytes of shared memory a program, `spills` bytes a thread that do not fit in its registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from veneer.kernels.nf4_low_rank import Packed
from veneer.kernels.triton import grouped_low_rank, launch, nf4_low_rank, scale_rotate


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Any]]]:
    """A GPU of this capability takes the place of the driver; gives what was compiled."""
    made: list[tuple[str, Any]] = []
    target = SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not other for _, other in made):
            made.append((self.__name__, kernel))
        return kernel

    triton.runtime.driver.set_active(target)
    JITFunction.run = compiled
    try:
        yield made
    finally:
        JITFunction.run = run


def needs(kernel: Any) -> dict[str, int]:
    """Registers a thread, bytes of its stack (what does not fit in them) and shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", said)}
    return {"registers": found["REG"], "spills": found["STACK"], "shared": kernel.metadata.shared}


def everything(dtype: torch.dtype) -> None:
    """Every launch, forward and backward: training and decoding sizes, one rank and mixed ones, both packings of scales."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).requires_grad_()

    for batch, tokens, ranks in ((8, 128, (16, 16)), (8, 1, (4, 16, 64)), (2, 100, (1, 100))):
        x, y = draw(batch, tokens, 1024, dtype=dtype), draw(batch, tokens, 1376, dtype=dtype)
        rows = [torch.arange(i, batch, len(ranks) + 1) for i in range(len(ranks))]
        L, R = [draw(1376, r) for r in ranks], [draw(r, 1024) for r in ranks]
        grouped_low_rank.grouped_low_rank(y, x, L, R, rows).sum().backward()
    for shape in ((4, 128, 1024), (3, 1000)):
        h = draw(*shape, dtype=dtype)
        scale_rotate.scale(h, draw(shape[-1])).sum().backward()
        scale_rotate.scale(h, draw(shape[-1]), draw(shape[-1])).sum().backward()
        scale_rotate.rotate(h, draw(shape[-1] // 8, 1, 4), draw(shape[-1] // 8, 1, 4)).sum().backward()
    blocks = 1024 * 1376 // 64
    plain = Packed(torch.zeros(32 * blocks, dtype=torch.uint8), (1376, 1024), torch.zeros(16), 64, torch.zeros(blocks))
    nested = plain._replace(
        scales=torch.zeros(blocks, dtype=torch.uint8),
        code2=torch.zeros(256),
        scales2=torch.zeros(blocks // 256 + 1),
        offset=torch.zeros(()),
    )
    for W, rows_, r in ((plain, 1, 16), (nested, 16, 8), (nested, 64, 64), (plain, 64, 128)):
        x = draw(rows_, 1024, dtype=dtype)
        nf4_low_rank.nf4_low_rank(x, W, None if W is plain else torch.zeros(1376), draw(1376, r), draw(r, 1024)).sum().backward()


def main() -> None:
    assert not launch.INTERPRETED, "unset TRITON_INTERPRET"
    dtypes = [dtype for dtype in launch.TYPES if str(dtype).removeprefix("torch.") in sys.argv] or list(launch.TYPES)
    for capability in [int(word) for word in sys.argv[1:] if word.isdigit()] or [80, 90]:
        for dtype in dtypes:
            with compiling(capability) as made:
                everything(dtype)
            for name, kernel in made:
                print(json.dumps({"kernel": name, "dtype": str(dtype).removeprefix("torch."), "sm": capability, **needs(kernel)}))


if __name__ == "__main__":
    main()
