import copy
import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from qpc.capture import EMBEDDING, OUTPUT_HEAD, capture
from qpc.errors import CaptureError, ModelError
from qpc.ir.stage import Stage
from qpc.ir.verifier import verify
from tests.exports import Export, kept
from tests.families import FAMILIES, PLAIN, captured, decoder, inputs, model, plain_inputs, seeded, tokens


@pytest.fixture(scope="module", autouse=True)
def real_export(exports_once: None) -> Iterator[Export]:
    """Here every export is made, none kept."""
    module = sys.modules["qpc.capture"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_export", module._export.__wrapped__)
        yield module._export


def expected(name: str, given: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        result = model(name)(*given)
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
@pytest.mark.parametrize(("batch", "length"), [(3, 17), (1, 6), (2, 1)])
def test_program_computes_what_the_model_computes(name: str, batch: int, length: int) -> None:
    given = inputs(name, batch, length if name in FAMILIES else 5)
    program = captured(name)
    assert program.stage is Stage.CAPTURED
    verify(program)
    outputs = program.run(given)
    assert len(outputs) == 1
    torch.testing.assert_close(outputs[0], expected(name, given))


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_and_length_are_symbolic_and_the_ids_the_only_input(name: str) -> None:
    program = captured(name)
    assert program.inputs == ("input_ids",)
    placeholders = program.graph.find_nodes(op="placeholder")
    assert placeholders[-1].name == "input_ids"
    assert all(isinstance(size, torch.SymInt) for size in placeholders[-1].meta["val"].shape)
    assert list(program.bind([tokens()])) == [node.name for node in placeholders]


@pytest.mark.parametrize("name", FAMILIES)
def test_bound_tensors_are_the_live_parameters(name: str) -> None:
    program = captured(name)
    bound = program.bind([tokens()])
    named = dict(model(name).named_parameters(remove_duplicate=False)) | dict(model(name).named_buffers(remove_duplicate=False))
    assert all(bound[placeholder] is named[qualified] for placeholder, qualified in program.tensors.items())
    assert len({id(value) for value in bound.values()}) == len(bound)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3"])
def test_what_other_tests_keep_of_an_export_is_all_of_it(name: str, real_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [str(capture(FAMILIES[name]()).graph)]
    monkeypatch.setattr(sys.modules["qpc.capture"], "_export", kept(real_export))
    graphs += [str(capture(FAMILIES[name]()).graph) for _ in range(2)]
    assert graphs[0] == graphs[1] == graphs[2]
    changed = FAMILIES[name]()
    changed.forward = lambda input_ids: changed.lm_head(changed.model.embed_tokens(input_ids))  # type: ignore[method-assign]
    assert str(capture(changed).graph) != graphs[0], "a model of its own kind is exported itself"


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(ModelError, match="takes 1 inputs"):
        captured("mlp").bind([])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_tied_weights_share_one_placeholder_under_their_first_name(name: str) -> None:
    table = {"llama_tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[name]
    names = list(captured(name).tensors.values())
    assert names.count(table) == 1
    assert "lm_head.weight" not in names


def test_output_head_and_embeddings_are_excluded() -> None:
    assert captured("llama").excluded == {"lm_head": OUTPUT_HEAD}

    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 16))
            self.body, self.last = nn.Linear(16, 16), nn.Linear(16, 7)
            self.last.weight = self.table

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.last(self.body(nn.functional.embedding(ids, self.table)))
            return result

    program = capture(seeded(Headless), example_inputs=(torch.zeros(2, 4, dtype=torch.int64),))
    assert program.excluded == {"table": EMBEDDING, "last": EMBEDDING}


def test_exclude_patterns() -> None:
    program = capture(model("mlp"), example_inputs=plain_inputs(), exclude=["2"])
    assert list(program.excluded) == ["2"] and "'2'" in program.excluded["2"]
    with pytest.raises(ModelError, match=r"'model\.\*\.q' matches no linear.*model\.layers\.0"):
        capture(model("llama"), exclude=["model.*.q"])
    with pytest.raises(ModelError, match="matches no linear"):
        capture(model("llama"), exclude=["model.embed_tokens"])


def test_nothing_of_the_model_changes() -> None:
    fresh = PLAIN["mlp"]()
    fresh.train()
    fresh[1].eval()
    before = {name: (value.data_ptr(), value._version, value.requires_grad) for name, value in fresh.named_parameters()}
    children = dict(fresh.named_modules())
    capture(fresh, example_inputs=plain_inputs())
    assert {name: (value.data_ptr(), value._version, value.requires_grad) for name, value in fresh.named_parameters()} == before
    assert [module.training for module in fresh] == [True, False, True] and fresh.training
    assert dict(fresh.named_modules()) == children


def test_capture_allocates_next_to_nothing() -> None:
    with torch.device("meta"):
        large = decoder("Llama", hidden_size=1024, intermediate_size=4096, head_dim=64, num_attention_heads=16)
    large = large.to_empty(device="cpu")
    size = sum(value.nbytes for value in large.parameters())

    def allocated(action: object) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            action()  # type: ignore[operator]
        return sum(max(0, event.self_cpu_memory_usage) for event in recorded.key_averages())

    assert allocated(lambda: copy.deepcopy(large)) >= size
    assert allocated(lambda: capture(large)) < 0.1 * size


def test_meta_parameters_and_constants_on_the_device_of_the_model() -> None:
    with torch.device("meta"):
        empty = decoder("Gemma3", sliding_window=8, query_pre_attn_scalar=16)
    program = capture(empty)
    devices = {node.kwargs["device"].type for node in program.graph.nodes if "device" in node.kwargs}
    assert devices == {"meta"}
    (logits,) = program.run([tokens(3, 5).to("meta")])
    assert logits.is_meta and logits.shape == (3, 5, 96)


def test_other_modules_need_example_inputs() -> None:
    with pytest.raises(CaptureError, match=r"Sequential.*give example_inputs"):
        capture(model("mlp"))
    with pytest.raises(CaptureError, match="must be tensors, got int"):
        capture(model("mlp"), example_inputs=(3,))  # type: ignore[arg-type]


def test_a_batch_of_one_is_not_taken_for_a_constant() -> None:
    program = capture(model("mlp"), example_inputs=plain_inputs(1))
    given = plain_inputs(4)
    torch.testing.assert_close(program.run(given)[0], expected("mlp", given))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_failure_names_the_innermost_module(caplog: pytest.LogCaptureFixture) -> None:
    broken = seeded(lambda: nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.GELU(), Branching())))
    with pytest.raises(CaptureError, match=r"module '1\.1' \(Branching\) cannot be captured at .*test_capture.py:\d+: .*data-dependent"):
        capture(broken, example_inputs=plain_inputs())
    with pytest.raises(CaptureError, match=r"module '0' \(Linear\) cannot be captured.*reduction dim"):
        capture(model("mlp"), example_inputs=(torch.zeros(2, 31),))
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG], "one message is enough"


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        result: Tensor = self.body(x) + self.calls
        return result


