"""The search of `qpc.quant.viterbi` in plain PyTorch, with all windows in one tensor: slow, and plain to read."""

import torch
from torch import Tensor

from qpc.quant.bitstring import ring_windows
from qpc.quant.codebook import codebook, decode_windows

FAR = 1e30


def search(values: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Low bits of the windows of the best rings found: values float32 [rings, steps, 2] -> int64 [rings, steps]."""
    rings, steps, _ = values.shape
    reach = min(steps // 2, 8 * -(-window_bits // step_bits))
    suffixes = 1 << (window_bits - step_bits)
    around = values[:, torch.arange(-reach, reach) % steps]
    history = _forward(around, torch.zeros(rings, suffixes), step_bits, window_bits)
    joint, _ = _trace(around, history, history[-1].argmin(dim=1), reach, step_bits, window_bits)
    start = torch.full((rings, suffixes), FAR)
    start[torch.arange(rings), joint] = 0
    history = _forward(values, start, step_bits, window_bits)
    end, symbols = _trace(values, history, joint, 0, step_bits, window_bits)
    assert torch.equal(end, joint)
    return symbols


def squared_error(values: Tensor, words: Tensor, step_bits: int, window_bits: int) -> Tensor:
    """Squared error of each ring, float64 [rings]."""
    made = decode_windows(ring_windows(words, step_bits, window_bits), step_bits, window_bits)
    return (made.double() - values.double()).square().sum(dim=(1, 2))


def _costs(x: Tensor, before: Tensor, step_bits: int, window_bits: int) -> Tensor:
    points = codebook(step_bits, window_bits)
    source = torch.arange(1 << window_bits) % before.shape[1]
    return before[:, source] + points.square().sum(dim=1) - 2 * (x @ points.T)


def _forward(values: Tensor, start: Tensor, step_bits: int, window_bits: int) -> list[Tensor]:
    history = [start]
    for step in range(values.shape[1]):
        costs = _costs(values[:, step], history[-1], step_bits, window_bits).reshape(len(values), -1, 1 << step_bits)
        history.append(costs.amin(dim=2).clamp_max(FAR) + values[:, step].square().sum(dim=1, keepdim=True))
    return history


def _trace(values: Tensor, history: list[Tensor], suffix: Tensor, last: int, step_bits: int, window_bits: int) -> tuple[Tensor, Tensor]:
    symbols = []
    for step in reversed(range(last, values.shape[1])):
        costs = _costs(values[:, step], history[step], step_bits, window_bits).reshape(len(values), -1, 1 << step_bits)
        symbols.append(costs[torch.arange(len(values)), suffix].argmin(dim=1))
        suffix = ((suffix << step_bits) + symbols[-1]) % history[0].shape[1]
    return suffix, torch.stack(symbols[::-1], dim=1)
