"""Incoherence processing: random signs and a Hadamard transform of a layer's input axis.

`y = H (s * x) / sqrt(block)` in each block of the input. Applied to the rows of a weight it makes them close to Gaussian; applied to
the activation it leaves the product unchanged, since the transform is orthogonal.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.hadamard import block_size, factors, hadamard_transform


@dataclass(frozen=True)
class Rotation:
    """An orthogonal transform of `features` inputs.

    signs: uint8 [ceil(features / 8)], bit i % 8 (least significant first) of byte i // 8 set where input i changes its sign.
    block: size of the Hadamard blocks; divides features.
    """

    features: int
    block: int
    signs: Tensor

    @staticmethod
    def random(features: int, generator: torch.Generator, block: int | None = None) -> "Rotation":
        """Fresh random signs.

        block: by default the largest known Hadamard block that divides `features`. Raises `QuantizerError` for one that does not divide
        them, or whose order is not known.
        """
        block = block_size(features) if block is None else block
        if block < 1 or features % block:
            raise QuantizerError(f"{features=} must be divisible by {block=}; block_size gives the largest block")
        factors(block)
        signs = torch.randint(0, 256, (Rotation.bytes_for(features),), generator=generator, dtype=torch.uint8)
        return Rotation(features, block, signs)

    @staticmethod
    def bytes_for(features: int) -> int:
        """Stored bytes of the signs of `features` inputs."""
        return -(-features // 8)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.signs.numel()

    def sign_vector(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The signs as +1 and -1: [features]."""
        return unpack_signs(self.signs, self.features, dtype)

    def apply(self, x: Tensor) -> Tensor:
        """Transform the last axis of `x` [..., features]; computes in the dtype of `x`."""
        return hadamard_transform(x * self.sign_vector(x.dtype), self.block)

    def invert(self, y: Tensor) -> Tensor:
        """Undo `apply`."""
        return hadamard_transform(y, self.block, transpose=True) * self.sign_vector(y.dtype)

    def to(self, device: torch.device | str) -> "Rotation":
        """The same rotation on another device."""
        return Rotation(self.features, self.block, self.signs.to(device))


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU whose state depends on the seed and a name, on nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def unpack_signs(signs: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Expand packed sign bits (uint8, least significant bit first) to +1 and -1: [features]."""
    places = 2 ** torch.arange(8, device=signs.device, dtype=torch.int32)  # no shift: ONNX has none that takes these
    bits = torch.bitwise_and(signs[:, None].int(), places)
    return torch.where(bits.flatten()[:features] == 0, 1.0, -1.0).to(dtype)
