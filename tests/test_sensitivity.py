"""Sensitivities: against a plain perturbed copy of the model, against a case with a known answer, and what must be refused."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from qpc.capture import capture
from qpc.errors import ModelError
from qpc.ir.annotation import annotation
from qpc.ir.program import Program
from qpc.ir.random_inputs import random_inputs
from qpc.journal import Journal
from qpc.passes.canonicalize import Canonicalize
from qpc.sensitivity import Loss, Method, Sensitivities, by_gradient, check_finite, checked, estimate, perturbed
from qpc.sensitivity.gradient import Backward
from tests.families import FAMILIES, VOCABULARY


def canonical(model: nn.Module, *inputs: torch.Tensor) -> Program:
    """The model, captured and with its linears found."""
    program = capture(model, example_inputs=inputs or None)
    program.remarks += Canonicalize().run(program).remarks
    program.stage = Canonicalize.ensures
    return program


@cache
def family(name: str) -> Program:
    """A tiny causal language model."""
    return canonical(FAMILIES[name]())


class Chain(nn.Module):
    """A product of square matrices; the second is applied twice."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes [batch, width] to [batch, width]."""
        return self.last(self.shared(self.shared(self.first(x))))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_the_divergence_of_a_perturbed_copy(name: str) -> None:
    program = family(name)
    found = estimate(program, batch=3, length=16, rounds=2, seed=3)
    assert found.loss is Loss.KL
    assert found.tokens == 48
    (tokens,) = random_inputs(program, batch=3, length=16, seed=3)
    for node in program.linears():
        site = annotation(node).site
        assert site is not None
        total = 0.0
        for number, part in enumerate((tokens[:2], tokens[2:])):
            other = copy.deepcopy(program.module)
            weight = other.get_parameter(site.weight)
            oriented = weight.t() if site.transposed else weight
            with torch.no_grad():
                oriented.copy_(perturbed(oriented, 0.02, (3, number, site.weight)))
                log_p, log_q = (model(input_ids=part).logits.double().log_softmax(-1) for model in (program.module, other))
            total += float((log_p.exp() * (log_p - log_q)).sum())
        assert found.values[site.name] * 0.02 == pytest.approx(total / 48, rel=2e-3, abs=1e-9), site.name


def test_the_relative_error_of_a_chain_of_matrices_is_the_injected_one() -> None:
    program = canonical(Chain(), torch.zeros(2, 96))
    found = estimate(program, batch=4, length=128, noise=1e-3, rounds=2)
    assert found.loss is Loss.RELATIVE_ERROR
    assert found.values["first"] == pytest.approx(1, rel=0.1)
    assert found.values["last"] == pytest.approx(1, rel=0.1)
    assert 1.5 < found.values["shared"] < 4.5, "both uses of the shared weight are perturbed, by the same matrix"


def test_equals_itself_and_leaves_the_model_alone() -> None:
    program = family("llama")
    before = {name: value.clone() for name, value in program.module.state_dict().items()}
    assert estimate(program, batch=1, length=16) == estimate(program, batch=1, length=16)
    assert estimate(program, batch=1, length=16) != estimate(program, batch=1, length=16, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in program.module.state_dict().items())


def test_threads_change_nothing_and_their_number_is_restored() -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(estimate(family("llama"), length=16))
            with pytest.raises(ModelError, match="not finite"):
                estimate(family("llama"), length=16, noise=float("inf"))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_is_linear_in_small_noise() -> None:
    coarse, fine = (estimate(family("llama"), length=32, noise=noise).values for noise in (4e-3, 1e-3))
    assert all(coarse[name] == pytest.approx(fine[name], rel=0.2) for name in fine)


def test_every_site_has_a_value_and_progress_ends() -> None:
    seen: list[tuple[str, int, int]] = []
    program = family("llama")
    found = estimate(program, length=8, rounds=3, progress=lambda *event: seen.append(event))
    names = [site.name for node in program.linears() if (site := annotation(node).site) is not None]
    assert list(found.values) == names
    assert all(value > 0 for value in found.values.values())
    assert seen[-1][1] == seen[-1][2] == 3 * len(names)


def test_given_tokens_are_used() -> None:
    tokens = random_inputs(family("llama"), batch=2, length=8, seed=5)
    given, drawn = (estimate(family("llama"), inputs=given, batch=2, length=8, seed=5, method=Method.GIVEN) for given in (tokens, None))
    assert given == drawn


