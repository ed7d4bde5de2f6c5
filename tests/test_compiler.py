"""`qpc.compile`: the lowered model is the model of the dequantized weights, keeps its module tree, and leaves the original alone."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qpc
from qpc.errors import BudgetError, ModelError, SettingsError
from qpc.kernels.linear import QuantizedLinear
from qpc.sampling import Start
from qpc.sensitivity import Loss, Sensitivities
from tests.compiled import BUDGET, DEVICES, TOKENS, compiled_pair, logits
from tests.families import FAMILIES

PASSES = ("canonicalize", "fusion", "allocate", "quantize", "lower")


def dequantized(original: nn.Module, compiled: nn.Module) -> nn.Module:
    """The oracle: the original class with restored weights in the place of the packed ones."""
    twin = copy.deepcopy(original)
    for name, module in compiled.named_modules():
        if isinstance(module, QuantizedLinear):
            restored = module.packed.restored()
            weight = twin.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(restored if weight.shape == restored.shape and not is_conv1d(twin, name) else restored.t())
    return twin


def is_conv1d(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name)).__name__ == "Conv1D"


@pytest.fixture(params=[(family, device) for family in sorted(FAMILIES) for device in DEVICES], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return compiled_pair(*request.param)


def test_lowered_equals_dequantized(pair: tuple[nn.Module, nn.Module]) -> None:
    original, compiled = pair
    expected, found = logits(dequantized(original, compiled)), logits(compiled)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_every_quantized_linear_is_replaced_and_reported(pair: tuple[nn.Module, nn.Module]) -> None:
    original, compiled = pair
    rows = {row.name: row for row in qpc.report_of(compiled).rows}
    replaced = {name for name, module in compiled.named_modules() if isinstance(module, QuantizedLinear)}
    assert replaced == {name for name, row in rows.items() if row.quantizer is not None}
    assert len(replaced) >= 4
    assert not any(isinstance(module, QuantizedLinear) for module in original.modules())


def test_budget_is_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    _, compiled = pair
    quantized = [module for module in compiled.modules() if isinstance(module, QuantizedLinear)]
    stored = 8 * sum(module.packed.nbytes for module in quantized)
    assert stored <= BUDGET * sum(module.out_features * module.in_features for module in quantized)


def test_generates_batches_with_left_padding(pair: tuple[nn.Module, nn.Module]) -> None:
    _, compiled = pair
    tokens = TOKENS.to(next(compiled.parameters()).device)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    args = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    dynamic = compiled.generate(tokens, **args)
    assert dynamic.shape == (2, 24)
    assert torch.equal(dynamic, compiled.generate(tokens, cache_implementation="static", **args))
    torch.manual_seed(0)
    sampled = compiled.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=True, pad_token_id=0)
    assert sampled.shape == (2, 24)


def test_original_is_untouched_and_unquantized_tensors_are_shared() -> None:
    original = FAMILIES["llama"]().eval()
    before = copy.deepcopy(original.state_dict())
    compiled = qpc.compile(original, budget=4, effort="fast")
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert compiled.get_input_embeddings().weight is original.get_input_embeddings().weight


def test_members_of_a_group_are_row_ranges_of_one_weight() -> None:
    compiled = qpc.compile(FAMILIES["llama"]().eval(), budget=3, effort="fast", same_quantizer_in_group=True)
    groups = {row.group for row in qpc.report_of(compiled).rows if len(row.group) > 1}
    assert groups
    for members in groups:
        codes = [compiled.get_submodule(name).codes0 for name in members]
        assert len({part.untyped_storage().data_ptr() for part in codes}) == 1
        assert codes[1].data_ptr() == codes[0].data_ptr() + codes[0].nbytes


def test_same_inputs_give_the_same_bytes() -> None:
    first = compiled_pair("qwen2")[1].state_dict()
    second = qpc.compile(FAMILIES["qwen2"]().eval(), budget=BUDGET, effort="fast").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plain_module_and_shared_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96), nn.Linear(96, 10))
    model[4].weight = model[0].weight
    x = torch.randn(5, 64)
    compiled = qpc.compile(model, budget=5, effort="fast", example_inputs=(x,))
    assert torch.equal(compiled[0].codes0, compiled[4].codes0)
    assert torch.equal(compiled[0].signs, compiled[4].signs)
    twin = dequantized(model, compiled)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-3, atol=1e-4)


def test_excluded_linears_stay() -> None:
    original = FAMILIES["llama"]().eval()
    compiled = qpc.compile(original, budget=4, effort="fast", exclude=["*down_proj"])
    names = [name for name, _ in original.named_modules() if name.endswith("down_proj")]
    assert names
    assert all(isinstance(compiled.get_submodule(name), nn.Linear) for name in names)
    assert any("down_proj" in remark for remark in qpc.report_of(compiled).remarks)


def test_rotations_keep_to_the_blocks_of_a_shard() -> None:
    compiled = qpc.compile(FAMILIES["llama"]().eval(), budget=4, effort="fast", rotation_block=16)
    assert {module.block for module in compiled.modules() if isinstance(module, QuantizedLinear)} == {16}
    with pytest.raises(SettingsError, match="rotation_block=0"):
        qpc.compile(FAMILIES["llama"]().eval(), budget=4, rotation_block=0)


def test_a_class_of_its_own_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(64, 64), nn.Linear(64, 64))
    compiled = qpc.compile(model, budget=4, effort="fast", example_inputs=(torch.randn(2, 64),))
    assert isinstance(compiled[0], Scaled)
    assert isinstance(compiled[1], QuantizedLinear)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(poison: float) -> None:
    model = FAMILIES["llama"]().eval()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 5] = poison
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        qpc.compile(model, budget=3, effort="fast")


def test_no_linears() -> None:
    with pytest.raises(ModelError, match="no linear"):
        qpc.compile(nn.Sequential(nn.ReLU()), budget=3, example_inputs=(torch.randn(2, 4),))


def test_budget_below_the_palette_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match="smallest"):
        qpc.compile(FAMILIES["llama"]().eval(), budget=0.5, effort="fast")


def test_report_needs_a_compiled_model() -> None:
    with pytest.raises(ModelError, match=r"qpc\.compile"):
        qpc.report_of(nn.Linear(4, 4))


def test_given_sensitivities_decide() -> None:
    """A linear that matters a million times more gets more bits than its twins."""
    model, compiled = compiled_pair("llama")
    rows = qpc.report_of(compiled).rows
    favourite = rows[-1].name
    values = {row.name: 1.0 for row in rows} | {favourite: 1e6}
    chosen = qpc.compile(model, budget=3, effort="fast", sensitivities=Sensitivities(values, Loss.KL, noise=0.02, seed=0, tokens=1))
    bits = {row.name: row.bits for row in qpc.report_of(chosen).rows}
    assert bits[favourite] > max(value for name, value in bits.items() if name != favourite)


@pytest.mark.parametrize("calibration", ["self", None, qpc.SelfSampled(tokens=300, start=Start.RANDOM), TOKENS])
def test_calibration_is_reported(calibration: object) -> None:
    report = qpc.report_of(qpc.compile(FAMILIES["llama"]().eval(), budget=3, effort="fast", calibration=calibration))
    shares = [row.remaining for row in report.quantized]
    assert all((share is None) == (calibration is None) for share in shares)
    assert (report.calibration is None) == (calibration is None)
    assert report.calibration is None or "tokens in" in report.calibration


def test_a_plain_module_is_compiled_without_feedback_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(64, 64)
    report = qpc.report_of(qpc.compile(model, budget=4, effort="fast", example_inputs=(x,)))
    assert report.calibration is None and any("without error feedback" in remark for remark in report.remarks)
    report = qpc.report_of(qpc.compile(model, budget=4, effort="fast", example_inputs=(x,), calibration=x))
    assert report.calibration == "given, 64 tokens in 64 sequences"
    assert not any("feedback" in remark for remark in report.remarks)


def test_one_dump_for_every_pass_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        monkeypatch.setenv("QPC_DUMP", str(tmp_path / name))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        qpc.compile(model, budget=4, effort="fast", example_inputs=(torch.ones(2, 64),))
    first, second = ({path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    stems = ["00_captured", *(f"0{n}_after_{name}" for n, name in enumerate(PASSES, start=1))]
    assert sorted(first) == sorted(f"{stem}.{suffix}" for stem in stems for suffix in ("txt", "json", "dot"))
    assert first == second
    assert "qpc.trellis_linear" in first["05_after_lower.txt"] or "qpc.scalar_linear" in first["05_after_lower.txt"]
