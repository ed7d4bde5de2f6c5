"""Moments: against hooks on the modules, behind weights that were replaced, and on graphs with awkward linears."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.annotation import annotation, site_of
from qpc.ir.program import Program
from qpc.moments import MomentStream
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from tests.families import FAMILIES, grouped, model, tokens
from tests.ir.test_walk import InPlace


def hooked(network: nn.Module, names: set[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """The oracle: mean of x x^T over everything that the module of each name read, in float64."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> object:
        def read(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().double().flatten(0, -2)
            totals[name] = totals.get(name, 0) + x.t() @ x
            counts[name] = counts.get(name, 0) + len(x)

        return network.get_submodule(name).register_forward_pre_hook(read)

    handles = [hook(name) for name in names]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in totals.items()}


def names_of(program: Program) -> set[str]:
    return {site_of(node).name for node in program.linears()}


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equal_what_hooks_see(family: str, dtype: torch.dtype) -> None:
    program = grouped(family)
    batches, held_out = [tokens(2, 9), tokens(3, 30)], [tokens(1, 20)]
    expected, expected_held = (hooked(model(family), names_of(program), part) for part in (batches, held_out))
    stream = MomentStream(program, batches, held_out, dtype=dtype)
    for node in program.linears():
        moment, name = stream.moment([node]), site_of(node).name
        assert moment.matrix.dtype == dtype
        close(moment.matrix, expected[name])
        assert moment.held_out is not None
        close(moment.held_out.matrix, expected_held[name])
        assert (moment.count, moment.held_out.count) == (2 * 9 + 3 * 30, 20)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("sequential", [True, False])
def test_behind_replaced_weights(family: str, sequential: bool) -> None:
    """Each moment is that of a model in which the linears before it have the other weights, or of the original."""
    program = grouped(family)
    twin = copy.deepcopy(model(family))
    stream = MomentStream(program, [tokens(2, 9), tokens(1, 30)], sequential=sequential)
    for node in program.linears():
        site = site_of(node)
        network = twin if sequential else model(family)
        close(stream.moment([node]).matrix, hooked(network, {site.name}, [tokens(2, 9), tokens(1, 30)])[site.name])
        weight = twin.get_parameter(site.weight)
        other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) / weight.shape[0] ** 0.5
        with torch.no_grad():
            weight.copy_(other)
        stream.replace({node: other.t() if site.transposed else other})


def test_weights_that_every_batch_has_passed_are_dropped() -> None:
    program = grouped("llama")
    stream = MomentStream(program, [tokens(2, 9)])
    for node in program.linears():
        stream.moment([node])
        assert len(stream._weights) <= 3
        stream.replace({node: torch.zeros(site_of(node).shape.out_features, site_of(node).shape.in_features)})


class Tied(nn.Module):
    """`first` reads x, then two linears with one weight read different values; `last` reads the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.two, self.last = (nn.Linear(32, 32) for _ in range(4))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        """Shapes [..., 32] to [..., 32]."""
        result: Tensor = self.last(torch.relu(self.two(torch.tanh(self.one(self.first(x))))))
        return result


@pytest.mark.parametrize("build", [Tied, InPlace])
def test_a_shared_weight_has_the_moment_of_all_its_inputs(build: type[nn.Module]) -> None:
    network = build()
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    program = capture(network, example_inputs=(x,))
    Pipeline((Canonicalize(), Fusion())).run(program)
    twin = copy.deepcopy(network)
    stream = MomentStream(program, [x[:30], x[30:]])
    applied: dict[str, list[torch.fx.Node]] = {}
    for node in program.linears():
        applied.setdefault(site_of(node).weight, []).append(node)
    assert max(map(len, applied.values())) == 2
    for name, nodes in applied.items():
        expected = hooked(twin, {site_of(node).name for node in nodes}, [x[:30].clone(), x[30:].clone()])
        moment = stream.moment(reversed(nodes))
        close(moment.matrix, torch.stack(list(expected.values())).mean(0))
        assert moment.count == 50 * len(nodes)
        other = torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) / 32**0.5
        with torch.no_grad():
            twin.get_parameter(name).copy_(other)
        stream.replace(dict.fromkeys(nodes, other))


def test_moments_do_not_depend_on_the_batches() -> None:
    program = grouped("llama")
    text = tokens(6, 17)
    node = list(program.linears())[-1]
    assert annotation(node).site is not None
    whole, cut = MomentStream(program, [text]).moment([node]), MomentStream(program, list(text.split(1))).moment([node])
    close(whole.matrix, cut.matrix.double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_wait_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpc.moments.MEMORY_SHARE", 0.0)
    network = FAMILIES["llama"]().cuda()
    program = capture(network)
    Pipeline((Canonicalize(), Fusion())).run(program)
    stream = MomentStream(program, [tokens(2, 9), tokens(1, 30)])
    expected = hooked(network, names_of(program), [tokens(2, 9).cuda(), tokens(1, 30).cuda()])
    for index, node in enumerate(program.linears()):
        close(stream.moment([node]).matrix, expected[site_of(node).name])
        assert index == 0 or all(not value.is_cuda for walk in stream._walks[0] for value in walk.live())
