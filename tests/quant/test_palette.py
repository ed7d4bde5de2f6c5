import json
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpc.errors import QuantizerError
from qpc.quant.bitstring import pack, ring_windows
from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.palette import Effort, Family, Palette, default_palette, from_json, palette_of, to_json, trellis_at
from qpc.quant.quantizer import PackedWeight
from qpc.quant.rotation import Rotation
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


@pytest.mark.parametrize("effort", Effort)
def test_default_palette_has_every_quarter_bit(effort: Effort) -> None:
    palette = default_palette(effort)
    assert [q.rate for q in palette.quantizers] == [Fraction(n, 4) for n in range(4, 33)]
    for quantizer in palette.quantizers:
        assert palette.at(quantizer.rate) is quantizer
        assert 4.0 ** -float(quantizer.rate) < quantizer.distortion < 1
        assert from_json(json.loads(json.dumps(to_json(quantizer)))) == quantizer
    assert palette.at(Fraction(3)) == effort.trellis(6)
    assert palette.at(Fraction(8)) == ScalarQuantizer(8)
    assert all(a.distortion > b.distortion for a, b in pairwise(palette.quantizers) if b.rate <= 6)


def test_longer_windows_are_better() -> None:
    for fast, high in zip(default_palette(Effort.FAST).quantizers, default_palette(Effort.HIGH).quantizers, strict=True):
        assert high.distortion < fast.distortion or high.rate > 6


def test_printed() -> None:
    palette = default_palette()
    assert [str(palette.at(Fraction(rate))) for rate in (3, Fraction(13, 4), 7, Fraction(27, 4))] == [
        "trellis 3 L19",
        "trellis 13/4 L19/20",
        "scalar 7",
        "scalar 27/4",
    ]


@pytest.mark.parametrize("family", Family)
def test_palettes_of_one_family(family: Family) -> None:
    palette = palette_of(family)
    first, *_, last = family.ladder()
    assert [q.rate for q in palette.quantizers] == [Fraction(n, 4) for n in range(int(4 * first.rate), int(4 * last.rate) + 1)]
    assert {q.family for q in palette.quantizers} == {first.family}
    assert all(from_json(json.loads(json.dumps(to_json(q)))) == q for q in palette.quantizers)
    assert all(a.distortion > b.distortion > 4.0 ** -float(b.rate) for a, b in pairwise(palette.quantizers))


@pytest.mark.parametrize("family", Family)
def test_every_sixteenth_of_a_bit_can_be_made(family: Family) -> None:
    for low, high in pairwise(family.ladder()):
        for rate in (Fraction(n, 16) for n in range(int(16 * low.rate) + 1, int(16 * high.rate))):
            assert MixedRateQuantizer(low, high, (rate - low.rate) / (high.rate - low.rate)).rate == rate


def test_mixtures_are_printed() -> None:
    assert str(MixedRateQuantizer(VectorQuantizer(2, 5), VectorQuantizer(2, 6), Fraction(1, 2))) == "vector 11/4 D2"
    assert str(MixedRateQuantizer(TrellisQuantizer(6, 18), TrellisQuantizer(7, 20), Fraction(1, 2))) == "trellis 13/4 L18/20"


def test_missing_rate_is_named() -> None:
    with pytest.raises(QuantizerError, match="1/3"):
        default_palette().at(Fraction(1, 3))


@pytest.mark.parametrize("quantizers", [(), (ScalarQuantizer(3), ScalarQuantizer(2)), (ScalarQuantizer(3), TrellisQuantizer(6, 16))])
def test_palette_must_ascend(quantizers: tuple[Any, ...]) -> None:
    with pytest.raises(QuantizerError):
        Palette(quantizers)


def test_effort_is_parsed() -> None:
    assert Effort.parse("fast") is Effort.FAST and Effort.parse(Effort.MAX) is Effort.MAX
    with pytest.raises(QuantizerError, match="fast, default, high, max"):
        Effort.parse("quick")