def test_tokens_cover_the_vocabulary_and_respect_the_longest_length() -> None:
    (tokens,) = random_inputs(family("gpt2"), batch=16, length=4096, seed=0)
    assert tokens.shape == (16, 128)
    assert set(tokens.unique().tolist()) == set(range(VOCABULARY))


def test_rows_of_matrices_are_positions() -> None:
    (rows,) = random_inputs(canonical(Chain(32), torch.zeros(2, 32)), batch=3, length=50, seed=0)
    assert rows.shape == (150, 32)
    assert rows.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
def test_noise_has_the_given_size_in_each_row(noise: float) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.0], [1e-3], [1.0], [1e3], [2.0]])
    error = (perturbed(weight, noise, (0, "w")) - weight).square().sum(dim=1)
    torch.testing.assert_close(error, noise * weight.square().sum(dim=1), rtol=1e-3, atol=0.0)
    assert noise == 0 or not torch.equal(perturbed(weight, noise, (0, "w")), perturbed(weight, noise, (1, "w")))


def test_json_round_trip() -> None:
    found = estimate(family("llama"), batch=1, length=8)
    assert Sensitivities.from_json(found.to_json()) == found
    for text in (
        "",
        "[]",
        "{}",
        '{"format": 2}',
        found.to_json().replace('"kl"', '"likelihood"'),
        found.to_json().replace('"noise"', '"nose"'),
    ):
        with pytest.raises(ModelError, match="sensitivities"):
            Sensitivities.from_json(text)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    program = copy.copy(family("llama"))
    check_finite(program)
    program.module = copy.deepcopy(program.module)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        program.module.get_parameter(name)[3, 7] = bad
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values .*\[3, 7\]"):
        check_finite(program)
    with pytest.raises(ModelError, match="not finite"):
        estimate(program, batch=1, length=8)


def test_an_output_that_overflows_names_the_linear() -> None:
    model = Chain(32)
    with torch.no_grad():
        model.shared.weight.copy_(torch.eye(32) * 1.8e19)
        model.first.weight.copy_(torch.eye(32))
        model.last.weight.copy_(torch.eye(32))
    program = canonical(model, torch.zeros(2, 32))
    with pytest.raises(ModelError, match=r"first.*not finite"):
        estimate(program, inputs=[torch.full((2, 32), 1.0)], noise=4.0)


def test_a_model_without_linears_is_refused() -> None:
    program = canonical(nn.Sequential(nn.LayerNorm(8)), torch.zeros(2, 8))
    with pytest.raises(ModelError, match="no linear"):
        estimate(program)


def relative(one: Sensitivities, other: Sensitivities) -> float:
    """Standard deviation of the logarithm of the ratio of two estimates."""
    ratios = torch.tensor([one.values[name] / other.values[name] for name in one.values]).log()
    return float(ratios.square().mean().sqrt())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_gradients_estimate_what_small_noise_finds(name: str) -> None:
    program = family(name)
    (tokens,) = random_inputs(program, batch=48, length=32, seed=0)
    by_noise = estimate(program, inputs=(tokens,), rounds=24, noise=1e-3)
    found, _ = by_gradient(program, torch.split(tokens, 2))
    assert (found.loss, found.tokens, found.noise, found.method) == (Loss.KL, tokens.numel(), 0.0, Method.GRADIENT)
    assert list(found.values) == list(by_noise.values)
    assert relative(found, by_noise) < 0.15
    assert sum(found.values.values()) == pytest.approx(sum(by_noise.values.values()), rel=0.05)


def test_gradients_of_an_output_that_is_no_distribution() -> None:
    program = canonical(Chain(), torch.zeros(2, 96))
    rows = torch.randn(64, 4, 96, generator=torch.Generator().manual_seed(1)).flatten(0, 1)
    found, _ = by_gradient(program, torch.split(rows, 4))
    assert found.loss is Loss.RELATIVE_ERROR
    assert found.values["first"] == pytest.approx(1, rel=0.1)
    assert found.values["last"] == pytest.approx(1, rel=0.1)
    assert 1.5 < found.values["shared"] < 4.5, "the gradients of both uses of the shared weight are added"


