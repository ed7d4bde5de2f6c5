"""Reports survive JSON, add up, and fit any terminal."""

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qpc.errors import CheckpointError
from qpc.ir.sketch import Block, Box, Role, Sketch
from qpc.report import (
    LATER_FIELDS,
    LATER_ROW_FIELDS,
    Place,
    Report,
    ReportRow,
    allocation_table,
    headings,
    remarks,
    size,
    summary,
    typical_block,
)

words = st.text(st.characters(categories=["Lu", "Ll", "Nd", "Po"]), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.lists(st.sampled_from(["model", "layers", "0", "1", "17", "mlp", "up", "experts", "w1"]), min_size=1, max_size=6).map(".".join)
rows = st.builds(
    ReportRow,
    name=names,
    out_features=st.integers(1, 9999),
    in_features=st.integers(1, 9999),
    quantizer=st.none() | words,
    bits=finite,
    weight_bytes=st.integers(0, 10**12),
    distortion=st.none() | finite,
    sensitivity=st.none() | finite,
    remaining=st.none() | finite,
    group=st.lists(names, max_size=3).map(tuple),
    reason=st.none() | words,
    budgeted=st.booleans(),
    latency_s=st.none() | finite,
    latency_before_s=st.none() | finite,
)
boxes = st.builds(Box, st.sampled_from(Role), words, names, st.lists(names, max_size=3).map(tuple), st.lists(words, max_size=3).map(tuple))
sketches = st.lists(boxes, min_size=2, max_size=5).flatmap(
    lambda found: st.builds(
        Sketch,
        st.just(tuple(found)),
        st.lists(st.permutations(range(len(found))).map(lambda order: tuple(sorted(order[:2]))), max_size=5).map(tuple),
    )
)
reports = st.builds(
    Report,
    rows=st.lists(rows, max_size=5).map(tuple),
    remarks=st.lists(words, max_size=4).map(tuple),
    budget=words,
    seed=st.integers(0, 2**31),
    effort=words,
    calibration=st.none() | words,
    model_bytes=st.integers(0, 10**13),
    model_bytes_before=st.integers(0, 10**13),
    predicted_loss=st.none() | finite,
    solver_gap=st.none() | finite,
    gpu=st.none() | words,
    batch=st.none() | st.integers(1, 64),
    latency_s=st.none() | finite,
    block=st.none() | st.builds(Block, names, sketches, sketches),
)


def row(name: str, bits: float = 3.0, quantizer: str | None = "trellis 3", group: tuple[str, ...] = ()) -> ReportRow:
    return ReportRow(name, 64, 32, quantizer, bits, int(64 * 32 * bits / 8), 0.02, 1.0, 0.4, group or (name,), None)


def report(*entries: ReportRow, notes: tuple[str, ...] = ()) -> Report:
    return Report(entries, notes, "3bit", 0, "default", "given, 90 tokens", 10_000, 40_000, 0.25, 0.0)


def printed(part: Any, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(part)
    return out.getvalue()


def llama(layers: int) -> Report:
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    return report(*(row(f"model.layers.{i}.{kind}", 2 + (i + len(kind)) % 5 / 2) for i in range(layers) for kind in kinds))


@settings(max_examples=30)
@given(reports)
def test_json_round_trip(value: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(value.to_json()))) == value


@settings(max_examples=30)
@given(reports, st.data())
def test_a_field_less_or_more_is_refused(value: Report, data: st.DataObject) -> None:
    entries = value.to_json()
    del entries[data.draw(st.sampled_from(sorted(entries.keys() - set(LATER_FIELDS))))]
    with pytest.raises(CheckpointError, match="lacks"):
        Report.from_json(entries)
    with pytest.raises(CheckpointError, match="unknown field 'colour'"):
        Report.from_json(value.to_json() | {"colour": 1})


def test_an_earlier_report_is_read() -> None:
    value = report(row("a"))
    entries = {name: entry for name, entry in value.to_json().items() if name not in LATER_FIELDS}
    entries["rows"] = [{name: entry for name, entry in each.items() if name not in LATER_ROW_FIELDS} for each in entries["rows"]]
    assert Report.from_json(entries) == value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "0", "report.seed must be int"),
        (("seed",), True, "report.seed must be int"),
        (("rows",), {}, "report.rows must be list"),
        (("remarks",), [1], r"report.remarks\[0\] must be str"),
        (("rows", 0), 3, r"report.rows\[0\] must be an object"),
        (("rows", 0, "bits"), None, r"report.rows\[0\].bits must be int or float"),
        (("rows", 0, "group"), [None], r"report.rows\[0\].group\[0\] must be str"),
        (("rows", 0, "latency_s"), "1", r"report.rows\[0\].latency_s must be int or float"),
        (("block",), {"name": "h.1"}, "report.block must be an object of name, before and after"),
        (("block",), {"name": "h.1", "before": {}, "after": {}}, "report.block is malformed"),
        (("block",), {"name": "h.1", "before": {"boxes": [], "arrows": [[0, 1]]}, "after": {}}, "must lead to a later box"),
    ],
)
def test_ill_typed_fields_are_named(path: tuple[str | int, ...], value: object, message: str) -> None:
    entries: Any = report(row("a")).to_json()
    target = entries
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        Report.from_json(entries)


