"""Streaming with error feedback: the same bytes as a compile in memory, with files of bounded size, and in the memory of a layer.

That it goes on wherever it is interrupted is tested with all other streams.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpc
from qpc import calibration, spilled_moments
from qpc.calibration import Samples
from qpc.capture import capture
from qpc.compiler import build, captured, finish
from qpc.errors import BudgetError, SettingsError
from qpc.held_source import HeldSource
from qpc.integrations.streamed import Stream
from qpc.integrations.transformers import load_pretrained
from qpc.ir.annotation import site_of
from qpc.layerwise import estimate_by_layers
from qpc.moments import MomentStream
from qpc.options import Options
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from qpc.safetensors_source import OnDisk
from qpc.sensitivity import perturbed
from qpc.spill import Spill
from qpc.spilled_moments import SpilledMoments
from qpc.work_in_progress import working_on
from tests import interrupted
from tests.families import WIDTH, decoder, grouped, tokens
from tests.memory import memory_bytes, settled
from tests.mixtures import MIXTURES, STACKED
from tests.test_streaming import MODELS, given, sensitivities

TEXT = tokens(20, 24)
SMALL = partial(decoder, "Llama", intermediate_size=64)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model, with its sensitivities."""

    @cache
    def store(name: str) -> Path:
        model, directory = (MODELS | {"small": SMALL})[name](), tmp_path_factory.mktemp(name)
        model.save_pretrained(directory, max_shard_size="100KB")
        (directory / "sensitivities.json").write_text(sensitivities(model).to_json())
        return directory

    return store


def in_memory(directory: Path, output: Path, budget: object, **options: Any) -> None:
    """The oracle: what `qpc.compile` makes of it with moments of the same kind."""
    parsed = Options.of(budget, calibration=TEXT, tune="off", effort="fast", **options)  # type: ignore[arg-type]
    object.__setattr__(parsed, "weigh_positions", False)
    program = build(load_pretrained(directory)[0], parsed, sensitivities=given(directory))
    qpc.save(finish(program, parsed), output, tokenizer_from=directory, shard_bytes=interrupted.SHARD_BYTES)