def test_unlike_quantizers_do_not_mix() -> None:
    half = Fraction(1, 2)
    for low, high, share in [
        (ScalarQuantizer(2), TrellisQuantizer(6, 16), half),
        (VectorQuantizer(4, 8), VectorQuantizer(2, 5), half),
        (ScalarQuantizer(3), ScalarQuantizer(2), half),
        (ScalarQuantizer(2), ScalarQuantizer(3), Fraction(0)),
        (ScalarQuantizer(2), ScalarQuantizer(3), Fraction(1)),
    ]:
        with pytest.raises(QuantizerError):
            MixedRateQuantizer(low, high, share)


@given(st.integers(1, 2000), st.fractions(0, 1).filter(lambda f: 0 < f < 1))
def test_parts_cover_all_columns(in_features: int, share: Fraction) -> None:
    parts = MixedRateQuantizer(ScalarQuantizer(2), ScalarQuantizer(3), share).parts(in_features)
    columns = -(-in_features // 16)
    assert sum(width for _, width in parts) == columns and all(width > 0 for _, width in parts)
    high = sum(width for part, width in parts if part == ScalarQuantizer(3))
    assert abs(high - share * columns) <= Fraction(1, 2)


leaves = st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3)
leaves |= st.sampled_from(["trellis", "scalar", "vector", "mixed"])
names = st.sampled_from(["kind", "bits", "dimension", "step_bits", "window_bits", "low", "high", "high_share"]) | st.text(max_size=3)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5), max_leaves=12)


@given(values)
def test_anything_is_a_quantizer_or_an_error(value: object) -> None:
    try:
        quantizer = from_json(value)
    except QuantizerError:
        return
    assert to_json(quantizer) == value


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "trellis", "step_bits": 6},
        {"kind": "trellis", "step_bits": 6, "window_bits": 16, "extra": 1},
        {"kind": "trellis", "step_bits": True, "window_bits": 16},
        {"kind": "trellis", "step_bits": 6.0, "window_bits": 16},
        {"kind": "trellis", "step_bits": 1, "window_bits": 16},
        {"kind": "scalar", "bits": "3"},
        {"kind": ["scalar"], "bits": 3},
        {"kind": "mixed", "low": {"kind": "scalar", "bits": 2}, "high": {"kind": "scalar", "bits": 3}, "high_share": [1, 0]},
        {"kind": "mixed", "low": {"kind": "mixed"}, "high": {"kind": "scalar", "bits": 3}, "high_share": [1, 2]},
    ],
)
def test_malformed_forms_are_refused(value: object) -> None:
    with pytest.raises(QuantizerError):
        from_json(value)


@given(st.integers(16, 96), st.integers(1, 70), st.integers(1, 400), st.sampled_from(Effort))
@settings(max_examples=60)
def test_every_sixteenth_packs_and_unpacks(sixteenths: int, rows: int, columns: int, effort: Effort) -> None:
    """Any bits are a packed weight of any shape: it decodes to finite values, part by part, in the bytes that were promised."""
    quantizer = trellis_at(Fraction(sixteenths, 16), effort)
    assert quantizer.rate == Fraction(sixteenths, 16)
    assert from_json(json.loads(json.dumps(to_json(quantizer)))) == quantizer
    generator = torch.Generator().manual_seed(sixteenths)
    codes, pieces = [], []
    for part, width in quantizer.parts(columns):
        assert isinstance(part, TrellisQuantizer)
        words = torch.randint(-(1 << 31), 1 << 31, (row_blocks(rows), width, part.block_words), generator=generator).to(torch.int32)
        assert torch.equal(pack(ring_windows(words, part.step_bits, part.step_bits), part.step_bits), words)
        codes.append(words)
        pieces.append(part.decode(words))
    packed = PackedWeight(rows, columns, quantizer, tuple(codes), torch.ones(row_blocks(rows) * BLOCK_ROWS, dtype=torch.bfloat16))
    assert packed.nbytes + Rotation.bytes_for(columns) == quantizer.weight_bytes(rows, columns)
    decoded = packed.rotated()
    assert decoded.isfinite().all() and torch.equal(decoded, torch.cat(pieces, dim=1)[:rows, :columns])


@pytest.mark.parametrize("rate", [Fraction(15, 16), Fraction(97, 16)])
def test_rates_without_a_trellis_are_refused(rate: Fraction) -> None:
    with pytest.raises(QuantizerError, match="from 1 to 6"):
        trellis_at(rate)
