import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qpc.errors import QuantizerError
from qpc.quant import viterbi
from qpc.quant.bitstring import ring_windows
from qpc.quant.codebook import code_deviation, codebook
from qpc.quant.viterbi import encode_rings, search_rings

pytest.importorskip("numba", reason="the CPU encoder is compiled by numba")


def windows_of(symbols: NDArray[np.uint16], step_bits: int, window_bits: int) -> NDArray[np.int64]:
    """Windows of the circular bit strings, straight from their definition: [rings, steps]."""
    rings, steps = symbols.shape
    bits = ((symbols[..., None] >> np.arange(step_bits)) & 1).reshape(rings, -1).astype(np.int64)
    places = (np.arange(steps)[:, None] * step_bits + np.arange(window_bits)) % bits.shape[1]
    return (bits[:, places] << np.arange(window_bits)).sum(axis=-1)


def cost(values: NDArray[np.float32], points: NDArray[np.int32], windows: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.square(points[windows] - values.astype(np.float64)).sum(axis=(1, 2))


SMALL = [(4, 2, 4, 0.4), (6, 2, 3, 0.6), (6, 2, 5, 0.4), (5, 2, 7, 0), (12, 1, 4, 0.4), (3, 4, 5, 0.4), (4, 3, 3, 0.99), (1, 6, 6, 0.99)]
SMALL += [(7, 2, 14, 0)]


@pytest.mark.parametrize(("steps", "step_bits", "window_bits", "share"), SMALL)
def test_against_every_ring(steps: int, step_bits: int, window_bits: int, share: float) -> None:
    """Never better than the best ring, often equal to it (less often where the window is most of the ring), and close on average."""
    rng = np.random.default_rng(steps * 100 + step_bits)
    rings = 50
    points = rng.integers(-100, 100, (1 << window_bits, 2), dtype=np.int32)
    values = rng.normal(0, 60, (rings, steps, 2)).astype(np.float32)
    every = (np.arange(1 << (steps * step_bits))[:, None] >> (step_bits * np.arange(steps))).astype(np.uint16) & ((1 << step_bits) - 1)
    made = points[windows_of(every, step_bits, window_bits)].reshape(len(every), -1).astype(np.float64)
    flat = values.reshape(rings, -1).astype(np.float64)
    best = (np.square(made).sum(axis=1) - 2 * flat @ made.T).min(axis=1) + np.square(flat).sum(axis=1)
    symbols = search_rings(values, points, step_bits)
    assert symbols.max() < 1 << step_bits
    found = cost(values, points, windows_of(symbols, step_bits, window_bits))
    assert np.all(found >= best * (1 - 1e-9) - 1e-6)
    assert np.isclose(found, best, rtol=1e-6).mean() >= share
    assert share == 0 or found.sum() < 1.5 * best.sum()


def test_second_pass_is_optimal_between_its_ends() -> None:
    """Among all rings with the suffix that the search settled on, none is better."""
    rng = np.random.default_rng(5)
    steps, step_bits, window_bits, rings = 5, 2, 5, 40
    points = rng.integers(-100, 100, (1 << window_bits, 2), dtype=np.int32)
    values = rng.normal(0, 60, (rings, steps, 2)).astype(np.float32)
    every = (np.arange(1 << (steps * step_bits))[:, None] >> (step_bits * np.arange(steps))).astype(np.uint16) & 3
    every_windows = windows_of(every, step_bits, window_bits)
    chosen = windows_of(search_rings(values, points, step_bits), step_bits, window_bits)
    mask = (1 << (window_bits - step_bits)) - 1  # bits that the first window shares with the last
    for ring in range(rings):
        same = every_windows[(every_windows[:, 0] & mask) == (chosen[ring, 0] & mask)]
        best = cost(np.repeat(values[ring : ring + 1], len(same), axis=0), points, same).min()
        assert cost(values[ring : ring + 1], points, chosen[ring : ring + 1])[0] == pytest.approx(best, rel=1e-6)


def test_a_codeword_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (40, 16), generator=generator).to(torch.int32)
    values = codebook(4, 12)[ring_windows(words, 4, 12)]
    assert torch.equal(encode_rings(values, 4, 12), words)


def test_result_depends_on_neither_threads_nor_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    values = code_deviation(3, 12) * torch.randn(70, 128, 2, generator=torch.Generator().manual_seed(1))
    monkeypatch.setenv("QPC_THREADS", "1")
    single = encode_rings(values, 3, 12)
    monkeypatch.setenv("QPC_THREADS", "3")
    assert torch.equal(encode_rings(values, 3, 12), single)
    assert torch.equal(encode_rings(values[33:36], 3, 12), single[33:36])


@pytest.mark.parametrize("shape", [(4, 128), (4, 128, 3), (4, 3, 2), (4, 40, 2)])
def test_shapes_that_make_no_ring_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(QuantizerError):
        encode_rings(torch.zeros(shape), 3, 12)


def test_tables_of_a_mixed_plan_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they fit together; otherwise those that were used last are kept."""
    keys = [(step_bits, step_bits + 4) for step_bits in range(2, 8)]
    first = [viterbi._table(*key) for key in keys]
    assert all(viterbi._table(*key) is table for key, table in zip(keys, first, strict=True))
    monkeypatch.setattr(viterbi, "KEPT_BYTES", first[-1].nbytes)
    assert viterbi._table(*keys[-1]) is first[-1]
    again = viterbi._table(*keys[0])
    assert again is not first[0] and viterbi._table(*keys[0]) is again
