"""Strings of small fields in 32-bit words, the least significant bit first: bit i of a string is bit `i % 32` of word `i // 32`."""

import torch
from torch import Tensor

GROUP = 32
"""Fields that fill whole words, however wide they are."""


def pack(fields: Tensor, bits: int) -> Tensor:
    """Concatenate fields of `bits` bits: integer [..., count] -> int32 [..., count * bits / 32]; `count` divisible by 32."""
    grouped = fields.long().reshape(*fields.shape[:-1], fields.shape[-1] // GROUP, GROUP)
    bit = torch.arange(GROUP, device=fields.device) * bits
    word, offset = bit // 32, bit % 32
    placed = grouped << offset
    words = torch.zeros(*grouped.shape[:-1], bits + 1, dtype=torch.int64, device=fields.device)
    words.index_add_(-1, word, placed & 0xFFFFFFFF)  # fields do not overlap, so a sum is a union
    words.index_add_(-1, word + 1, placed >> 32)
    sign = 1 << 31
    return ((words[..., :bits] ^ sign) - sign).to(torch.int32).flatten(-2)


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
