"""Which cut of the activation transform is fastest: `python -m benchmarks.studies.transform_study`, on a GPU, under a minute.

Every variant is compared with the oracle first; then microseconds of a launch in a CUDA graph (median of 20 replays of 200 launches), next
to an empty kernel and a plain RMSNorm of the same kind.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from benchmarks.rms_norm import rms_norm
from qpc.kernels import reference, transform_hopper
from qpc.kernels.operand import pack_operand, projections, unpack_operand
from qpc.kernels.transform import Norm, Plan, transform
from qpc.kernels.transform_hopper import Cut

BATCHES = (1, 4, 8)
LAUNCHES = 200
REPLAYS = 20
EPS = 1e-5

PLAIN = [
    *(Plan(4, 1024, 1, 4), Plan(1, 4096, 1, 8, True), Plan(1, 4096, 1, 16, True)),
    *(Plan(28, 512, 1, 4), Plan(36, 16, 64, 4), Plan(12, 128, 4, 4)),
]
LAYOUTS = [
    *(Cut(4, 1024, 1, 4), Cut(8, 512, 1, 2), Cut(8, 512, 2, 4), Cut(16, 256, 4, 2), Cut(16, 256, 1, 1)),
    *(Cut(28, 512, 2, 4), Cut(28, 512, 1, 2), Cut(28, 512, 4, 4), Cut(28, 1024, 1, 4)),
    *(Cut(16, 1024, 1, 4), Cut(28, 1024, 4, 8), Cut(12, 128, 2, 2), Cut(12, 128, 1, 1)),
]
NORMED = [Plan(4, 1024, 1, 4), Cut(4, 1024, 1, 4), Cut(8, 512, 1, 2), Cut(8, 512, 2, 4), Cut(12, 128, 1, 1)]


@triton.jit
def _empty_kernel(x):
    pass


def microseconds(launch: Callable[[], object]) -> float:
    """Median time of one launch in a graph of LAUNCHES."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(LAUNCHES):
                launch()
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(times)


def inputs(features: int, batch: int, normed: bool) -> tuple[Tensor, Tensor, Norm | None]:
    """Random activations with a spike, signs, and perhaps a norm."""
    generator = torch.Generator("cuda").manual_seed(features)
    x = torch.randn(batch, features, generator=generator, device="cuda")
    x[:, 5] *= 100
    signs = torch.randint(0, 256, (-(-features // 8),), generator=generator, dtype=torch.uint8, device="cuda")
    weight, residual = (torch.randn(n, generator=generator, device="cuda").bfloat16() for n in ((features,), (batch, features)))
    return x.bfloat16(), signs, Norm(weight, EPS, 0.0, residual) if normed else None


def expected(x: Tensor, signs: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The hidden sum, and the rotated values in float64."""
    if norm is None:
        return x, reference.rotate(x.double(), signs, x.shape[1])
    assert norm.residual is not None
    hidden = (x.float() + norm.residual.float()).to(x.dtype)
    wide = hidden.double()
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + norm.eps) * (norm.weight.double() + norm.offset)
    return hidden, reference.rotate(wide, signs, x.shape[1])


def verdict(cut: Plan | Cut, normed: bool) -> str:
    """Largest error in steps of the scale (exact rounding: 0.5), and the scale over that of the peak."""
    x, signs, norm = inputs(cut.outer * cut.power, 3, normed)
    words, scales, hidden = run(x, signs, norm, cut)
    hidden_expected, rotated = expected(x, signs, norm)
    error = ((unpack_operand(words, scales) - projections(rotated)).abs() / scales.double()[:, None, None]).max()
    right = error < 0.6 and torch.equal(hidden, hidden_expected)
    return f"{'ok' if right else 'WRONG'} {float(error):.3f} x{float((scales / pack_operand(rotated)[1]).max()):.1f}"


def run(x: Tensor, signs: Tensor, norm: Norm | None, cut: Plan | Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and hidden sum."""
    if isinstance(cut, Plan):
        return transform(x, signs, x.shape[1], norm, cut)
    return transform_hopper.transform(x, signs, norm, cut)


def row(cut: Plan | Cut, normed: bool) -> None:
    """Print a line of the table."""
    began = time.perf_counter()
    name = f"{type(cut).__name__:4} {cut.outer:3} x {cut.power:4} m{cut.members} w{cut.warps}"
    try:
        check, cells = verdict(cut, normed), []
        for batch in BATCHES:
            x, signs, norm = inputs(cut.outer * cut.power, batch, normed)
            cells.append(f"{microseconds(lambda: run(x, signs, norm, cut)):6.2f}")  # noqa: B023
        chosen = "chosen" if cut == transform_hopper.cut(cut.outer * cut.power, cut.outer * cut.power, normed) else ""
        print(f"{cut.outer * cut.power:6} {'norm' if normed else '':4} {name:22} {' '.join(cells):21} {chosen:6} {check}"
              f"  ({time.perf_counter() - began:.1f} s)", flush=True)  # fmt: skip
    except Exception as error:
        print(f"{name} FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)


def norm_microseconds(features: int, batch: int, warps: int) -> float:
    """Time of RMSNorm with a residual."""
    x, _, norm = inputs(features, batch, True)
    assert norm is not None
    return microseconds(lambda: rms_norm(x, norm.residual, norm.weight, EPS, warps))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="one number of features")
    only = parser.parse_args().only
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, f"batches {BATCHES}")
    x = torch.empty(1, device="cuda")
    print(f"empty kernel {microseconds(lambda: _empty_kernel[(1,)](x, num_warps=4)):.2f}")
    for features in (4096, 14336):
        for warps in (4, 8, 16):
            cells = [f"{norm_microseconds(features, batch, warps):6.2f}" for batch in BATCHES]
            print(f"{features:6} RMSNorm with residual, w{warps}: {' '.join(cells)}", flush=True)
    for normed, cuts in ((False, [*LAYOUTS, *PLAIN]), (True, NORMED)):
        for cut in cuts:
            if only in (None, cut.outer * cut.power):
                row(cut, normed)


if __name__ == "__main__":
    main()