@pytest.mark.parametrize(("name", "embeddings"), [("llama_tied", 2), ("gpt2", None)])
def test_the_bytes_are_those_of_a_compile_in_memory(
    name: str, embeddings: int | None, stored: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = stored(name)
    options: dict[str, Any] = {"seed": 3, "embeddings": embeddings}
    monkeypatch.setattr(calibration, "BATCH_INPUTS", 100)
    in_memory(directory, tmp_path / "memory", interrupted.BUDGET, **options)
    parsed = Options.of(interrupted.BUDGET, calibration=TEXT, effort="fast", **options)
    plan = Stream.of(directory, parsed, given(directory))
    plan.carry_out(tmp_path / "stream", shard_bytes=interrupted.SHARD_BYTES)
    assert interrupted.equal(tmp_path / "stream", tmp_path / "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "stream"]
    source = plan.program.source
    assert isinstance(source, HeldSource)
    layers = {weight: count for weight, count in source.reads.items() if ".0." in weight}
    assert len(layers) > len(given(directory).values) and set(layers.values()) == {2}, "once in each sweep, norms too"


@pytest.mark.parametrize(("family", "together"), [("gemma3", False), ("gpt2", True)])
def test_moments_are_those_of_a_model_in_memory(family: str, together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, whether they are taken in one run through a segment or in several; in two files at most, which are gone in the end."""
    if not together:
        monkeypatch.setattr(spilled_moments, "MOMENT_BYTES", 1)
    program = grouped(family)
    samples = Samples((tokens(2, 9), tokens(3, 30)), (tokens(1, 20),), "")
    stream = MomentStream(program, samples.batches, samples.held_out, sequential=False)
    with working_on(tmp_path / "out", {}) as work:
        assert work is not None
        spill = Spill(work, "any")
        moments = SpilledMoments(program, program.linears(), samples, HeldSource(Live()), spill)
        for node in program.linears():
            found, expected = moments.moment([node]), stream.moment([node])
            assert torch.equal(found.matrix, expected.matrix) and found.count == expected.count
            assert found.held_out is not None and expected.held_out is not None
            assert torch.equal(found.held_out.matrix, expected.held_out.matrix)
            assert len(list(work.directory.iterdir())) <= 2
        assert spill.most_bytes == 2 * (2 * 9 + 3 * 30 + 20) * WIDTH * 4
        moments.close()
        assert list(work.directory.iterdir()) == []


@STACKED
def test_moments_of_experts_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    program = capture(MIXTURES["gpt_oss"]())
    Pipeline((Canonicalize(), Fusion())).run(program)
    samples = Samples((tokens(2, 9), tokens(3, 30)), (tokens(1, 20),), "")
    stream = MomentStream(program, samples.batches, samples.held_out, sequential=False)
    with working_on(tmp_path / "out", {}) as work:
        assert work is not None
        moments = SpilledMoments(program, program.linears(), samples, HeldSource(Live()), Spill(work, "any"))
        stacks = [node for node in program.linears() if site_of(node).experts is not None]
        assert stacks
        for node in stacks:
            for found, expected in zip(moments.moments_of_experts([node]), stream.moments_of_experts([node]), strict=True):
                assert torch.equal(found.matrix, expected.matrix) and found.count == expected.count
                assert found.held_out is not None and expected.held_out is not None
                assert torch.equal(found.held_out.matrix, expected.held_out.matrix)


def test_weights_are_dropped_before_the_widest_moment_is_factored(
    stored: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once nothing of a part is run again, all but those that read the last of its inputs, which are packed then."""
    monkeypatch.setattr(spilled_moments, "MOMENT_BYTES", 1)
    program = Stream.of(stored("small"), Options.of(3, calibration=TEXT), given(stored("small"))).program
    source = program.source
    assert isinstance(source, HeldSource)
    seen = 0
    with working_on(tmp_path / "out", {}) as work:
        assert work is not None
        moments = SpilledMoments(program, program.linears(), Samples((tokens(2, 9),), (), ""), source, Spill(work, "any"))
        for node in program.linears():
            moments.moment([node])
            weight = site_of(node).weight
            others = [weight.replace("down", other) for other in ("gate", "up")] if "down" in weight else []
            if others:
                assert isinstance(source.find(weight), Tensor)
                seen += 1
            assert all(source.reads[other] == 1 and isinstance(source.find(other), OnDisk) for other in others)
    assert seen == 2


class Live:
    """A source that is asked for nothing, since the module has all values."""

    device = torch.device("cpu")


def test_the_memory_is_that_of_a_layer(tmp_path: Path) -> None:
    """However many layers there are: six more add less than one and a half to the peak. The first stream imports, so it is not counted."""
    _, few, many = (growth_bytes(tmp_path / name, layers) for name, layers in (("first", 2), ("few", 2), ("many", 8)))
    assert few > LAYER_BYTES and many - few < 1.5 * LAYER_BYTES, (few, many)


def growth_bytes(directory: Path, layers: int) -> int:
    """By how much a stream makes this process larger. Most weights go through sweeps and into the result, but are not packed."""
    model = decoder("Llama", num_hidden_layers=layers, intermediate_size=26_000)
    model.save_pretrained(directory)
    numbers = sensitivities(model)
    del model
    text = {"calibration": tokens(8, 16), "exclude": ("*mlp*", "*.[qkv]_proj"), "effort": "fast"}
    before = settled()
    plan = Stream.of(directory, Options.of(4, **text), numbers)
    plan.carry_out(directory / "out")
    source = plan.program.source
    assert isinstance(source, HeldSource) and LAYER_BYTES <= source.most_bytes < 1.1 * LAYER_BYTES
    return memory_bytes("VmHWM") - before


LAYER_BYTES = 3 * 26_000 * WIDTH * 4
"""Of the feed-forward network of one layer of that model."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "self"}, "cannot sample text.*qpc sample.*--calibration none"),
        ({"calibration": TEXT, "row_feedback": "on"}, "--row-feedback off"),
        ({"calibration": TEXT, "tune": 5}, "--tune off"),
        ({"calibration": TEXT, "sensitivity": "random"}, "sensitivities by random need the whole model"),
    ],
)
def test_what_needs_the_whole_model_is_refused(options: dict[str, Any], message: str, stored: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError, match=message):
        Stream.of(stored("small"), Options.of(3, effort="fast", **options), None)


def test_a_budget_that_nothing_fits_is_refused_before_any_work(stored: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        qpc.stream(stored("gpt2"), tmp_path / "out", 0.1, calibration=TEXT, sensitivities=given(stored("gpt2")), effort="fast")
    assert list(tmp_path.iterdir()) == []


def test_sensitivities_are_estimated_layer_by_layer(stored: Callable[[str], Path], tmp_path: Path) -> None:
    """Against the definition in a model in memory; an estimate that was interrupted goes on where it was."""
    directory, seed = stored("small"), 4
    network = load_pretrained(directory)[0]
    program = captured(network, Options.of(3))
    Pipeline((Canonicalize(), Fusion())).run(program)
    text = tokens(4, 16)

    def stop(task: str, done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), working_on(tmp_path / "out", {}) as work:
        assert work is not None
        estimate_by_layers(program, text, HeldSource(Live()), work, seed=seed, progress=stop)
    with working_on(tmp_path / "out", {}) as work:
        assert work is not None
        found = estimate_by_layers(program, text, HeldSource(Live()), work, seed=seed)
        assert len([entry for entry in work.entries if "sensitivity" in entry]) == len(found.values) == 14
        assert list(work.directory.iterdir()) == []
        later = work.directory / "activations-later-00001"
        later.touch()
        assert estimate_by_layers(program, text, HeldSource(Live()), work, seed=seed) == found and later.exists()
    for name, value in found.values.items():
        attention, layer = "self_attn" in name, name.partition("layers.")[2][0]
        behind = f"model.layers.{layer}.post_attention_layernorm" if attention else "model.norm" if layer == "1" else "model.layers.1"
        before = read_by(network, behind, text)
        weight = network.get_parameter(f"{name}.weight")
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(perturbed(kept, 0.01, (seed, f"{name}.weight")))
            after = read_by(network, behind, text)
            weight.copy_(kept)
        expected = float(((after - before).square().sum(-1) / before.square().sum(-1)).mean()) / 0.01
        assert value == pytest.approx(expected, rel=1e-3)


def read_by(network: nn.Module, name: str, text: Tensor) -> Tensor:
    """What a module reads, in float64."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    network(text)
    handle.remove()
    return seen[0].detach().double()


def test_without_a_file_no_kl_is_predicted(stored: Callable[[str], Path], tmp_path: Path) -> None:
    report = qpc.stream(stored("gpt2"), tmp_path / "out", 2.5, effort="fast")
    assert report.predicted_loss is None and any("estimated layer by layer" in remark for remark in report.remarks)
    assert len({row.sensitivity for row in report.rows}) == 4 and report.bits_per_weight <= 2.5
    assert qpc.verify(tmp_path / "out").intact
