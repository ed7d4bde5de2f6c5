"""Mixtures of experts through both doors, to disk and back: whatever holds of linears holds of stacks."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import qpc
from qpc import checkpoint
from qpc.errors import CheckpointError
from qpc.kernels.experts import QuantizedExperts, RoutedExperts
from qpc.passes.canonicalize import ROUTER
from tests.compiled import TOKENS, dequantized, logits
from tests.mixtures import EXPERTS, MIXTURES, OPTIONS, STACKED, compiled_mixture, fast_mixture, greedy
from tests.passes.test_expert_forms import FORMS, Routed, X

pytestmark = STACKED
NAMES = sorted(MIXTURES)
STEPS = 5


@pytest.fixture(autouse=True)
def clean() -> None:
    torch.compiler.reset()


def stacks(model: nn.Module) -> dict[str, QuantizedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}


def restored(original: nn.Module, compiled: nn.Module) -> nn.Module:
    """The original with what packed weights restore to."""
    twin = copy.deepcopy(original)
    plain = dequantized(compiled)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            stack = stacks(compiled).get(name)
            if stack is None:
                parameter.copy_(plain.get_parameter(name))
            else:
                owner = original.get_submodule(name.rpartition(".")[0])
                matrices = stack.packed.restored().view(stack.experts, stack.rows, stack.in_features)
                parameter.copy_(matrices.mT if owner.is_transposed else matrices)
    return twin


@pytest.mark.parametrize("name", NAMES)
def test_stacks_are_packed_and_routers_are_not(name: str) -> None:
    model, compiled = compiled_mixture(name)
    report = qpc.report_of(compiled)
    packed = {row.name: row for row in report.rows if row.quantizer is not None}
    expected = {name for name, value in model.named_parameters() if value.ndim == 3}
    assert set(stacks(compiled)) == expected != set()
    for stack in expected:
        weights = packed[stack].out_features * packed[stack].in_features
        assert weights == model.get_parameter(stack).numel()
        assert packed[stack].weight_bytes == stacks(compiled)[stack].packed.nbytes
    routers = [text for text in report.remarks if text.endswith(ROUTER)]
    assert len(routers) == len(expected) // 2
    total = sum(row.out_features * row.in_features for row in report.rows)
    assert 8 * sum(row.weight_bytes for row in report.rows) <= OPTIONS["budget"] * total


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_model_computes_what_restored_weights_compute(name: str) -> None:
    model, compiled = compiled_mixture(name)
    expected = logits(restored(model, compiled))
    assert (logits(compiled) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("name", "implementation"), [*((name, "grouped_mm") for name in NAMES), ("mixtral", "batched_mm")])
def test_both_doors_give_the_same_logits(name: str, implementation: str) -> None:
    _, compiled = compiled_mixture(name)
    (model, fast), expected = fast_mixture(name), logits(compiled)
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    try:
        assert (logits(fast) - expected).norm() <= 1e-5 * expected.norm()
    finally:
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps_continue_a_text_as_eager_ones_without_compiling_again(name: str) -> None:
    _, compiled = compiled_mixture(name)
    prompt = TOKENS[:, 3:10]
    expected = compiled.generate(prompt, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)  # type: ignore[operator]
    graphs: list[int] = []
    for door in (torch.compile(compiled, backend="eager", fullgraph=True), fast_mixture(name)[1]):
        torch.compiler.reset()
        counters.clear()
        graphs.clear()
        found = greedy(door, compiled.config, prompt, STEPS, lambda: graphs.append(counters["stats"]["unique_graphs"]))
        assert torch.equal(found, expected)
        assert len(set(graphs[1:])) == 1, graphs


def test_a_stack_that_stays_runs_beside_one_that_is_packed() -> None:
    model = MIXTURES["gpt_oss"]()
    compiled = qpc.compile(model, **OPTIONS, exclude=("*.down_proj",))
    assert {name.rpartition(".")[2] for name in stacks(compiled)} == {"gate_up_proj"}
    expected = logits(restored(model, compiled))
    assert (logits(compiled) - expected).norm() <= 1e-5 * expected.norm()


def test_stacks_of_other_modules_stay_where_no_module_can_take_their_place() -> None:
    compiled = qpc.compile(Routed(FORMS["left"][1]), example_inputs=(X,), **(OPTIONS | {"budget": 4}))
    assert [row.name for row in qpc.report_of(compiled).rows] == ["start"]
    assert any("stack: its class Routed is none of the experts of transformers" in text for text in qpc.report_of(compiled).remarks)


@pytest.fixture(scope="module", params=NAMES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    _, model = compiled_mixture(request.param)
    directory = tmp_path_factory.mktemp("checkpoint") / request.param
    qpc.save(model, directory)
    return model, directory


def test_checkpoints_give_the_same_logits(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = saved
    loaded = [qpc.load(directory), transformers.AutoModelForCausalLM.from_pretrained(directory)]
    for each in loaded:
        assert torch.equal(logits(each), logits(model))
        assert all(isinstance(each.get_submodule(name.rpartition(".")[0]), RoutedExperts) for name in stacks(each))
    loaded[1].save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert (logits(again).float() - logits(model)).norm() <= 0.05 * logits(model).norm()
    size = (directory / checkpoint.TENSORS).stat().st_size
    assert 0 <= size - qpc.report_of(model).model_bytes < 40_000, "only safetensors' own header may come on top"
    assert set(stacks(model)) <= set(checkpoint.read_quantizers(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": EXPERTS + 1}, "in the checkpoint"),
        ({"in_features": True}, "must be a count"),
        ({"block": 48}, "blocks of 48"),
        ({"out_features": "64"}, "must be a count"),
    ],
)
def test_damaged_entries_are_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    _, model = compiled_mixture("mixtral")
    qpc.save(model, tmp_path / "damaged")
    path = tmp_path / "damaged" / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["experts"][next(iter(stacks(model)))] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        qpc.load(tmp_path / "damaged")


def test_a_checkpoint_of_experts_is_not_read_into_a_dense_model(tmp_path: Path) -> None:
    _, model = compiled_mixture("mixtral")
    qpc.save(model, tmp_path / "mixtral")
    with pytest.raises(CheckpointError, match="does not have"):
        qpc.load(tmp_path / "mixtral", nn.Sequential(nn.Linear(4, 4)))


def test_tokens_may_choose_any_experts_in_any_order() -> None:
    """The module alone, against a loop over tokens."""
    _, compiled = compiled_mixture("gpt_oss")
    module = next(each for each in compiled.modules() if isinstance(each, RoutedExperts))
    x, chosen = torch.randn(5, 64), torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(5)])
    weights = torch.rand(5, 2)
    up, down = (stack.packed.restored().view(EXPERTS, stack.rows, -1) for stack in stacks(module).values())

    def one(token: Tensor, expert: int) -> Tensor:
        hidden = module._gate(module, up[expert] @ token + module.gate_up_proj_bias[expert])  # type: ignore[index]
        result: Tensor = down[expert] @ hidden + module.down_proj_bias[expert]  # type: ignore[index]
        return result

    rows = [sum(weights[t, k] * one(x[t], int(chosen[t, k])) for k in range(2)) for t in range(5)]
    torch.testing.assert_close(module(x, chosen, weights), torch.stack(rows), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