def test_state_that_the_forward_changes() -> None:
    counting = seeded(Counting)
    with pytest.raises(CaptureError, match="writes to calls"):
        capture(counting, example_inputs=plain_inputs())
    assert not counting.calls.any()


class FixedLength(nn.Module):
    config = None

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.mixer = nn.Linear(11, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.mixer(self.embed(input_ids).mT)
        return result


def test_fixed_length() -> None:
    with pytest.raises(CaptureError, match=r"FixedLength fixes the shape of 'input_ids' to \[s\d+, 11\]"):
        capture(seeded(FixedLength))


class Regions(nn.Module):
    """Constants, buffers and linears inside regions without gradients or autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.plain = torch.arange(32.0)
        self.register_buffer("scale", torch.full((32,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.a(x) + self.plain * self.scale
            with torch.no_grad():
                y = self.b(y) * torch.tensor(3.0)
        return y - self.plain


def test_regions_are_inlined_and_constants_kept() -> None:
    regions = seeded(Regions)
    program = capture(regions, example_inputs=plain_inputs())
    assert [str(node.target) for node in program.graph.nodes].count("aten.linear.default") == 2
    assert not list(program.graph_module.children())
    given = plain_inputs(4)
    torch.testing.assert_close(program.run(given)[0], regions(*given).detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_capture_on_a_gpu() -> None:
    resident = FAMILIES["llama"]().cuda()
    given = tokens(3, 7).cuda()
    with torch.no_grad():
        torch.testing.assert_close(capture(resident).run([given])[0], resident(given).logits, rtol=1e-4, atol=1e-5)
