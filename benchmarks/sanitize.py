"""A few steps of every rule, grouping and dtype on a GPU, small enough for compute-sanitizer (see device.sh).

    python benchmarks/sanitize.py [PART PARTS]      all cases, or every PARTS-th from case PART on

Shapes and layouts are those where kernels go wrong: odd lengths, misaligned views, many tiny tensors, a group larger
than shared memory, channels_last, masks. The result is compared with the reference on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from contestants import OURS, PENALTIES, takes
from torch import Tensor

import bregman_cuda as bc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(7, 5), (33, 65), (16, 8, 3, 3), (2, 40000), (3000, 3), (1, 1), (0, 4), *[(2, 4)] * 20]


def parameters(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """The same random parameters with gradients on any device; one is misaligned, one channels_last."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    tensors[1] = torch.randn(33 * 65 + 1).to(device, dtype)[1:].view(33, 65)
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    params = [torch.nn.Parameter(t) for t in tensors]
    for p, shape in zip(params, SHAPES, strict=True):
        p.grad = torch.empty_like(p).copy_(torch.randn(shape))
    return params


def steps(new: Any, reg: Any, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """The parameters after two steps, on the CPU: by kernels, or by the reference."""
    params = parameters(dtype, DEVICE if fused else "cpu")
    optimizer = new([{"params": params, "reg": reg()}], fused=fused, count_nonzeros=True)
    optimizer.set_mask(params[0], torch.arange(params[0].numel()).view(SHAPES[0]) % 3 > 0)
    for _ in range(2):
        optimizer.step()
    return [p.detach().cpu() for p in params]


def main() -> int:
    wrong = 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", type=int, nargs="?", default=0)
    parser.add_argument("parts", type=int, nargs="?", default=1)
    args = parser.parse_args()
    part, parts = args.part, args.parts
    if not 0 <= part < parts:
        parser.error(f"PART must be from 0 to PARTS - 1 = {parts - 1}, got {part}")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    cases = itertools.product(OURS.items(), PENALTIES.items(), dtypes)
    known = [case for case in cases if takes(case[0][0], case[1][0])]
    shared = [(title, OURS[title]) for title in ("ProxSGD", "HSPG")]
    known += itertools.product(shared, [("envelope", lambda: bc.GroupEnvelope(1e-2, k=1))], dtypes)
    for (title, new), (penalty, reg), dtype in known[part::parts]:
        # The order of a sum over a group is the kernel's own.
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
        for a, b in zip(steps(new, reg, dtype, True), steps(new, reg, dtype, False), strict=True):
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
                wrong += 1
                print(f"{title}, {penalty}, {dtype}, {tuple(a.shape)}: off by {(a - b).abs().max():.3g}")
    print(f"{DEVICE}, part {part} of {parts}, bregman_cuda {bc.build_info()['version']}: {wrong} tensors differ")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
