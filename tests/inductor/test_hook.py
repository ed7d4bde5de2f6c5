"""Lowered models in Inductor: groups run as one, norms and rotary embeddings go into what reads them, and the tokens stay the same.

On a machine without integer tensor cores operands are made and multiplied by their definition.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor
from torch import fx, nn
from torch._inductor.utils import run_and_get_code

import qpc
from qpc import backend
from qpc.inductor.gates import LEAST_ROWS
from qpc.inductor.hook import GraphPass, register
from qpc.integrations.decoder import Decoder, Stepping
from qpc.kernels import linear
from qpc.kernels.select import Implementation, Support
from qpc.passes.operands import Operands
from tests.compiled import TOKENS, logits
from tests.families import FAMILIES

LAUNCHES_OF_A_LAYER = 12
TRANSFORMS = {"norm_operand": 1, "add_norm_operand": 3}
"""Of two layers, behind a norm."""
GATED = {"rotate_operand": 2, "gated_operand": 2}
"""The others, where there are many rows."""
STEPS = 12


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operands everywhere; and no graph that was compiled with other passes."""
    monkeypatch.setattr(linear, "multiplies_operands", torch.compiler.assume_constant_result(lambda *_: True))
    torch.compiler.reset()
    with inductor.patch(fx_graph_cache=False):
        yield


@cache
def grouped(family: str, layers: int = 2) -> nn.Module:
    """A compiled model whose groups have one quantizer each. Nobody may change it."""
    model = FAMILIES[family]()
    if layers != 2:
        config = model.config
        config.num_hidden_layers = layers
        torch.manual_seed(0)
        model = type(model)(config).eval()
    options = {"effort": "fast", "calibration": None, "sensitivity": "random", "same_quantizer_in_group": True}
    return qpc.compile(model, budget=3.5, **options)


def decoded(model: nn.Module, stepping: Stepping, fused_attention: bool, prompts: int = 3) -> list[list[int]]:
    """Greedy tokens of three prompts or more, one of them padded."""
    decoder = Decoder(model, prompts, 64, stepping)
    if fused_attention:
        decoder.attention = decoder._obstacle()
        assert decoder.attention is None
    tokens = torch.arange(3, 3 + 9 * prompts).reshape(prompts, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    decoder.begin(tokens, mask, 0.0, 0)
    columns = [decoder.tokens[:, 0].tolist()]
    for _ in range(STEPS):
        decoder.advance(greedy=True)
        columns.append(decoder.tokens[:, 0].tolist())
    return columns


def seen(run: Callable[[], object]) -> Counter[str]:
    """How often each operator of qpc is in the graphs that Inductor got, behind our passes."""
    found: Counter[str] = Counter()
    ours = inductor.post_grad_custom_pre_pass

    def count(graph: fx.Graph) -> None:
        ours(graph)
        for node in graph.nodes:
            if node.op == "call_function":
                found[str(node.args[0] if "auto_functionalized" in str(node.target) else node.target)] += 1

    with inductor.patch(post_grad_custom_pre_pass=count):
        run()
    return Counter({name.removeprefix("qpc.").removesuffix(".default"): n for name, n in found.items() if name.startswith("qpc.")})


@pytest.mark.parametrize(
    ("family", "prompts"), [("llama", LEAST_ROWS), ("qwen2", 3), ("qwen3", LEAST_ROWS), ("mistral", 3), ("phi3", LEAST_ROWS)]
)
def test_a_step_of_a_lowered_model(family: str, prompts: int) -> None:
    """Four multiplications, four transforms and one attention a layer; two of the transforms with a norm and nearly always a sum, one with
    the gated activation where there are many rows."""
    model = grouped(family)
    expected = decoded(model, Stepping.EAGER, fused_attention=True, prompts=prompts)
    found: list[list[list[int]]] = []
    counts = seen(lambda: found.append(decoded(model, Stepping.COMPILED, fused_attention=True, prompts=prompts)))
    assert found == [expected]
    others = GATED if prompts >= LEAST_ROWS else {"rotate_operand": 4}
    assert counts == TRANSFORMS | others | {"operand_linear": 8, "decode_attention": 2}


def test_launches_of_a_layer() -> None:
    """Calls in the code that Inductor writes: our operators, its own kernels, and whatever else; the rest of the model does not count."""

    def launches(layers: int) -> int:
        model = grouped("llama", layers)
        _, (code,) = run_and_get_code(lambda: decoded(model, Stepping.COMPILED, fused_attention=True))
        body = code[code.index("def call(") : code.index("runner = Runner")]
        return len(re.findall(r"^\s+(?:\w+ = )?(?:torch\.ops\.\w+\.\w+\.\w+|extern_kernels\.\w+|cpp_fused\w*)\(", body, re.MULTILINE))

    few, more = launches(1), launches(3)
    assert 0 < (more - few) / 2 <= LAUNCHES_OF_A_LAYER
    assert more - few == 2 * 10, "so far"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_rotary_embedding_goes_into_attention_without_packed_weights(family: str) -> None:
    turned: list[bool] = []
    register()
    ours = inductor.post_grad_custom_pre_pass

    def look(graph: fx.Graph) -> None:
        ours(graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized_v2):
            turned.append(node.kwargs["cos"] is not None)

    model = FAMILIES[family]()
    with inductor.patch(post_grad_custom_pre_pass=look):
        found = decoded(model, Stepping.COMPILED, fused_attention=True)
    assert found == decoded(model, Stepping.EAGER, fused_attention=True)
    assert turned == [family != "gpt2"] * 2


def test_attention_of_the_model_stays_where_it_is_asked_for() -> None:
    model = grouped("gemma3")
    counts = seen(lambda: decoded(model, Stepping.COMPILED, fused_attention=False))
    assert counts["decode_attention"] == 0 and counts["operand_linear"] == 8 and counts["gated_operand"] == 0


@pytest.mark.parametrize("name", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "phi3"])
def test_every_backend_computes_what_the_eager_model_does(family: str, name: str) -> None:
    """The first sizes are compiled as they are, whether others may come (`dynamic=None`, the default) or not (`False`)."""
    model = grouped(family)
    expected = logits(model)
    found = logits(torch.compile(model, backend=name, fullgraph=True))
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_both_doors_fuse_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor from the compiled model, and through the backend from the original; one sequence of eight tokens."""
    monkeypatch.setattr(backend, "Operands", lambda: Operands(lambda *_: Support(Implementation.CPU, "by definition")))
    options = {"effort": "fast", "calibration": None, "sensitivity": "random", "same_quantizer_in_group": True}
    tokens = TOKENS[:1, :8]
    expected = logits(grouped("llama"), tokens)
    for model, how in ((grouped("llama"), {}), (FAMILIES["llama"](), {"backend": "qpalette", "options": {"budget": 3.5, **options}})):
        found: list[torch.Tensor] = []
        compiled = torch.compile(model, fullgraph=True, dynamic=False, **how)
        counts = seen(lambda compiled=compiled, found=found: found.append(logits(compiled, tokens)))
        assert counts == TRANSFORMS | GATED | {"operand_linear": 8}
        assert (found[0] - expected).norm() <= 1e-3 * expected.norm()


def test_lengths_are_compiled_twice() -> None:
    """For the first length, and for any other."""
    model = grouped("llama")
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for length in (20, 19, 7, 18, 12):
        assert (logits(compiled, TOKENS[:, :length]) - logits(model, TOKENS[:, :length])).norm() <= 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Logits(nn.Module):
    """A model that takes tokens by position and returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return result


