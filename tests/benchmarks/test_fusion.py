"""Choosing groups and quantizers together is never worse, and every way keeps the time that it is given."""

import pytest

pytest.importorskip("triton", reason="the adapters import the Triton kernels")

from benchmarks.allocation import Model
from benchmarks.fusion import NAMES, SHARES, Subject, draw, measure
from qpc.latency import Roofline
from qpc.passes.allocate import TIMED_GAP
from qpc.passes.timed_items import Timing

TINY = Model("tiny", 2, 256, 64, 512)


def test_together_is_never_worse_within_the_same_time(tmp_path) -> None:
    timing = Timing(Roofline("toy", read_bytes_per_s=10**11, launch_ps=200_000))
    rows = list(measure(Subject.of(TINY, seed=1), timing))
    assert [row["share"] for row in rows] == list(SHARES)
    for row in rows:
        for name in NAMES:
            assert (row[name] is None) == (row[f"{name}_us"] is None)
            if row[name] is not None:
                assert row[f"{name}_us"] <= row["latency_us"]
                assert row["aware"] is not None and row["aware"] <= row[name] * (1 + TIMED_GAP)
    assert any(row["blind"] is not None and row["aware"] < 0.95 * row["blind"] for row in rows)
    draw(rows, "toy", tmp_path / "fusion.png")
    assert (tmp_path / "fusion.png").stat().st_size > 10_000
