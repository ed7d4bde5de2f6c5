"""The operand of the integer multiplication: projections in fixed point of 16 bits, taken apart and put together again."""

import pytest
import torch

from qpc.errors import KernelError
from qpc.kernels.operand import PEAK, PROJECTIONS, operand_rows, pack_operand, peak_scales, projections, unpack_operand
from qpc.quant.codebook import MULTIPLIERS, SCALE, START, decode_windows, hash_words
from qpc.quant.layout import column_blocks


def activations(batch: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, one of zeros, one with a spike."""
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(features))
    x[batch // 2] = 0
    x[-1, features // 3] = 5000
    return (x * torch.logspace(-3, 0.5, batch)[:, None]).to(dtype)


def bytes_of(word: int) -> list[int]:
    """Signed, the lowest first."""
    return [(word >> bit & 0xFF ^ 0x80) - 0x80 for bit in (0, 8, 16, 24)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "features"), [(1, 1), (2, 7), (3, 16), (5, 50), (16, 576)])
def test_error_is_half_a_step(batch: int, features: int, dtype: torch.dtype) -> None:
    x = activations(batch, features, dtype)
    words, scales = pack_operand(x)
    assert words.dtype == torch.int32 and words.shape == (column_blocks(features), operand_rows(batch), 2, 4, 2, 2)
    assert torch.equal(scales, peak_scales(x)) and scales.dtype == torch.float32
    error = (unpack_operand(words, scales) - projections(x)).abs()
    assert (error <= scales.double()[:, None, None] * (0.5 + PEAK * 2**-23)).all()


def test_projections_are_the_products_of_the_activation_with_each_direction() -> None:
    x = torch.tensor([[3.0, -5.0, 7.0]])
    for pair, (first, second) in ((0, (3.0, -5.0)), (1, (7.0, 0.0)), (2, (0.0, 0.0))):
        assert projections(x)[0, pair].tolist() == [c * first + d * second for c, d in PROJECTIONS]


@pytest.mark.parametrize(("step_bits", "window_bits"), [(4, 17), (6, 19)])
def test_bytes_times_projections_are_weights_times_activations(step_bits: int, window_bits: int) -> None:
    """Straight from the words in memory: the dot product of 8 decoded pairs with a column block, by their bytes and limbs."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 1 << window_bits, (8,), generator=generator)
    x = torch.randn(1, 16, generator=generator)
    words, scales = pack_operand(x)
    total = 0
    for pair, window in enumerate(windows.tolist()):
        half, t = pair // 4, pair % 4
        for index in range(hash_words(step_bits, window_bits)):
            code = bytes_of((window | START) * MULTIPLIERS[index] % 2**32)
            for limb, weight in ((0, 256), (1, 1)):
                total += weight * sum(a * b for a, b in zip(code, bytes_of(int(words[0, 0, limb, t, index, half])), strict=True))
    expected = float(decode_windows(windows, step_bits, window_bits).double().flatten() @ x[0].double())
    assert SCALE * total * float(scales[0]) == pytest.approx(expected, abs=8 * 8 * 128 * 16 * float(scales[0]))
    assert abs(expected) > 100 * 8 * 128 * 16 * float(scales[0]), "the comparison means something"


def test_columns_beyond_the_last_are_zero() -> None:
    words, scales = pack_operand(activations(3, 37, torch.float32))
    assert not unpack_operand(words, scales.clamp(min=1))[:, 19:].any()


def test_rows_beyond_the_batch_are_zero() -> None:
    words, _ = pack_operand(activations(3, 37, torch.float32))
    assert words.shape[1] == 4 and not words[:, 3].any()


def test_values_beyond_the_scale_saturate() -> None:
    words, scales = pack_operand(torch.tensor([[1e6, 0.0, -1e6, 0.0]]), torch.ones(1))
    made, exact = unpack_operand(words, scales)[0], projections(torch.tensor([[1e6, 0.0, -1e6, 0.0]]))[0]
    assert torch.equal(made, exact.clamp(-PEAK, PEAK)) and (made == PEAK).any() and (made == -PEAK).any()


def test_refuses_what_is_no_batch_of_rows() -> None:
    for x in (torch.ones(3), torch.ones(2, 0), torch.ones(1, 2, 3)):
        with pytest.raises(KernelError, match="batch, in_features"):
            pack_operand(x)