def test_exports_and_packages_ahead_of_time(tmp_path: Path) -> None:
    model = grouped("llama")
    expected = logits(model)
    with torch.no_grad():
        exported = torch.export.export(Logits(model), (TOKENS,), strict=False)
    torch.testing.assert_close(exported.module()(TOKENS), expected)
    targets = Counter(str(node.target) for node in exported.graph.nodes)
    assert targets["qpc.trellis_linear.default"] == targets["qpc.rotate.default"] == 8, "one for each group"
    once = {"aot_inductor.precompile_headers": False}  # each takes the time of two files, and is read by one
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"), inductor_configs=once)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_weights_stay_where_they_are_for_cuda_graphs() -> None:
    """A tensor whose address a graph may not rely on would be copied before each replay: here only what the caller gives."""
    moving: list[int] = []
    ours = inductor.post_grad_custom_pre_pass

    def count(graph: fx.Graph) -> None:
        ours(graph)
        metadata = torch._guards.TracingContext.get().fw_metadata
        assert metadata is not None
        moving.append(len(graph.find_nodes(op="placeholder")) - len(set(metadata.static_input_indices)))

    with inductor.patch(post_grad_custom_pre_pass=count), torch.no_grad():
        torch.compile(grouped("llama"), fullgraph=True, dynamic=False)(input_ids=TOKENS[:, :3], use_cache=False)
    assert moving == [1]


def test_registers_once_and_behind_others() -> None:
    calls: list[str] = []
    with inductor.patch(post_grad_custom_pre_pass=None):
        register()
        first = inductor.post_grad_custom_pre_pass
        register()
        assert inductor.post_grad_custom_pre_pass is first and isinstance(first, GraphPass) and first.uuid() is not None
    with inductor.patch(post_grad_custom_pre_pass=lambda graph: calls.append("theirs")):
        register()
        chained = inductor.post_grad_custom_pre_pass
        chained(fx.Graph())
        assert calls == ["theirs"] and chained.uuid() is None, "what is not known cannot be a key"
