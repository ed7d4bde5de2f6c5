"""Comparisons of what makes and multiplies operands with its oracles, for `tests.kernels.cases`. Needs no test framework."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import activations, fused, operand_ops, reference, transform
from qpc.kernels.gate import Activation
from qpc.kernels.operand import PEAK, operand_rows, projections, unpack_operand
from qpc.kernels.transform import CREST, Gate, Norm
from qpc.quant.hadamard import block_size
from qpc.quant.layout import column_blocks
from qpc.quant.rotation import Rotation
from tests.kernels.packed import packed, poisoned
from tests.kernels.rounding import settled
from tests.kernels.tolerances import OPERAND_STEPS, assert_close

Check = Callable[[str], None]
EPS = 1e-5


class Front(Enum):
    """What lies in front of a rotation."""

    NOTHING = "rotate"
    NORM = "norm"
    ADD_NORM = "add and norm"
    SILU = "gate by silu"
    GELU_TANH = "gate by gelu_tanh"


GATES = {Front.SILU: Activation.SILU, Front.GELU_TANH: Activation.GELU_TANH}
FRONTS = tuple(front for front in Front if front is not Front.GELU_TANH)
"""One gated activation among them: the other takes the same way."""


@dataclass(frozen=True)
class OperandSizes:
    """How much is compared: every combination, and of `weights` each by itself.

    rotations: features and block. plain: features of one block, by the plain kernel wherever another is chosen. fronts: what lies in front
    of both. packed: features. weights: out_features, in_features, step bits of the parts.
    """

    rotations: tuple[tuple[int, int], ...] = ()
    plain: tuple[int, ...] = ()
    fronts: tuple[Front, ...] = FRONTS
    packed: tuple[int, ...] = ()
    weights: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    batches: tuple[int, ...] = (1, 2, 3, 5, 8, 13, 16)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


SMALL = (
    OperandSizes(
        rotations=((7, 1), (48, 12), (96, 32), (64, 64), (576, 576)), packed=(1, 50, 2100), batches=(1, 3), dtypes=(torch.float32,)
    ),
    OperandSizes(rotations=((64, 64), (96, 32)), fronts=tuple(GATES), batches=(1, 2), dtypes=(torch.float16,)),
)

WIDTHS = (128, 576, 1024, 1536, 2560, 4096, 5120, 8192, 14336, 16384, 28672)
"""Of one block each, by the kernel with explicit layouts where it has a cut for them."""

LARGE = (
    OperandSizes(
        rotations=(
            *((width, width) for width in (*WIDTHS, 9216, 12288)),
            *((width, block_size(width)) for width in (50, 11008)),
            (4096, 256),
        ),
        plain=(576, 4096, 14336),
        packed=(1, 37, 576, 14336),
        weights=(
            *((100, 1000, bits) for bits in ((2,), (3,), (5,), (8,), (11,), (4, 5), (7, 6), (12, 3))),
            *((out_features, in_features, (6,)) for out_features, in_features in ((16, 16), (64, 7), (1000, 4096), (4096, 14336))),
        ),
    ),
    OperandSizes(
        rotations=((11008, block_size(11008)), *((width, width) for width in (9216, 14336, 16384))), plain=(576,), fronts=(Front.GELU_TANH,)
    ),
)


def operand_cases(groups: tuple[OperandSizes, ...]) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name, which has "operand" in it; a check takes the device and raises `AssertionError`."""
    for sizes in groups:
        for dtype in sizes.dtypes:
            for front in sizes.fronts:
                for features, block in sizes.rotations:
                    name = f"operand {front.value} {features} in blocks of {block} {dtype}"
                    yield name, partial(_check_rotations, features, block, dtype, front, sizes.batches, None)
                for features in sizes.plain:
                    name = f"operand {front.value} {features} plain {dtype}"
                    yield (
                        name,
                        partial(_check_rotations, features, features, dtype, front, sizes.batches, transform.plan(features, features)),
                    )
            for features in sizes.packed:
                yield f"operand pack {features} {dtype}", partial(_check_pack, features, dtype, sizes.batches)
            for out_features, in_features, bits in sizes.weights:
                name = f"operand linear {out_features}x{in_features} bits {bits} {dtype}"
                yield name, partial(_check_linear, out_features, in_features, bits, dtype, sizes.batches)
            yield f"operand of zeros and of what is not finite {dtype}", partial(_check_special, dtype)


def assert_operand(operand: tuple[Tensor, Tensor], rotated: Tensor) -> None:
    """Each projection of rotated rows, float64 [batch, features], is within half a step, and steps are no larger than need be."""
    words, scales = operand
    batch, features = rotated.shape
    assert words.shape == (column_blocks(features), operand_rows(batch), 2, 4, 2, 2) and scales.shape == (batch,)
    exact = projections(rotated)
    error = ((unpack_operand(words, scales) - exact).abs() / scales.double()[:, None, None]).max().item()
    assert error <= OPERAND_STEPS, f"off by {error:.3f} steps"
    most = torch.maximum(exact.abs().amax((1, 2)), CREST * rotated.square().mean(1).sqrt())
    assert (scales.double() * PEAK <= 1.001 * most).all(), f"scales {scales.tolist()} for {most.tolist()}"


