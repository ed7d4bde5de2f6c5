"""A norm whose gain is multiplied in another basis than that of its input: where the gain could not be folded into what reads it."""

import torch
from torch import Tensor, nn

from qpc.quant.rotation import Rotation


def turned_gain(x: Tensor, gain: Tensor, signs: Tensor, block: int) -> Tensor:
    """`R (gain * R^-1 x)`, R being the rotation of `signs` and `block` as in `Rotation`.

    x: [..., features]; gain: [features]; both float. Computed in float32 at least; returns the dtype of their product. Differentiable,
    and made of PyTorch's operators on every device.
    """
    dtype = torch.promote_types(x.dtype, gain.dtype)
    rotation = Rotation(x.shape[-1], block, signs)
    return rotation.apply(rotation.invert(x.to(torch.promote_types(dtype, torch.float32))) * gain).to(dtype)


class TurnedGain(nn.Module):
    """A norm of rotated values whose gain is that of the values before the rotation.

    norm: the norm, its own gain being one. gain: what its parameter was, [features]; offset: what is added to it. block: that of the
    rotation, whose signs are uint8 [ceil(features / 8)].
    """

    signs: Tensor

    def __init__(self, norm: nn.Module, gain: nn.Parameter, offset: float, signs: Tensor, block: int) -> None:
        super().__init__()
        self.norm, self.gain, self.offset, self.block = norm, gain, offset, block
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """[..., features] -> [..., features]."""
        value = self.norm(x)
        return turned_gain(value, self.gain + self.offset, self.signs, self.block).to(value.dtype)

    def extra_repr(self) -> str:
        return f"{self.gain.numel()}, block={self.block}" + (f", offset={self.offset:g}" if self.offset else "")
