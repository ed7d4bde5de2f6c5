"""Counted times: monotone, never under the bytes, and close to what the built-in GPU was measured to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency import H100, Roofline
from qpc.quant.palette import Effort
from tests.toy import ToyQuantizer

LAYER = tuple(LinearShape(rows, columns) for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
SIZES = st.integers(1, 40_000)
ROOFLINES = st.builds(Roofline, st.just("toy"), st.integers(1, 10**13), st.integers(1, 10**7), st.one_of(st.none(), st.integers(1, 10**13)))
POINTS = st.tuples(st.integers(1, 8), SIZES, SIZES, st.integers(1, 8))


def time(model: Roofline, point: tuple[int, ...]) -> int:
    bits, rows, columns, batch = point
    return model.latency(LinearShape(rows, columns), ToyQuantizer(bits), batch).ps


@given(ROOFLINES, POINTS, POINTS)
def test_more_work_never_takes_less(model: Roofline, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    larger = tuple(map(max, zip(first, second, strict=True)))
    assert max(time(model, first), time(model, second)) <= time(model, larger)


@given(ROOFLINES, st.integers(1, 8), st.lists(SIZES, min_size=2, max_size=4), SIZES, st.integers(1, 8))
def test_a_group_saves_its_launches(model: Roofline, bits: int, members: list[int], columns: int, batch: int) -> None:
    shapes, quantizer = [LinearShape(rows, columns) for rows in members], ToyQuantizer(bits)
    saved = sum(model.latency(shape, quantizer, batch).ps for shape in shapes) - model.group(shapes, quantizer, batch).ps
    assert saved >= 2 * (len(shapes) - 1) * model.launch_ps  # of the multiplication and of the transform


@given(POINTS)
def test_no_kernel_reads_faster_than_memory(point: tuple[int, ...]) -> None:
    bits, rows, columns, batch = point
    found = H100.multiplication(LinearShape(rows, columns), ToyQuantizer(bits), batch)
    assert found.ps >= H100.launch_ps + bits * rows * columns / 8 / H100.read_bytes_per_s * 1e12 * (1 - 1e-12)
    assert found.estimates


@pytest.mark.parametrize(("step_bits", "measured_us"), [(4, 46.0), (6, 49.2), (8, 52.2), (None, 162.8)])
def test_the_built_in_gpu_is_near_what_was_measured(step_bits: int | None, measured_us: float) -> None:
    """The four linears of a layer of Llama 3.1 8B at batch 1, on one H100: the first Triton kernel, and cuBLAS in bfloat16."""
    quantizer = None if step_bits is None else Effort.DEFAULT.trellis(step_bits)
    predicted_us = sum(H100.multiplication(shape, quantizer, 1).ps for shape in LAYER) / 1e6
    assert predicted_us == pytest.approx(measured_us, rel=0.12)


@pytest.mark.parametrize("field", ["read_bytes_per_s", "launch_ps", "decoded_per_s"])
def test_figures_must_be_positive(field: str) -> None:
    values = {"read_bytes_per_s": 1, "launch_ps": 1, "decoded_per_s": 1}
    with pytest.raises(ProfileError, match=f"positive {field}, got 0"):
        Roofline("toy", **{**values, field: 0})
