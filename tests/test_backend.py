"""`torch.compile(model, backend="qpalette")`: found by name, the same numbers as `qpc.compile`, packed once for all graphs."""

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import qpc
from qpc import backend
from qpc.errors import BudgetError, ProfileError, SettingsError
from qpc.ir.annotation import annotation
from qpc.kernels.select import Implementation, Support
from qpc.latency import latency_of
from qpc.options import Options
from qpc.passes.operands import Operands
from qpc.sensitivity import Method
from tests.compiled import BUDGET, DEVICES, TOKENS, compiled_pair, logits
from tests.families import FAMILIES

OPTIONS = {"budget": BUDGET, "effort": "fast", "tune": "off", "inner": "eager"}


@pytest.fixture(autouse=True)
def clean() -> None:
    torch.compiler.reset()


def test_listed_by_name() -> None:
    assert "qpalette" in torch.compiler.list_backends()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_doors_give_the_same_logits(family: str, device: str) -> None:
    model, compiled = compiled_pair(family, device)
    expected = logits(compiled)
    found = logits(torch.compile(model, backend="qpalette", options=OPTIONS, fullgraph=True))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_runs_the_lowered_graph(device: str) -> None:
    model, compiled = compiled_pair("llama", device)
    expected = logits(compiled)
    found = logits(torch.compile(model, backend="qpalette", options={**OPTIONS, "inner": "inductor"}))
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_mode_asks_for_cuda_graphs_and_weights_stay_in_place() -> None:
    """What a graph may not rely on the address of would be copied before each replay: here only what the caller gives."""
    seen: list[tuple[bool, int]] = []

    def spy(graph: torch.fx.Graph) -> None:
        metadata = torch._guards.TracingContext.get().fw_metadata
        assert metadata is not None
        moving = len(graph.find_nodes(op="placeholder")) - len(set(metadata.static_input_indices))
        seen.append((inductor.triton.cudagraphs, moving))

    options = {**OPTIONS, "inner": "inductor", "calibration": None, "sensitivity": "random"}
    with inductor.patch(post_grad_custom_pre_pass=spy, fx_graph_cache=False):
        for mode in ("default", "reduce-overhead"):
            torch.compiler.reset()
            logits(torch.compile(FAMILIES["llama"](), backend="qpalette", options={**options, "mode": mode}, dynamic=False))
    assert seen == [(False, 1), (True, 1)]


