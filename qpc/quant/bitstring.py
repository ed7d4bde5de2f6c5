"""Strings of small fields in 32-bit words, the least significant bit first: bit i of a string is bit `i % 32` of word `i // 32`."""

import torch
from torch import Tensor

GROUP = 32
"""Fields that fill whole words, however wide they are."""


def pack(fields: Tensor, bits: int) -> Tensor:
    """Concatenate fields of `bits` bits: integer [..., count] -> int32 [..., count * bits / 32]; `count` divisible by 32."""
    grouped = fields.long().reshape(*fields.shape[:-1], fields.shape[-1] // GROUP, GROUP)
    words = torch.zeros(*grouped.shape[:-1], bits, dtype=torch.int64, device=fields.device)
    for j in range(GROUP):
        word, offset = divmod(j * bits, 32)
        field = grouped[..., j] << offset
        words[..., word] |= field
        if offset + bits > 32:
            words[..., word + 1] |= field >> 32
    sign = 1 << 31
    return (((words & 0xFFFFFFFF) ^ sign) - sign).to(torch.int32).flatten(-2)


def ring_windows(words: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Every window of a circular string, one per step: int32 [..., words] -> int64 [..., words * 32 / step_bits].

    The windows do not overlap, and are the packed fields, where `window_bits == step_bits`. window_bits: at most 32.
    """
    count = words.shape[-1]
    bit = torch.arange(count * 32 // step_bits, device=words.device) * step_bits
    word, offset = bit // 32, bit % 32
    wide = words.long() & 0xFFFFFFFF
    pair = wide[..., word] | (wide[..., (word + 1) % count] << 32)
    return (pair >> offset) & ((1 << window_bits) - 1)
