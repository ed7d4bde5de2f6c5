"""A range of a packed weight decodes to that range of the weight, bit for bit, and the products of ranges add up to that of the whole."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.errors import QuantizerError
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import Quantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.shard import shard_of
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer
from tests.quant.coded import coded

QUANTIZERS = (
    TrellisQuantizer(5, 14),
    ScalarQuantizer(7),
    VectorQuantizer(2, 6),
    MixedRateQuantizer(TrellisQuantizer(4, 13), TrellisQuantizer(5, 14), Fraction(1, 4)),
    MixedRateQuantizer(VectorQuantizer(4, 5), VectorQuantizer(4, 6), Fraction(2, 3)),
)


@given(st.sampled_from(QUANTIZERS), st.integers(1, 200), st.integers(1, 150), st.data())
@settings(max_examples=60)
def test_a_range_decodes_to_the_range(quantizer: Quantizer, height: int, width: int, data: st.DataObject) -> None:
    whole = coded(quantizer, height, width)
    axes = []
    for size, step in ((height, BLOCK_ROWS), (width, BLOCK_COLUMNS)):
        start = data.draw(st.integers(0, (size - 1) // step)) * step
        stop = min(size, start + step * data.draw(st.integers(1, 4)))
        axes.append(range(start, stop))
    rows, columns = axes
    part = shard_of(whole, rows, columns)
    assert torch.equal(part.rotated(), whole.rotated()[rows.start : rows.stop, columns.start : columns.stop])
    assert [codes.shape[1] for codes in part.codes] == [count for _, count in part.quantizer.parts(len(columns))]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_products_of_ranges_add_up(quantizer: Quantizer) -> None:
    whole = coded(quantizer, 128, 192, block=32)
    x = torch.randn(3, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = x @ whole.restored().double().T
    columns = [range(start, start + 64) for start in (0, 64, 128)]
    for rows in (range(0, 64), range(64, 128)):
        parts = [x[:, each.start : each.stop] @ shard_of(whole, rows, each).restored().double().T for each in columns]
        torch.testing.assert_close(sum(parts), expected[:, rows.start : rows.stop], rtol=1e-6, atol=1e-6)


def test_nothing_is_copied() -> None:
    whole = coded(QUANTIZERS[3], 128, 128, block=16)
    part = shard_of(whole, range(64, 128), range(16, 64))
    stored = {tensor.untyped_storage().data_ptr() for tensor in (*whole.codes, whole.scales, whole.rotation.signs)}
    assert {tensor.untyped_storage().data_ptr() for tensor in (*part.codes, part.scales, part.rotation.signs)} == stored


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (range(32, 64), range(0, 64), "rows 32 to 64 of 96 must begin and end at multiples of 64"),
        (range(0, 32), range(0, 64), "rows 0 to 32 of 96 must begin and end at multiples of 64"),
        (range(64, 100), range(0, 64), "rows 64 to 100 must be a range of one or more of 96"),
        (range(0), range(0, 64), "rows 0 to 0 must be a range of one or more of 96"),
        (range(0, 64), range(8, 64), r"columns 8 to 64 of 64 must begin and end at multiples of 16 \(a block of codes\)"),
        (range(0, 64), range(0, 16), r"columns 0 to 16 of 64 must begin and end at multiples of 32 \(a block of the rotation\)"),
        (range(0, 64), range(0, 64, 2), "columns 0 to 64 must be a range of one or more of 64"),
    ],
    ids=str,
)
def test_a_range_between_blocks_is_refused(rows: range, columns: range, message: str) -> None:
    with pytest.raises(QuantizerError, match=message):
        shard_of(coded(QUANTIZERS[0], 96, 64, block=32), rows, columns)
