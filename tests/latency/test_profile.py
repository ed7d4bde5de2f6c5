"""Measured tables: exact where they were measured, monotone everywhere, honest beyond."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rows import write_rows
from benchmarks.timing import Card
from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency import Profile
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import Quantizer
from qpc.quant.scalar import ScalarQuantizer
from tests.latency.tables import (
    BATCHES,
    COLUMNS,
    LAUNCH_US,
    RATES,
    ROWS,
    Row,
    file,
    full,
    ideal_us,
    multiplication,
    noisy,
    profile,
    transform,
)
from tests.toy import ToyQuantizer

FEW = settings(max_examples=50)
SIZES = st.integers(1, 40_000)
MIXTURES = [MixedRateQuantizer(ToyQuantizer(b), ToyQuantizer(b + 1), Fraction(i, 4)) for b in range(1, 6) for i in (1, 2, 3)]
QUANTIZERS: list[Quantizer] = sorted([*MIXTURES, *(ToyQuantizer(bits) for bits in range(1, 7))], key=lambda q: q.rate)
IDEAL = profile(full())


def ps(us: float) -> int:
    return round(us * 1_000_000)


def test_mixtures_have_lines_of_their_own_where_they_were_measured() -> None:
    """They may take longer than the higher of their two rates; without such lines they lie between rates."""
    mixture, shape = MixedRateQuantizer(ToyQuantizer(2), ToyQuantizer(3), Fraction(1, 2)), LinearShape(ROWS[0], COLUMNS[0])
    slow = [row | {"rate": 2.5, "mixture": True, "us": 2 * row["us"]} for row in full() if row.get("rate") == 3 and row["family"] != "bf16"]
    made = profile([*full(), *slow])
    whole = made.multiplication(shape, ToyQuantizer(3), BATCHES[0])
    found = made.multiplication(shape, mixture, BATCHES[0])
    assert found.ps == pytest.approx(2 * whole.ps, abs=2) and not found.estimates
    assert whole.ps == IDEAL.multiplication(shape, ToyQuantizer(3), BATCHES[0]).ps
    assert IDEAL.multiplication(shape, mixture, BATCHES[0]).ps < whole.ps


@given(st.permutations(ROWS), st.floats(1.0, 8.0), st.data())
@FEW
def test_measured_points_are_exact(_: Any, power: float, data: st.DataObject) -> None:
    """Whatever the times, as long as more work takes no less."""
    rows = full(lambda rate, rows, columns: LAUNCH_US + (rate * rows * columns / 2**24) ** (1 / power))
    made = profile(rows)
    assert made.correction == 0.0
    row = data.draw(st.sampled_from([row for row in rows if "family" in row]))
    quantizer = None if row["family"] == "bf16" else ToyQuantizer(int(row["rate"]))
    found = made.multiplication(LinearShape(row["out_features"], row["in_features"]), quantizer, row["batch"])
    assert found.ps == ps(row["us"]) and not found.estimates


@given(st.sampled_from(QUANTIZERS), SIZES, SIZES, st.integers(1, 8))
@FEW
def test_a_kernel_that_only_reads_is_predicted_everywhere(quantizer: Quantizer, rows: int, columns: int, batch: int) -> None:
    """Interpolation and extrapolation upwards are exact for launch + bytes / bandwidth; below the table they are an upper bound."""
    found = IDEAL.multiplication(LinearShape(rows, columns), quantizer, batch)
    rate, held = float(quantizer.rate), (max(float(quantizer.rate), RATES[0]), max(rows, ROWS[0]), max(columns, COLUMNS[0]))
    assert abs(found.ps - ps(ideal_us(*held))) <= 1
    inside = RATES[0] <= rate <= RATES[-1] and ROWS[0] <= rows <= ROWS[-1] and COLUMNS[0] <= columns <= COLUMNS[-1]
    assert bool(found.estimates) == (not inside)


@given(noisy(), st.lists(st.tuples(st.integers(0, len(QUANTIZERS) - 1), SIZES, SIZES, st.integers(1, 8)), min_size=2, max_size=8))
@FEW
def test_more_work_never_takes_less(rows: list[Row], points: list[tuple[int, int, int, int]]) -> None:
    made = profile(rows)

    def time(point: tuple[int, ...]) -> int:
        return made.latency(LinearShape(point[1], point[2]), QUANTIZERS[point[0]], point[3]).ps

    for first in points:
        for second in points:
            larger = tuple(map(max, zip(first, second, strict=True)))
            assert time(first) <= time(larger)


@given(noisy(), st.data())
@FEW
def test_noise_is_corrected_by_no_more_than_there_was(rows: list[Row], data: st.DataObject) -> None:
    """The true times are monotone and off by at most `worst`, so the fit is too."""
    made, true = profile(rows), {**{key(row): row["us"] for row in full()}}
    row = data.draw(st.sampled_from([row for row in rows if "family" in row]))
    quantizer = None if row["family"] == "bf16" else ToyQuantizer(int(row["rate"]))
    found = made.multiplication(LinearShape(row["out_features"], row["in_features"]), quantizer, row["batch"])
    worst = max(max(r["us"] / true[key(r)], true[key(r)] / r["us"]) for r in rows)
    assert not found.estimates
    assert 1 / worst - 1e-6 <= found.ps / ps(row["us"]) <= worst + 1e-6
    assert made.correction <= worst - 1 + 1e-6


def key(row: Row) -> tuple[Any, ...]:
    return tuple(value for name, value in row.items() if not name.startswith("us"))


@given(noisy(), st.sampled_from(QUANTIZERS), st.lists(SIZES, min_size=1, max_size=4), SIZES, st.integers(1, 8))
@FEW
def test_a_group_never_takes_longer_than_its_members(
    rows: list[Row], quantizer: Quantizer, members: list[int], columns: int, batch: int
) -> None:
    made, shapes = profile(rows), [LinearShape(count, columns) for count in members]
    group = made.group(shapes, quantizer, batch)
    assert group.ps <= sum(made.latency(shape, quantizer, batch).ps for shape in shapes)
    assert group.ps >= made.latency(max(shapes, key=lambda shape: shape.out_features), quantizer, batch).ps


def test_a_group_is_one_launch_and_one_transform() -> None:
    shapes = [LinearShape(rows, 4096) for rows in (4096, 1024, 1024)]
    apart = sum(IDEAL.latency(shape, ToyQuantizer(3), 1).ps for shape in shapes)
    together = IDEAL.group(shapes, ToyQuantizer(3), 1)
    assert apart - together.ps == 2 * (ps(LAUNCH_US) + IDEAL.transform(4096, 1).ps) and not together.estimates
    assert IDEAL.group(shapes, None, 1).ps == sum(ps(ideal_us(16.0, shape.out_features, 4096)) for shape in shapes)


def test_a_crossing_that_was_left_out_is_an_estimate() -> None:
    """The largest shapes are not measured: the time there is proportional, and says that it is not measured."""
    largest = {"out_features": ROWS[-1], "in_features": COLUMNS[-1]}
    made = profile([row for row in full() if not largest.items() <= row.items()])
    found = made.multiplication(LinearShape(ROWS[-1], COLUMNS[-1]), ToyQuantizer(3), 1)
    assert abs(found.ps - ps(ideal_us(3.0, ROWS[-1], COLUMNS[-1]))) <= 1 and len(found.estimates) == 1
    assert made.multiplication(LinearShape(ROWS[-1] - 1, COLUMNS[-1] - 1), ToyQuantizer(3), 1).estimates
    assert not made.multiplication(LinearShape(ROWS[-1] - 1, COLUMNS[-2]), ToyQuantizer(3), 1).estimates
    assert not made.multiplication(LinearShape(ROWS[-2], COLUMNS[-1]), ToyQuantizer(3), 1).estimates


def test_failed_rows_and_other_transforms_are_left_out() -> None:
    rows = full()
    failed = {**multiplication("toy", 8.0, 1, 512, 1024, 0.0), "us": None, "error": "out of memory"}
    assert profile([*rows, failed, transform(1, 1024, 9.0, "rms_norm"), transform(1, 1024, 9.0, "rotate")]) == IDEAL


def test_without_transforms_each_is_a_launch_and_an_estimate() -> None:
    made = profile([row for row in full() if "family" in row])
    found = made.latency(LinearShape(1024, 4096), ToyQuantizer(2), 1)
    assert found.ps == ps(LAUNCH_US) + ps(ideal_us(2.0, 1024, 4096))
    assert found.estimates == ("no transform was measured on NVIDIA Toy: each counts as one launch",)
    assert not made.latency(LinearShape(1024, 4096), None, 1).estimates


def test_files_of_one_gpu_are_put_together(tmp_path: Path) -> None:
    rows = full()
    paths = [tmp_path / "profile.json", tmp_path / "transform.json"]
    for path, part in zip(paths, (True, False), strict=True):
        path.write_text(json.dumps(file([row for row in rows if ("family" in row) == part])))
    assert Profile.load(*paths) == IDEAL
    paths[1].write_text(json.dumps(file([], "NVIDIA Other")))
    with pytest.raises(ProfileError, match="of one GPU, got files of NVIDIA Other, NVIDIA Toy"):
        Profile.load(*paths)


def test_what_the_benchmarks_write_is_what_a_profile_reads(tmp_path: Path) -> None:
    card = Card("NVIDIA Toy", (9, 0), 132, read_gb_s=3000.0, copy_gb_s=2800.0, launch_us=LAUNCH_US)
    write_rows(tmp_path / "profile.json", "profile", full(), card.row)
    assert Profile.load(tmp_path / "profile.json") == IDEAL


@pytest.mark.parametrize(
    ("quantizer", "batch", "message"),
    [
        (ScalarQuantizer(3), 1, "no times of family 'scalar'; it has bf16, toy"),
        (ToyQuantizer(3), 9, "batch=9 must be from 1 to 8"),
        (ToyQuantizer(3), 0, "batch=0 must be positive"),
    ],
)
def test_other_kernels_are_not_guessed(quantizer: Quantizer, batch: int, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        IDEAL.latency(LinearShape(1024, 1024), quantizer, batch)


def test_a_group_reads_one_input() -> None:
    for shapes in ([], [LinearShape(8, 8), LinearShape(8, 16)]):
        with pytest.raises(ProfileError, match="linears of one in_features"):
            IDEAL.group(shapes, ToyQuantizer(3), BATCHES[0])


ROW = multiplication("toy", 2.0, 1, 512, 1024, 3.0)
HEAD = {"gpu": "NVIDIA Toy", "launch_us": 1.0, "read_gb_s": 3000.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "toy.json must be an object, got list"),
        ({"format": 2}, "toy.json has format 2, required 1"),
        ({"format": 1}, "toy.json has no measured_with"),
        ({"format": 1, "measured_with": HEAD}, "toy.json has no rows"),
        ({"format": 1, "measured_with": HEAD, "rows": {}}, "rows must be a list"),
        ({"format": 1, "measured_with": HEAD, "rows": []}, "needs measured multiplications, got none"),
        ({"format": 1, "measured_with": {"gpu": "NVIDIA Toy"}, "rows": [ROW]}, "measured_with has no launch_us"),
        (file([{**ROW, "us": -1}]), "row 0: us must be a positive number, got -1"),
        (file([{**ROW, "us": float("nan")}]), "row 0: us must be a positive number, got nan"),
        (file([{**ROW, "us": 10**400}]), r"row 0: us must be at most 1e\+12, got 1e\+300"),
        (file([ROW, {**ROW, "batch": 1.5}]), "row 1: batch must be a whole number, got 1.5"),
        (file([{**ROW, "batch": True}]), "row 0: batch must be a positive number, got True"),
        (file([{**ROW, "family": 3}]), "row 0: family must be a name, got 3"),
        (file([{k: v for k, v in ROW.items() if k != "rate"}]), "row 0 has no rate"),
        (file([ROW, ROW]), "row 1 measures again what another row did"),
        (file(["row"]), "row 0 must be an object, got str"),
    ],
)
def test_malformed_files_say_where(content: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        Profile.parse({"toy.json": content})


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ProfileError, match=name):
            Profile.load(tmp_path / name)
