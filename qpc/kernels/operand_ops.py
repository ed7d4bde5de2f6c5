"""The operators of the multiplication on integer tensor cores: activations into its operand, and the product with a trellis-coded weight.

An operand (`qpc.kernels.operand`) is made once for all weights that read one activation. Its shape depends on the number of rows, so a
graph that holds one is of a fixed batch: a symbolic one becomes the number it was traced with. On a CPU the operators are the definition,
for tests: slower than `qpc::trellis_linear`, and no graph is given them there.
"""

import math

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import cpu, fused, reference
from qpc.kernels.gate import Activation, gated
from qpc.kernels.launch import MAX_BATCH
from qpc.kernels.operand import empty_operand, operand_rows, pack_operand, unpack_rows
from qpc.kernels.ops import ACTIVATION_DTYPES, check_rotation, check_weight, trellis_parts
from qpc.kernels.select import Implementation, supports
from qpc.quant.layout import BLOCK_COLUMNS


@torch.library.custom_op("qpc::rotate_operand", mutates_args=())
def rotate_operand(x: Tensor, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The operand of a rotated activation, in float32 or better between.

    x: [..., in_features], any float dtype, at most 16 rows. signs, block: as in `qpc::rotate`. Returns words int32
    [column_blocks, rows, 2, 4, 2, 2], rows the power of two at or above the number of rows of `x`, those beyond undefined; and scales
    float32 [number of rows of x]. Raises `KernelError`.
    """
    batch = _check_activation(x, signs, block)
    if batch and supports(x.device, x.dtype).require() is Implementation.TRITON:
        from qpc.kernels import activations

        with torch.cuda.device(x.device):
            return activations.rotate(x.reshape(batch, -1), signs.contiguous(), block)
    return _packed(x.double(), signs, block) if batch else empty_operand(0, x.shape[-1], x.device)


@rotate_operand.register_fake
def _(x: Tensor, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return empty_operand(_check_activation(x, signs, block), x.shape[-1], x.device)


@torch.library.custom_op("qpc::pack_operand", mutates_args=())
def pack_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The operand of an activation as it is: of one that is rotated already. As `rotate_operand`, by the scale of each row's peak."""
    batch = _check_rows(x)
    if batch and supports(x.device, x.dtype).require() is Implementation.TRITON:
        from qpc.kernels import transform

        with torch.cuda.device(x.device):
            return transform.pack(x.reshape(batch, -1).contiguous())
    return pack_operand(x.double().reshape(batch, -1)) if batch else empty_operand(0, x.shape[-1], x.device)


@pack_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_operand(_check_rows(x), x.shape[-1], x.device)


@torch.library.custom_op("qpc::norm_operand", mutates_args=())
def norm_operand(x: Tensor, weight: Tensor, eps: float, offset: float, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The operand of a rotated RMSNorm, `x / sqrt(mean(x^2) + eps) * (weight + offset)`, in float32 or better between.

    As `rotate_operand`. weight: [in_features], a float dtype. offset: 1 for models that store the weight less 1. A Hopper GPU reads weight
    and signs while kernels of the stream before this one may still run, so they must not be results of those.
    """
    batch = _check_norm(x, weight, signs, block)
    if batch and supports(x.device, x.dtype).require() is Implementation.TRITON:
        words, scales, _ = _normalized(x, None, weight, eps, offset, signs, block)
        return words, scales
    return _packed(reference.rms_norm(x, weight, eps, offset), signs, block) if batch else empty_operand(0, x.shape[-1], x.device)


@norm_operand.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return empty_operand(_check_norm(x, weight, signs, block), x.shape[-1], x.device)


@torch.library.custom_op("qpc::add_norm_operand", mutates_args=())
def add_norm_operand(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, signs: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_operand` of `x + residual`, and that sum in the dtype of both, [..., in_features]."""
    batch = _check_norm(x, weight, signs, block, residual)
    if batch and supports(x.device, x.dtype).require() is Implementation.TRITON:
        words, scales, total = _normalized(x, residual, weight, eps, offset, signs, block)
        return words, scales, total.reshape(x.shape)
    total = (x + residual).contiguous()
    if not batch:
        return *empty_operand(0, x.shape[-1], x.device), total
    return *_packed(reference.rms_norm(total, weight, eps, offset), signs, block), total


@add_norm_operand.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, signs: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_operand(_check_norm(x, weight, signs, block, residual), x.shape[-1], x.device), x.new_empty(x.shape)


@torch.library.custom_op("qpc::gated_operand", mutates_args=())
def gated_operand(gate: Tensor, up: Tensor, activation: str, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The operand of a rotated gated activation, `activation(gate) * up`, rounded to their dtype behind each of the two.

    As `rotate_operand`. gate, up: [..., in_features], of one dtype; ranges of one tensor are read where they lie. activation: the name of a
    `qpc.kernels.gate.Activation`. A Hopper GPU reads signs early, as for `norm_operand`.
    """
    kind = Activation.parse(activation)
    batch = _check_gate(gate, up, signs, block)
    if batch and supports(gate.device, gate.dtype).require() is Implementation.TRITON:
        from qpc.kernels import activations

        with torch.cuda.device(gate.device):
            return activations.gate(gate.reshape(batch, -1), up.reshape(batch, -1), kind, signs.contiguous(), block)
    return _packed(gated(gate, up, kind).double(), signs, block) if batch else empty_operand(0, gate.shape[-1], gate.device)


@gated_operand.register_fake
def _(gate: Tensor, up: Tensor, activation: str, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    Activation.parse(activation)
    return empty_operand(_check_gate(gate, up, signs, block), gate.shape[-1], gate.device)


@torch.library.custom_op("qpc::operand_linear", mutates_args=())
def operand_linear(
    words: Tensor,
    scales: Tensor,
    codes: list[Tensor],
    weight_scales: Tensor,
    bias: Tensor | None,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply an operand by a trellis-coded weight: `x @ w.T + bias`, [batch, out_features] of `dtype`.

    words, scales: the operand of `batch` rows. codes, weight_scales, bias, step_bits, window_bits: as `qpc::trellis_linear` takes them.
    `qpc.kernels.fused` says how far off a result may be, and on which GPUs it runs. Raises `KernelError`.
    """
    parts = trellis_parts(step_bits, window_bits)
    _check_operand(words, scales, codes, weight_scales, bias, step_bits, window_bits, out_features, dtype)
    if not len(scales):
        return scales.new_empty((0, out_features), dtype=dtype)
    if words.device.type == "cpu":
        x = unpack_rows(words, scales).to(torch.promote_types(dtype, torch.float32))
        return cpu.linear(x, codes, weight_scales, bias, parts, out_features).to(dtype)
    fused.supports(parts, len(scales), dtype, words.device).require()
    with torch.cuda.device(words.device):
        return fused.multiply(words.contiguous(), scales.contiguous(), codes, weight_scales, bias, parts, out_features, dtype)


@operand_linear.register_fake
def _(
    words: Tensor,
    scales: Tensor,
    codes: list[Tensor],
    weight_scales: Tensor,
    bias: Tensor | None,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_operand(words, scales, codes, weight_scales, bias, step_bits, window_bits, out_features, dtype)
    return scales.new_empty((scales.shape[0], out_features), dtype=dtype)


def _packed(x: Tensor, signs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The operand of rotated rows, by its definition. x: float64 [..., in_features]."""
    return pack_operand(reference.rotate(x, signs, block).reshape(-1, x.shape[-1]))


def _normalized(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, signs: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words, scales and sum [batch, in_features], on a GPU."""
    from qpc.kernels import activations
    from qpc.kernels.transform import Norm

    features = x.shape[-1]
    norm = Norm(weight, eps, offset, None if residual is None else residual.reshape(-1, features))
    with torch.cuda.device(x.device):
        return activations.normalize(x.reshape(-1, features), signs.contiguous(), block, norm)


def _check_activation(x: Tensor, signs: Tensor, block: int) -> int:
    """The number of rows. Raises `KernelError` unless the arguments fit together."""
    check_rotation(x, signs, block)
    return _check_rows(x)


def _check_rows(x: Tensor) -> int:
    """The number of rows. Raises `KernelError` if they are too many, or empty."""
    batch = int(math.prod(x.shape[:-1]))  # a symbolic number becomes the one that was traced
    if x.dtype not in ACTIVATION_DTYPES or x.ndim == 0 or x.shape[-1] == 0 or batch > MAX_BATCH:
        required = f"floating point, at most {MAX_BATCH} rows of at least one feature"
        raise KernelError(f"operand: x is {x.dtype} {tuple(x.shape)}, required {required}; use qpc::rotate or the linear itself")
    return batch


def _check_norm(x: Tensor, weight: Tensor, signs: Tensor, block: int, residual: Tensor | None = None) -> int:
    """The number of rows. Raises `KernelError` unless the arguments fit together."""
    batch = _check_activation(x, signs, block)
    if weight.dtype not in ACTIVATION_DTYPES or weight.shape != x.shape[-1:] or weight.device != x.device:
        found = f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
        raise KernelError(f"operand: the weight of the norm is {found}, required a floating point ({x.shape[-1]},) on {x.device}")
    if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape or residual.device != x.device):
        found = f"{residual.dtype} {tuple(residual.shape)} on {residual.device}"
        raise KernelError(f"operand: the residual is {found}, required {x.dtype} {tuple(x.shape)} on {x.device}")
    return batch


def _check_gate(gate: Tensor, up: Tensor, signs: Tensor, block: int) -> int:
    """The number of rows. Raises `KernelError` unless the arguments fit together."""
    batch = _check_activation(gate, signs, block)
    if up.dtype != gate.dtype or up.shape != gate.shape or up.device != gate.device:
        found = f"{up.dtype} {tuple(up.shape)} on {up.device}"
        raise KernelError(f"operand: up is {found}, required that of gate, {gate.dtype} {tuple(gate.shape)} on {gate.device}")
    return batch


def _check_operand(
    words: Tensor,
    scales: Tensor,
    codes: list[Tensor],
    weight_scales: Tensor,
    bias: Tensor | None,
    step_bits: list[int],
    window_bits: list[int],
    out_features: int,
    dtype: torch.dtype,
) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    if dtype not in ACTIVATION_DTYPES:
        raise KernelError(f"operand: {dtype=} must be a floating point dtype")
    if scales.dtype != torch.float32 or scales.ndim != 1 or scales.shape[0] > MAX_BATCH:
        raise KernelError(f"operand: scales are {scales.dtype} {tuple(scales.shape)}, required float32 (batch,), batch at most {MAX_BATCH}")
    columns = sum(code.shape[1] for code in codes if code.ndim == 3)
    check_weight(codes, weight_scales, trellis_parts(step_bits, window_bits), out_features, columns * BLOCK_COLUMNS)
    required = (columns, operand_rows(int(scales.shape[0])), 2, 4, 2, 2)
    if words.dtype != torch.int32 or tuple(words.shape) != required:
        raise KernelError(f"operand: words are {words.dtype} {tuple(words.shape)}, required int32 {required}")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype not in ACTIVATION_DTYPES):
        raise KernelError(f"operand: bias is {bias.dtype} {tuple(bias.shape)}, required floating point ({out_features},)")
    for name, tensor in (("scales", scales), ("the weight", weight_scales), ("bias", bias)):
        if tensor is not None and tensor.device != words.device:
            raise KernelError(f"operand: {name} on {tensor.device}, words on {words.device}; move them to one device")