def activation(batch: int, features: int, dtype: torch.dtype, device: str, gap: int = 0) -> Tensor:
    """Rows with a spike each, of which one is much smaller; `gap` elements lie between two rows."""
    x = torch.randn(batch, features + gap, device=device)[:, :features]
    x[:, features // 3] *= 100
    x[batch // 2] *= 1e-3
    return x.to(dtype) if not gap else torch.empty(batch, features + gap, dtype=dtype, device=device)[:, :features].copy_(x)


def _check_rotations(
    features: int, block: int, dtype: torch.dtype, front: Front, batches: tuple[int, ...], plan: transform.Plan | None, device: str
) -> None:
    """All batches, with gaps between the rows in every other; by the kernel that is chosen, or by the plain one with its plan."""
    signs = torch.randint(0, 256, (Rotation.bytes_for(features),), dtype=torch.uint8, device=device)
    weight = torch.randn(features, device=device).to(dtype)
    for batch in batches:
        x = activation(batch, features, dtype, device, gap=16 * (batch % 2))
        if front in GATES:
            x, up = _gate(x, GATES[front], together=batch % 2 == 0)
            _check_gated(Gate(up, GATES[front]), x, signs, block, plan)
            continue
        residual = activation(batch, features, dtype, device) if front is Front.ADD_NORM else None
        norm = None if front is Front.NOTHING else Norm(weight, EPS, float(batch % 2), residual)
        with poisoned():
            if plan is not None:
                words, scales, total = transform.transform(x, signs, block, norm, plan)
            elif norm is None:
                words, scales, total = *activations.rotate(x, signs, block), x
            else:
                words, scales, total = activations.normalize(x, signs, block, norm)
        expected = x if residual is None else (x.float() + residual.float()).to(dtype)
        assert torch.equal(total, expected), "the sum with the residual"
        wide = expected.double() if norm is None else reference.rms_norm(expected, weight, EPS, norm.offset)
        assert_operand((words, scales), reference.rotate(wide, signs, block))


def _gate(x: Tensor, kind: Activation, together: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, which may be two ranges of the columns of one tensor."""
    gate, up = settled(x, kind), torch.randn(x.shape, device=x.device).to(x.dtype)
    if not together:
        return gate, up
    first, second = torch.cat([gate, up], 1).chunk(2, 1)
    return first, second


def _check_gated(gate: Gate, x: Tensor, signs: Tensor, block: int, plan: transform.Plan | None) -> None:
    with poisoned():
        if plan is not None:
            words, scales, _ = transform.transform(x, signs, block, gate, plan)
        else:
            words, scales = activations.gate(x, gate.up, gate.activation, signs, block)
    assert_operand((words, scales), reference.rotate(reference.gated(x, gate.up, gate.activation).double(), signs, block))


def _check_pack(features: int, dtype: torch.dtype, batches: tuple[int, ...], device: str) -> None:
    for batch in batches:
        x = activation(batch, features, dtype, device, gap=3)
        with poisoned():
            operand = transform.pack(x)
        assert_operand(operand, x.double())


def _check_linear(
    out_features: int, in_features: int, bits: tuple[int, ...], dtype: torch.dtype, batches: tuple[int, ...], device: str
) -> None:
    """Through the operators, from the activation to the product, twice with equal results; where the GPU cannot, they say so."""
    weight = packed("trellis", out_features, in_features, list(bits), device=device)
    signs = torch.randint(0, 256, (Rotation.bytes_for(in_features),), dtype=torch.uint8, device=device)
    block = block_size(in_features)
    for batch in batches:
        x = activation(batch, in_features, dtype, device, gap=batch % 2)
        bias = torch.randn(out_features, device=device).to(dtype) if batch != 2 else None
        arguments = (weight.codes, weight.scales, bias, *weight.format, out_features, dtype)
        with poisoned():
            operand = operand_ops.rotate_operand(x, signs, block)
            if fused.supports(weight.quantizers, batch, dtype, x.device).implementation is None:
                _assert_refused(lambda: operand_ops.operand_linear(*operand, *arguments))  # noqa: B023 - called at once
                continue
            found = operand_ops.operand_linear(*operand, *arguments)
            again = operand_ops.operand_linear(*operand, *arguments)
        rotated = reference.rotate(x.double(), signs, block)
        expected = reference.linear(rotated, weight.codes, weight.scales, bias, weight.quantizers, out_features).to(dtype)
        assert_close(found, expected)
        assert torch.equal(found, again), "equal input gives equal output"


def _assert_refused(call: Callable[[], object]) -> None:
    try:
        call()
    except KernelError:
        return
    raise AssertionError("ran without support")


def _check_special(dtype: torch.dtype, device: str) -> None:
    """A row of zeros stays zero; no value of a row is finite if one was not, and other rows do not notice."""
    signs = torch.zeros(Rotation.bytes_for(128), dtype=torch.uint8, device=device)
    x = torch.ones(4, 128, dtype=dtype, device=device)
    x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    gated = [activations.gate(*both, kind, signs, 128) for both in ((x, x), (torch.ones_like(x), x)) for kind in Activation]
    for words, scales in (activations.rotate(x, signs, 128), transform.pack(x), *gated):
        rows = unpack_operand(words, scales)
        assert not rows[0].any() and not rows[1].isfinite().any() and not rows[2].isfinite().any() and rows[3].isfinite().all()