def test_importance_gives_the_sensitivity_back_where_positions_do_not_meet() -> None:
    """Each row of the input goes through by itself, so a_l is half the mean of q |x|^2 over the number of inputs."""
    program = canonical(Chain(), torch.zeros(2, 96))
    rows = torch.randn(2048, 96, generator=torch.Generator().manual_seed(1))
    found, (importance,) = by_gradient(program, [rows])
    first = next(iter(program.linears()))
    assert importance[first.name].shape == (2048,)
    local = float((importance[first.name] * rows.square().sum(dim=1)).sum()) / (2 * 96 * 2048)
    assert local == pytest.approx(found.values["first"], rel=0.15)


def test_importance_is_of_each_position_and_batch() -> None:
    program = family("llama")
    batches = [random_inputs(program, batch=batch, length=length, seed=0)[0] for batch, length in ((3, 16), (2, 24))]
    _, importance = by_gradient(program, batches)
    for values, batch in zip(importance, batches, strict=True):
        assert set(values) == {node.name for node in program.linears()}
        assert all(value.shape == (batch.numel(),) and bool((value >= 0).all()) and float(value.sum()) > 0 for value in values.values())


def test_passes_backwards_leave_the_model_alone_and_are_known_by_their_number() -> None:
    program = family("llama")
    (tokens,) = random_inputs(program, batch=24, length=64, seed=0)
    seen: dict[int, Backward] = {}

    def recall(number: int, make: Callable[[], Backward]) -> Backward:
        return seen.setdefault(number, make())

    found, _ = by_gradient(program, [tokens], recall=recall)
    assert len(seen) > 1
    assert by_gradient(program, [tokens], recall=lambda number, make: seen[number])[0] == found
    assert by_gradient(program, [tokens], seed=1)[0] != found
    assert all(parameter.grad is None for parameter in program.module.parameters())


def test_an_output_without_gradient_is_refused() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.only(x).detach() + 1

    with pytest.raises(ModelError, match="Steps cannot be differentiated"):
        by_gradient(canonical(Steps(), torch.zeros(2, 16)), [torch.randn(4, 16)])


def test_an_interrupted_estimate_goes_on_where_it_was(tmp_path: Path) -> None:
    program, path = family("llama"), tmp_path / "some" / "journal"
    whole = estimate(program, length=8)
    journal = Journal.open(path)

    def interrupt(task: str, done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate(program, length=8, journal=journal, progress=interrupt)
    journal.close()
    path.write_text(path.read_text()[:-5])
    kept = Journal.open(path)
    before = len(path.read_text().splitlines())
    assert before > 5
    assert estimate(program, length=8, journal=kept) == whole
    kept.close()
    measured = [json.loads(line) for line in path.read_text().splitlines() if line and line.endswith("]")]
    assert len({name for name, _ in measured}) == 3 * len(whole.values)
    assert len(measured) == len({name for name, _ in measured}), "nothing was measured twice, but for the line that was cut off"
    kept.discard()
    assert not path.exists()


def test_a_journal_is_believed() -> None:
    program, journal = family("llama"), Journal()
    estimate(program, batch=1, length=8, journal=journal)
    name = next(iter(program.linears()))
    weight = annotation(name).site
    assert weight is not None
    journal["noise", 0.02, 0, 0, weight.weight] = 1.0
    assert estimate(program, batch=1, length=8, journal=journal).values[weight.name] == 1 / 0.02


class Bent(nn.Module):
    """The error of `straight` costs in proportion; that of `bent`, once it is as large as a small threshold, much more."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.straight, self.bent = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.register_buffer("exact", self.bent.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = self.bent(x) - x @ self.exact.t()
        return self.straight(x) + off + 30 * off * off


def test_what_is_not_linear_is_found_and_protected() -> None:
    program = canonical(Bent(), torch.zeros(2, 64))
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    found, _ = by_gradient(program, [rows])
    safe = checked(program, found, (rows,))
    assert safe.linearity is not None
    assert safe.linearity.growth["straight"] == pytest.approx(1, abs=0.01)
    assert safe.linearity.growth["bent"] > 2 and set(safe.linearity.broken) == {"bent"}
    assert safe.values["straight"] == found.values["straight"]
    assert safe.values["bent"] == pytest.approx(found.values["bent"] * safe.linearity.growth["bent"])
    assert "1 of 2" in str(safe.linearity) and "bent" in str(safe.linearity)
    assert Sensitivities.from_json(safe.to_json()) == safe
