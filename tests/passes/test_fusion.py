from collections import Counter
from itertools import combinations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.annotation import FusionGroup, LinearShape, annotation
from qpc.ir.network import view
from qpc.ir.program import Program
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import ALL_SUBSETS_UP_TO, Fusion, candidates
from qpc.passes.pipeline import Pipeline
from tests.families import FAMILIES, grouped, plain_inputs, seeded


def fused(module: nn.Module) -> Program:
    program = capture(module, example_inputs=plain_inputs())
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def groups(program: Program) -> list[tuple[str, ...]]:
    found = dict.fromkeys(annotation(node).group for node in program.linears())
    return [group.members for group in found if group is not None]


def reasons(program: Program) -> dict[str, str]:
    return {remark.subject: remark.reason for remark in program.remarks if remark.pass_name == "fusion"}


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_of_every_family(name: str) -> None:
    """q, k, v and gate, up where a family has them apart; nothing else is grouped."""
    apart = Counter(tuple(member.rpartition(".")[2] for member in members) for members in groups(grouped(name)) if len(members) > 1)
    expected = {} if name in ("phi3", "gpt2") else {("q_proj", "k_proj", "v_proj"): 2, ("gate_proj", "up_proj"): 2}
    assert apart == expected


def test_a_linear_that_needs_another_stays_out() -> None:
    program = grouped("siblings")
    assert groups(program) == [("left", "right"), ("last",)]
    assert reasons(program) == {"last": "it depends on left"}


def test_shared_and_repeated_weights() -> None:
    assert groups(grouped("shared")) == [("a",), ("b",)]
    assert reasons(grouped("shared")) == {"b": "it shares its weight with a"}
    assert groups(grouped("twice")) == [("step",), ("step",)]


class Readers(nn.Module):
    """Four linears on `x`, each reading it in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        same = self.a(y) + self.b(y.float().contiguous().view(y.shape)) + self.c(nn.functional.dropout(x, training=False) + 1)
        return same + self.d(y.view(-1, 32)).view(x.shape)


def test_values_count_not_nodes() -> None:
    assert groups(fused(seeded(Readers))) == [("a", "b", "c"), ("d",)]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.b.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x.bfloat16()).float(), self.c(x)])


def test_casts_are_other_values() -> None:
    assert groups(fused(seeded(Mixed))) == [("a", "c"), ("b",)]


class Dtypes(nn.Module):
    """Two dtypes under one operator, as autocast would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)])


def test_weights_of_another_dtype() -> None:
    module = seeded(Dtypes)
    program = capture(module, example_inputs=plain_inputs())
    module.b.to(torch.bfloat16)
    Canonicalize().run(program)
    result = Fusion().run(program)
    assert groups(program) == [("a",), ("b",)]
    assert [remark.reason for remark in result.remarks] == ["its weight is torch.bfloat16, that of a is torch.float32"]


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        first = self.a(y)
        y[:, :1].mul_(2)
        return first + self.b(y)


def test_a_value_that_changes_between_its_readers() -> None:
    program = fused(seeded(Overwriting))
    assert groups(program) == [("a",), ("b",)]
    assert set(reasons(program).values()) == {"its input is written to in place"}


class Recurring(nn.Module):
    """One block applied three times; `extra` joins `q` and `k` in one of the applications of `partial` only."""

    def __init__(self, partial: bool) -> None:
        super().__init__()
        self.q, self.k, self.extra = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.partial = partial

    def forward(self, x: Tensor) -> Tensor:
        for step in range(3):
            y = self.q(x) * self.k(x)
            x = (y + self.extra(x) if self.partial and step == 1 else y).tanh()
        return x


def test_a_block_that_is_applied_many_times_is_grouped_alike_each_time() -> None:
    program = fused(seeded(lambda: Recurring(partial=False)))
    assert groups(program) == [("q", "k")] * 3
    program = fused(seeded(lambda: Recurring(partial=True)))
    assert sorted(groups(program)) == sorted([("q",)] * 3 + [("k",)] * 3 + [("extra",)])
    assert reasons(program)["q"] == "its weight is applied elsewhere with other partners"


class Entangled(nn.Module):
    """`a` and `d` read x, `b` and `c` read y; the bias of `c` needs `a`, that of `d` needs `b`: either group is legal, not both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        a, b = self.a(x), self.b(y)
        c = nn.functional.linear(y, self.c.weight, a.mean((0, 1)))
        return c + nn.functional.linear(x, self.d.weight, b.mean((0, 1)))


def merged(program: Program) -> "nx.DiGraph[str]":
    """The graph with every group as one node."""
    owner = {
        node.name: f"{group.input}:{group.members}" if len(group.members) > 1 else node.name
        for node in program.linears()
        if (group := annotation(node).group) is not None
    }
    return nx.relabel_nodes(view(program), owner)


def test_groups_that_would_wait_for_each_other() -> None:
    program = fused(seeded(Entangled))
    assert groups(program) == [("a",), ("b", "c"), ("d",)]
    assert set(reasons(program).values()) == {"its group and another would wait for each other"}
    assert nx.is_directed_acyclic_graph(merged(program))


class Wired(nn.Module):
    """Linears wired at random: each reads one earlier value, and may take its bias from another."""

    def __init__(self, wiring: list[tuple[int, int | None]]) -> None:
        super().__init__()
        self.wiring = wiring
        self.linears = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in wiring)

    def forward(self, x: Tensor) -> Tensor:
        values = [x, x.sin()]
        for linear, (source, bias) in zip(self.linears, self.wiring, strict=True):
            added = None if bias is None else values[bias % len(values)].mean((0, 1))
            values.append(nn.functional.linear(values[source % len(values)], linear.weight, added))
        return torch.stack(values).sum(0)


@settings(max_examples=25, database=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.none() | st.integers(0, 7)), min_size=2, max_size=7))
def test_groups_of_random_graphs_are_legal_and_maximal(wiring: list[tuple[int, int | None]]) -> None:
    program = fused(Wired(wiring).eval())
    network = view(program)
    nodes = {site.name: node for node in program.linears() if (site := annotation(node).site) is not None}
    assert sorted(name for members in groups(program) for name in members) == sorted(nodes)
    for members in groups(program):
        assert len({nodes[name].args[0] for name in members}) == 1
        for first, second in combinations(members, 2):
            assert not nx.has_path(network, nodes[first].name, nodes[second].name)
    assert nx.is_directed_acyclic_graph(merged(program))
    for name, node in nodes.items():
        group = annotation(node).group
        partners = [other for other in nodes if other != name and nodes[other].args[0] is node.args[0]]
        if group is not None and group.members == (name,) and partners and name not in reasons(program):
            assert all(other in reasons(program) for other in partners), "left alone without a reason"


def group_of(count: int) -> FusionGroup:
    return FusionGroup(tuple("abcdefgh"[:count]), "x", tuple(LinearShape(16 * (i + 1), 32) for i in range(count)))


def test_candidates_are_all_subsets_of_two_or_more() -> None:
    found = candidates(group_of(3))
    assert [group.members for group in found] == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]
    assert [group.shape.out_features for group in found] == [48, 64, 80, 96]
    assert candidates(group_of(1)) == ()
    assert len(candidates(group_of(5))) == 2**5 - 5 - 1


def test_a_large_group_has_one_candidate() -> None:
    large = group_of(ALL_SUBSETS_UP_TO + 1)
    assert candidates(large) == (large,)
