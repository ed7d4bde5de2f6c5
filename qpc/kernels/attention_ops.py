"""The operator of attention while text is generated: one new token for each sequence, and a cache of fixed length."""

import torch
from torch import Tensor

from qpc.errors import KernelError
from qpc.kernels import reference
from qpc.kernels.ops import ACTIVATION_DTYPES
from qpc.kernels.select import Implementation, Support, supports

MIN_WIDTH, MAX_WIDTH = 16, 256
"""Values of a head, a power of two."""


def supports_attention(width: int, dtype: torch.dtype, device: torch.device) -> Support:
    """Whether `qpc::decode_attention` has a kernel for heads of this width here; otherwise why not."""
    found = supports(device, dtype)
    if found.implementation is Implementation.TRITON and not (MIN_WIDTH <= width <= MAX_WIDTH and width & (width - 1) == 0):
        return Support(None, f"heads of {width} values; required a power of two from {MIN_WIDTH} to {MAX_WIDTH}")
    return found


@torch.library.custom_op("qpc::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """Write keys and values of one token of each sequence to their place, and attend to all places up to it.

    q: [batch, query heads, 1, width]. k, v: [batch, heads, 1, width], query heads a multiple of heads. keys, values: [batch, heads,
    length, width], of the same dtype, contiguous. position: int64 [], the place, below length. starts: int64 [batch], the first place of
    each sequence, at most the position. cos, sin: [batch or 1, 1, width], by which q and k are turned before (rotary embedding, halves);
    None if they are already. scale: of the scores. window: places that a token attends to, itself included; 0: all.
    Returns [batch, 1, query heads, width]; sums are in float32 or better. Raises `KernelError`.
    """
    check(q, k, v, keys, values, position, starts, cos, sin)
    if supports_attention(q.shape[-1], q.dtype, q.device).require() is Implementation.TRITON:
        from qpc.kernels.attention import attend

        q, k, v = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k, v))
        cos, sin = (None if each is None else each.contiguous() for each in (cos, sin))
        with torch.cuda.device(q.device):
            return attend(q, k, v, keys, values, position, starts.contiguous(), cos, sin, scale, window)
    return reference.decode_attention(q, k, v, keys, values, position, starts, cos, sin, scale, window)


@decode_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    check(q, k, v, keys, values, position, starts, cos, sin)
    return q.new_empty((q.shape[0], 1, q.shape[1], q.shape[3]))


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    starts: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Raise `KernelError` unless the arguments fit together."""
    if q.ndim != 4 or q.shape[2] != 1 or keys.ndim != 4 or q.dtype not in ACTIVATION_DTYPES:
        found = f"q is {q.dtype} {tuple(q.shape)}, keys are {tuple(keys.shape)}"
        raise KernelError(f"attention: {found}; required a floating point [batch, heads, 1, width] and [batch, heads, length, width]")
    batch, heads, _, width = keys.shape
    if q.shape[0] != batch or q.shape[3] != width or q.shape[1] % heads:
        raise KernelError(f"attention: q {tuple(q.shape)} does not fit keys {tuple(keys.shape)}; query heads must be a multiple of heads")
    for name, tensor, shape in (("k", k, (batch, heads, 1, width)), ("v", v, (batch, heads, 1, width)), ("values", values, keys.shape)):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != q.dtype:
            raise KernelError(f"attention: {name} is {tensor.dtype} {tuple(tensor.shape)}, required {q.dtype} {tuple(shape)}")
    if keys.dtype != q.dtype or not keys.is_contiguous() or not values.is_contiguous():
        raise KernelError(f"attention: keys and values must be contiguous {q.dtype}; they are {keys.dtype}")
    if position.ndim or tuple(starts.shape) != (batch,) or position.dtype != torch.int64 or starts.dtype != torch.int64:
        raise KernelError(f"attention: position {tuple(position.shape)} and starts {tuple(starts.shape)}, required int64 () and ({batch},)")
    if (cos is None) != (sin is None):
        raise KernelError("attention: cos and sin are given together, or not at all")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles is not None and tuple(angles.shape) not in ((batch, 1, width), (1, 1, width)):
            raise KernelError(f"attention: {name} is {tuple(angles.shape)}, required ({batch} or 1, 1, {width})")
    every = {"k": k, "v": v, "keys": keys, "values": values, "position": position, "starts": starts, "cos": cos, "sin": sin}
    for name, each in every.items():
        if each is not None and each.device != q.device:
            raise KernelError(f"attention: {name} is on {each.device}, q on {q.device}; move them to one device")