def test_totals_count_what_is_quantized() -> None:
    value = report(row("a", 3.0), row("b", 4.0), row("head", 32, quantizer=None))
    assert value.linear_weights == 2 * 64 * 32
    assert value.linear_bytes == 64 * 32 * 7 // 8
    assert value.bits_per_weight == pytest.approx(3.5)
    assert report(row("head", 32, quantizer=None)).bits_per_weight == 0


def test_places() -> None:
    assert Place.of("model.layers.3.mlp.experts.7.w1") == Place("model.layers", 3, "mlp.experts.*.w1")
    assert Place.of("lm_head") == Place("", None, "lm_head")
    assert Place.of("0") == Place("", None, "0")
    assert Place.of("blocks.12") == Place("", None, "blocks.12")


def test_the_typical_block_is_in_the_middle_of_the_longest_stack() -> None:
    names = [f"encoder.h.{i}.fc" for i in range(3)] + [f"decoder.h.{i}.fc" for i in (0, 2, 4, 6, 8)] + ["head"]
    assert typical_block(names) == "decoder.h.4"
    assert typical_block(["0.fc"]) == "0"
    assert typical_block(["head", "0"]) is None


@given(st.lists(names, min_size=1, max_size=8, unique=True))
def test_headings_are_distinct_endings(columns: list[str]) -> None:
    found = headings(columns)
    assert len(set(found.values())) == len(columns)
    assert all(f".{column}".endswith(f".{heading}") for column, heading in found.items())


@settings(max_examples=30)
@given(reports, st.sampled_from([40, 80, 100, 200]))
def test_nothing_is_wider_than_the_terminal_or_coloured_in_a_pipe(value: Report, width: int) -> None:
    for part in (allocation_table(value), summary(value), remarks(value)):
        text = printed(part, width)
        assert all(len(line) <= width for line in text.splitlines())
        assert "\x1b" not in text


def test_the_grid_shows_every_layer_and_kind_in_80_columns() -> None:
    lines = printed(allocation_table(llama(30)), 80).splitlines()
    assert lines[0].split() == ["model.layers", *(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")), "mean"]
    assert [line.split()[0] for line in lines[1:]] == [*map(str, range(30)), "mean"]
    assert all(len(line.split()) == 9 for line in lines)


def test_layers_that_agree_share_a_line() -> None:
    value = report(*(row(f"h.{i}.fc", 4.0 if i == 7 else 3.0) for i in range(12)), row("head", 16, quantizer=None))
    lines = [line.split() for line in printed(allocation_table(value), 80).splitlines()]
    assert lines[1:4] == [["0-6", "3.00", "3.00"], ["7", "4.00", "4.00"], ["8-11", "3.00", "3.00"]]
    assert ["head", "16"] in lines


def test_experts_are_averaged() -> None:
    value = report(*(row(f"h.0.experts.{i}.w1", 2.0 + 2 * (i % 2)) for i in range(8)))
    assert printed(allocation_table(value), 80).splitlines()[1].split() == ["0", "3.00", "3.00"]


def test_summary_tells_sizes_and_groups() -> None:
    pairs = [tuple(f"h.{i}.{kind}" for kind in ("gate", "up")) for i in range(3)]
    text = printed(summary(report(*(row(name, group=pair) for pair in pairs for name in pair))), 100)
    for expected in (
        "40.0 kB -> 10.0 kB, 4.00x smaller",
        "3.000 bits per weight",
        "KL 0.2500 nats",
        "optimal",
        "gate + up: 3 groups",
        "given, 90 tokens",
    ):
        assert expected in text


def test_summary_of_a_model_without_linears_tells_no_speed() -> None:
    assert "tokens/s" not in printed(summary(replace(report(), gpu="h100", batch=1, latency_s=0.0)), 100)
    assert "tokens/s" in printed(summary(replace(report(), gpu="h100", batch=1, latency_s=1e-3)), 100)


def test_similar_remarks_share_a_line() -> None:
    notes = (*(f"allocate: h.{i}.up, h.{i}.gate: split: up got {i + 3} bits" for i in range(5)), "quantize: head: excluded")
    lines = printed(remarks(report(notes=notes)), 100).strip().splitlines()
    assert len(lines) == 2
    assert "(and 4 like it)" in lines[0]


def test_markup_in_names_is_printed_as_it_is() -> None:
    assert "h[bold].w" in printed(allocation_table(report(row("h[bold].w"))), 80)
    assert "[red]x" in printed(remarks(report(notes=("p: [red]x: y",))), 80)


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (53_100_000, "53.1 MB"), (1_500, "1.5 kB"), (16_060_000_000, "16.06 GB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
