"""The numbers of a page are those of the checkpoint."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpc.page.breakdown import sizes, times
from qpc.page.facts import allocation_law, facts
from qpc.page.measures import excess, measures, significant
from qpc.page.table import table
from qpc.quant.palette import Effort, default_palette
from qpc.report import ReportRow, mean_bits
from tests.page.checkpoints import NAMES, compiled, source


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_has_its_cell(name: str) -> None:
    value = facts(source(name))
    rows = [row for stack in value["stacks"] for cell in stack["cells"] for row in cell["rows"]]
    assert sorted(rows) == list(range(len(source(name).report.rows)))
    for stack in value["stacks"]:
        places = [(cell["layer"], cell["kind"]) for cell in stack["cells"]]
        assert len(set(places)) == len(places)
        assert all(layer < len(stack["layers"]) and kind < len(stack["kinds"]) for layer, kind in places)
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("name", NAMES)
def test_cells_have_the_numbers_of_the_report(name: str) -> None:
    report = source(name).report
    for stack in facts(source(name))["stacks"]:
        for cell in stack["cells"]:
            rows = [report.rows[index] for index in cell["rows"]]
            assert cell["values"]["bits"] == mean_bits(rows)
            assert cell["texts"]["bits"] == f"{mean_bits(rows):.2f}"
            assert cell["values"]["bytes"] == pytest.approx(sum(row.weight_bytes for row in rows) / 1e3)
            assert cell["kept"] == all(row.quantizer is None for row in rows)


@pytest.mark.parametrize("name", ["llama", "llama_packed", "gemma3"])
def test_losses_add_up_to_what_was_predicted(name: str) -> None:
    given_ = source(name)
    assert math.fsum(given_.loss(row) or 0.0 for row in given_.report.rows) == pytest.approx(given_.report.predicted_loss, rel=1e-9)


def test_times_add_up_to_what_was_predicted() -> None:
    found, report = times(source("llama")), source("llama").report
    assert found is not None and report.latency_s is not None
    assert found.after == pytest.approx(report.latency_s, rel=1e-9)
    assert found.before == pytest.approx(sum(row.latency_before_s or 0.0 for row in report.rows), rel=1e-9)
    assert times(source("gemma3")) is None


@pytest.mark.parametrize("name", NAMES)
def test_sizes_add_up_to_the_stored_tensors(name: str) -> None:
    report, found = source(name).report, sizes(source(name))
    stored = {id(tensor): tensor for tensor in compiled(name).state_dict(keep_vars=True).values()}
    assert found.after == pytest.approx(sum(source(name).tensors.values()))
    assert found.after == pytest.approx(sum(tensor.nbytes for tensor in stored.values()), rel=0.02)
    assert found.before - found.after == pytest.approx(report.model_bytes_before - report.model_bytes)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_ideal_quantizers_of_the_line_take_the_same_bits(name: str) -> None:
    law, rows = allocation_law(source(name)), source(name).report.rows
    assert law is not None
    ideal = [max(0.0, math.log2(point["felt"] / law["level"]) / 2) * rows[point["row"]].weights for point in law["points"]]
    assert math.fsum(ideal) == pytest.approx(math.fsum(point["bits"] * rows[point["row"]].weights for point in law["points"]))


@given(st.sampled_from(sorted(default_palette(Effort.FAST).quantizers, key=str)))
def test_no_quantizer_lies_below_the_bound(quantizer: object) -> None:
    rate, distortion = Fraction(quantizer.rate), quantizer.distortion  # type: ignore[attr-defined]
    row = ReportRow("a", 1, 1, str(quantizer), float(rate), 1, distortion, None, None, ("a",), None)
    found = excess(row)
    assert found is not None and found >= 0
    assert 10 ** (found / 10) * 2.0 ** (-2 * float(rate)) == pytest.approx(distortion)


def test_measures_are_those_that_are_known() -> None:
    assert [measure.key for measure in measures(source("llama"))] == ["bits", "sensitivity", "excess", "loss", "bytes", "time"]
    assert [measure.key for measure in measures(source("gemma3"))] == ["bits", "sensitivity", "excess", "loss", "bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_values_of_the_report(name: str) -> None:
    found, rows = table(source(name)), source(name).report.rows
    titles = [title for title, _ in found.titles]
    assert [line[titles.index("linear")].value for line in found.lines] == [row.name for row in rows]
    assert [line[titles.index("bits")].value for line in found.lines] == [row.bits for row in rows]
    assert [line[titles.index("size")].value for line in found.lines] == [row.weight_bytes for row in rows]
    assert all(len(line) == len(titles) for line in found.lines)


@given(st.floats(1e-12, 1e12), st.integers(1, 5))
def test_significant_digits(value: float, digits: int) -> None:
    assert float(significant(value, digits)) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))
    assert significant(-value, digits) == f"-{significant(value, digits)}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123, "0.012"), (0.0996, "0.10"), (7.68, "7.7"), (1234.0, "1234"), (3.2e-6, "3.2e-6"), (2e7, "2.0e7")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert significant(value, 2) == text