def test_a_new_shape_does_not_pack_again(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = backend.build
    monkeypatch.setattr(backend, "build", lambda *args: built.append(args) or original(*args))
    model = FAMILIES["llama"]().eval()
    compiled = torch.compile(model, backend="qpalette", options=OPTIONS, dynamic=False)
    for length in (5, 8, 13):
        logits(compiled, TOKENS[:, :length])
    assert len(built) == 1


def test_other_weights_are_packed_anew() -> None:
    """A weight that was exchanged without its version moving: by assignment, or by a move to another device."""
    model = FAMILIES["llama"]().eval()
    before = logits(torch.compile(model, backend="qpalette", options=OPTIONS))
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    version = weight._version
    weight.data = 5 * weight.data.flip(0)
    assert weight._version == version
    torch.compiler.reset()
    after = logits(torch.compile(model, backend="qpalette", options=OPTIONS))
    assert not torch.equal(before, after)
    assert torch.allclose(after, logits(qpc.compile(model, budget=BUDGET, effort="fast")), rtol=1e-4, atol=1e-5)


def test_a_model_that_compiles_itself_in_place_samples_its_own_text() -> None:
    _, compiled = compiled_pair("llama")
    model = FAMILIES["llama"]().eval()
    model.compile(backend="qpalette", options=OPTIONS)
    expected = logits(compiled)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


def test_calibration_is_that_of_the_other_door() -> None:
    model = FAMILIES["llama"]().eval()
    expected = logits(qpc.compile(model, budget=BUDGET, effort="fast", calibration=TOKENS))
    compiled = torch.compile(model, backend="qpalette", options={**OPTIONS, "calibration": TOKENS}, dynamic=False)
    for length in (20, 7):
        assert (logits(compiled, TOKENS[:, :length]) - expected[:, :length]).norm() <= 1e-4 * expected.norm()


def test_groups_run_as_one_operator_behind_one_rotation() -> None:
    seen: list[torch.fx.GraphModule] = []

    def spy(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(graph_module)
        return graph_module

    model = FAMILIES["llama"]().eval()
    torch._dynamo.register_backend(spy, name="qpc_test_spy")
    options = {**OPTIONS, "same_quantizer_in_group": True, "inner": "qpc_test_spy"}
    logits(torch.compile(model, backend="qpalette", options=options))
    targets = [str(node.target) for node in seen[0].graph.nodes if node.op == "call_function"]
    layers = model.config.num_hidden_layers
    assert sum(target.startswith("qpc.rotate") for target in targets) == 4 * layers
    assert sum("_linear" in target and target.startswith("qpc.") for target in targets) == 4 * layers
    assert any(len(annotation(node).group.members) == 3 for node in seen[0].graph.nodes if annotation(node).group)


def test_groups_read_operands_where_the_batch_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that multiplies them; here by their definition."""
    seen: list[list[str]] = []

    def spy(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append([str(node.target) for node in graph_module.graph.nodes])
        return graph_module

    torch._dynamo.register_backend(spy, name="qpc_test_operands_spy")
    monkeypatch.setattr(backend, "Operands", lambda: Operands(lambda *_: Support(Implementation.CPU, "by definition")))
    model, compiled = compiled_pair("llama")
    fast = torch.compile(model, backend="qpalette", options={**OPTIONS, "inner": "qpc_test_operands_spy"}, fullgraph=True, dynamic=False)
    for tokens, own, other in ((TOKENS[:1, :8], "rotate_operand", "rotate"), (TOKENS, "rotate", "operand_linear")):
        expected = logits(compiled, tokens)
        assert (logits(fast, tokens) - expected).norm() <= 1e-3 * expected.norm()
        assert seen[-1].count(f"qpc.{own}.default") == 4 * model.config.num_hidden_layers  # type: ignore[union-attr, operator]
        assert f"qpc.{other}.default" not in seen[-1]


def test_plain_module_decides_on_its_own_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(3, 64)
    with pytest.warns(UserWarning, match="this graph alone"):
        found = torch.compile(model, backend="qpalette", options={"budget": 6, "effort": "fast", "inner": "eager"})(x)
    assert (found - model(x)).norm() < 0.1 * model(x).norm()


def test_graph_without_linears() -> None:
    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend="qpalette", options=OPTIONS)
    assert torch.equal(compiled(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a budget"),
        ({"budget": 3, "bits": 4}, "'bits'.*known: budget"),
        ({"budget": 3, "calibration": "nowhere"}, "neither 'self' nor 'none'"),
        ({"budget": 3, "inner": "nonsense"}, "unknown inner backend"),
        ({"budget": 3, "mode": "fast"}, "unknown mode 'fast'; known: default, reduce-overhead"),
        ({"budget": 3, "mode": "reduce-overhead", "inner": "eager"}, "leave one of them out"),
        ({"budget": 3, "batch": 0}, "batch=0 must be positive"),
        ({"budget": 3, "sensitivity": "none"}, "must be one of"),
        ({"budget": "3ms", "gpu": "abacus"}, "neither a known GPU"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises((SettingsError, ProfileError), match=message):
        backend.BackendOptions.parse(options)


def test_a_gpu_is_an_option() -> None:
    options = backend.BackendOptions.parse({"budget": "4bit, 3ms@8", "gpu": "h100"}).options
    timing = options.timing_within(options.budget)
    assert timing is not None and (timing.model, timing.batch) == (latency_of("h100"), 8)


def test_options_mean_what_they_mean_to_a_compile() -> None:
    given = {"exclude": "*.down_proj", "embeddings": 6, "calibration": None, "sensitivity": "random", "gpu": "h100", "batch": 4}
    assert backend.BackendOptions.parse({"budget": 3, **given}).options == Options.of("3bit", **given)  # type: ignore[arg-type]
    found = Options.of(3, sensitivity="random", exclude="*.down_proj")
    assert (found.sensitivity.method, found.exclude, found.latency) == (Method.RANDOM, ("*.down_proj",), None)


def test_errors_reach_the_user() -> None:
    compiled = torch.compile(FAMILIES["llama"]().eval(), backend="qpalette", options={"budget": 0.1})
    with pytest.raises(BackendCompilerFailed, match="smallest") as caught:
        logits(compiled)
    assert isinstance(caught.value.inner_exception, BudgetError)
