import json
import re

import pytest

from qpc.ir.annotation import annotate, annotation
from qpc.ir.printer import summary, to_dot, to_json, to_text
from qpc.quant.trellis import TrellisQuantizer
from tests.families import FAMILIES, captured, copied, grouped, model

NAMES = ["gemma3", "gpt2", "siblings"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("printer", [to_text, to_json, to_dot, summary])
def test_printing_is_deterministic_and_free_of_addresses(name: str, printer: type[str]) -> None:
    program = grouped(name)
    text = printer(program)
    assert text == printer(copied(program))
    assert "0x" not in text and " at 0" not in text


@pytest.mark.parametrize("name", NAMES)
def test_text_shows_every_node_linear_and_remark(name: str) -> None:
    program = grouped(name)
    text = to_text(program)
    lines = text.splitlines()
    assert lines[0] == f"{type(model(name)).__name__} at stage GROUPED"
    nodes = [line.split()[0] for line in lines[lines.index("nodes") + 2 : lines.index("linears") - 1]]
    assert nodes == [node.name for node in program.graph.nodes]
    for node in program.linears():
        site = annotation(node).site
        assert site is not None and re.search(rf"^  {re.escape(site.name)}\b.* {site.shape} ", text, re.MULTILINE)
    assert all(str(remark) in text for remark in program.remarks)
    assert not any(line != line.rstrip() for line in lines)


def test_columns_are_aligned() -> None:
    lines = to_text(grouped("gpt2")).splitlines()
    start = lines[lines.index("nodes") + 1].index("computed by")
    body = lines[lines.index("nodes") + 2 : lines.index("linears") - 1]
    assert all(line[start - 1] == " " and line[start] != " " for line in body)


def test_symbolic_sizes_are_named_in_order_of_appearance() -> None:
    text = to_text(captured("llama"))
    assert "int64 [s0, s1]" in text
    assert set(re.findall(r"\bs\d+\b", text)) == {"s0", "s1"}


@pytest.mark.parametrize("name", NAMES)
def test_json_is_the_program(name: str) -> None:
    program = grouped(name)
    document = json.loads(to_json(program))
    assert document["stage"] == "GROUPED" and document["tensors"] == program.tensors
    assert [node["name"] for node in document["nodes"]] == [node.name for node in program.graph.nodes]
    linears = [node["linear"]["name"] for node in document["nodes"] if "linear" in node]
    assert linears == [site.name for node in program.linears() if (site := annotation(node).site) is not None]
    assert len(document["remarks"]) == len(program.remarks)


@pytest.mark.parametrize("name", NAMES)
def test_dot_declares_each_node_once_and_links_only_those(name: str) -> None:
    program = grouped(name)
    dot = to_dot(program)
    quoted = r'"((?:[^"\\]|\\.)*)"'
    declared = re.findall(rf"^ +{quoted} \[label={quoted}(, shape=box, style=bold)?\];$", dot, re.MULTILINE)
    edges = re.findall(rf"^  {quoted} -> {quoted};$", dot, re.MULTILINE)
    names = [name for name, _, _ in declared]
    assert sorted(names) == sorted(node.name for node in program.graph.nodes if node.name not in program.tensors)
    assert {name for edge in edges for name in edge} <= set(names)
    assert [name for name, _, box in declared if box] and sum(bool(box) for _, _, box in declared) == len(list(program.linears()))
    groups = {annotation(node).group for node in program.linears() if len(annotation(node).group.members) > 1}
    assert dot.count("subgraph cluster_") == len(groups)
    # Nothing but declarations, edges and clusters.
    known = len(declared) + len(edges) + 3 * len(groups)
    assert len(dot.splitlines()) == known + 3 and dot.count("{") == dot.count("}")


def test_later_facts_get_columns_of_their_own() -> None:
    program = grouped("mlp")
    assert summary(program).splitlines()[0].split() == ["linear", "shape", "input"]
    first = next(iter(program.linears()))
    annotate(first, annotation(first).but(quantizer=TrellisQuantizer(7, 16), sensitivity=0.5, distortion=0.0102, weight_bytes=1234))
    head, line, other = summary(program).splitlines()
    assert head.split() == ["linear", "shape", "input", "quantizer", "sensitivity", "distortion", "bytes"]
    assert "trellis 7/2 L16" in line and line.split()[-3:] == ["0.5", "0.0102", "1234"]
    assert len(other.split()) == 3
    linear = next(node["linear"] for node in json.loads(to_json(program))["nodes"] if "linear" in node)
    assert (linear["bits_per_weight"], linear["sensitivity"], linear["weight_bytes"]) == ("7/2", 0.5, 1234)


def test_every_family_prints() -> None:
    for name in FAMILIES:
        assert to_text(captured(name)).count("\n") > 100
