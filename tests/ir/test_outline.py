"""The outline of a block holds its linears, before and after, and what flows between them."""

from functools import cache

import networkx as nx
import pytest

from qpc.ir.annotation import site_of
from qpc.ir.outline import outline
from qpc.ir.sketch import Block, Role, Sketch
from qpc.passes.allocate import Allocate
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.quant.scalar import ScalarQuantizer
from qpc.report import Place, typical_block
from tests.families import grouped

FAMILIES = ("gemma3", "gpt2", "llama", "olmo2", "phi3")
"""Norms before, after and within attention; biases and transposed weights; linears that the model has stacked itself."""


def sites(family: str) -> set[str]:
    return {site_of(node).name for node in grouped(family).linears()}


@cache
def block(family: str) -> Block:
    """With one quantizer for all linears, so that whole groups are fused."""
    program = grouped(family)
    name = typical_block(sites(family))
    assert name is not None
    before = outline(program, name)
    Pipeline((Allocate.uniform(ScalarQuantizer(4)), Quantize(), Lower())).run(program)
    after = outline(program, name)
    assert before is not None and after is not None
    return Block(name, before, after)


def flow(sketch: Sketch) -> "nx.DiGraph[int]":
    graph = nx.DiGraph(sketch.arrows)
    graph.add_nodes_from(range(len(sketch.boxes)))
    return graph


def linears(sketch: Sketch) -> dict[str, int]:
    return {box.name: number for number, box in enumerate(sketch.boxes) if box.role is Role.LINEAR}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_hold_the_linears_of_the_block(family: str) -> None:
    found = block(family)
    expected = {name for name in sites(family) if name.startswith(f"{found.name}.")}
    assert linears(found.before).keys() == linears(found.after).keys() == expected
    assert Place.of(next(iter(expected))).layer == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_box_lies_between_input_and_output(family: str) -> None:
    for sketch in (block(family).before, block(family).after):
        graph = flow(sketch)
        ends = [number for number, box in enumerate(sketch.boxes) if box.role in (Role.INPUT, Role.OUTPUT)]
        assert [sketch.boxes[number].role for number in ends] == [Role.INPUT, Role.OUTPUT]
        between = nx.descendants(graph, ends[0]) & nx.ancestors(graph, ends[1])
        assert between | set(ends) == set(graph)
        assert len(graph) <= 30


@pytest.mark.parametrize("family", FAMILIES)
def test_lowering_adds_transforms_and_changes_no_other_box(family: str) -> None:
    before, after = block(family).before, block(family).after
    assert not any(box.role is Role.TRANSFORM for box in before.boxes)
    assert sorted(box.label for box in before.boxes) == sorted(box.label for box in after.boxes if box.role is not Role.TRANSFORM)
    without = flow(after)
    for number in [number for number, box in enumerate(after.boxes) if box.role is Role.TRANSFORM]:
        without.add_edges_from((source, target) for source in without.predecessors(number) for target in without.successors(number))
        without.remove_node(number)

    def named(sketch: Sketch, graph: "nx.DiGraph[int]") -> set[tuple[str, str]]:
        return {(sketch.boxes[a].label + sketch.boxes[a].name, sketch.boxes[b].label + sketch.boxes[b].name) for a, b in graph.edges}

    assert named(after, without) == named(before, flow(before))


def test_members_of_a_group_read_one_transform() -> None:
    after = block("llama").after
    graph, numbers = flow(after), linears(block("llama").after)
    groups = {box.group for box in after.boxes if len(box.group) > 1}
    assert groups
    for group in groups:
        (read,) = {frozenset(graph.predecessors(numbers[name])) for name in group}
        assert [after.boxes[number].role for number in read] == [Role.TRANSFORM]


def test_residuals_are_arrows_of_their_own() -> None:
    before = block("llama").before
    additions = [number for number, box in enumerate(before.boxes) if box.label == "add"]
    assert len(additions) == 2
    assert (0, additions[0]) in before.arrows and tuple(additions) in before.arrows


def test_a_module_that_is_not_there_has_no_outline() -> None:
    assert outline(grouped("llama"), "model.layers.7") is None
