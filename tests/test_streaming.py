"""Streaming: the same bytes as a compile in memory, whatever interrupts it, and nothing that would need the whole model."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qpc
from qpc.__main__ import main
from qpc.calibration import Samples
from qpc.cli import stream as stream_command
from qpc.errors import CheckpointError, ModelError, SettingsError
from qpc.integrations.streamed import Stream, identity
from qpc.integrations.transformers import load_pretrained
from qpc.options import Options
from qpc.passes.embeddings import lookup_scale
from qpc.sensitivity import Loss, Sensitivities
from qpc.work_in_progress import working_on
from tests import interrupted
from tests.families import causal_lm, copied, decoder, tokens

BUDGET = interrupted.BUDGET
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama_tied": lambda: decoder("Llama", tie_word_embeddings=True, num_hidden_layers=1).to(torch.bfloat16),
    "llama_odd": partial(decoder, "Llama", hidden_size=60, intermediate_size=100, head_dim=20, num_hidden_layers=1),
    "gpt2": partial(causal_lm, "GPT2", n_embd=64, n_layer=1, n_head=4, n_positions=128),
}
TINY = partial(decoder, "Llama", num_hidden_layers=1)


def sensitivities(model: nn.Module) -> Sensitivities:
    """Numbers that differ, for every linear."""
    draw = random.Random(0)
    heads = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    matrices = [
        name
        for name, module in model.named_modules()
        if id(module) not in heads and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    return Sensitivities({name: draw.uniform(0.5, 1) for name in matrices}, Loss.KL, 0.0, 0, 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(scope="module")
def stored(home: Path) -> Callable[[str], Path]:
    """The directory of a model, with its sensitivities."""

    @cache
    def store(name: str) -> Path:
        model, directory = (MODELS | {"tiny": TINY})[name](), home / name
        model.save_pretrained(directory, max_shard_size="100KB")
        (directory / "sensitivities.json").write_text(sensitivities(model).to_json())
        return directory

    return store


@pytest.fixture(scope="module")
def planned(stored: Callable[[str], Path]) -> Stream:
    """A plan that is not to be carried out itself; see `again`."""
    directory = stored("tiny")
    return Stream.of(directory, Options.of(BUDGET, effort="fast", calibration=None), given(directory))


def again(plan: Stream, **changes: object) -> Stream:
    """A plan to carry out, that says of itself that it is another one."""
    return replace(plan, program=copied(plan.program), identity=plan.identity | changes)


def given(directory: Path) -> Sensitivities:
    return Sensitivities.from_json((directory / "sensitivities.json").read_text())


def stop_at(task: str, done: int) -> Callable[[str, int, int], None]:
    """A progress that ends the work."""

    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (task, done):
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("name", "embeddings"), [("llama_tied", 8), ("llama_odd", None), ("gpt2", None)])
def test_the_bytes_are_those_of_a_compile_in_memory(
    name: str, embeddings: int | None, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = stored(name)
    options: dict[str, Any] = {"effort": "fast", "sensitivities": given(directory), "seed": 3, "embeddings": embeddings}
    made = qpc.compile(load_pretrained(directory)[0], BUDGET, calibration=None, **options)
    qpc.save(made, tmp_path / "memory", tokenizer_from=directory, shard_bytes=interrupted.SHARD_BYTES)
    report = qpc.stream(directory, tmp_path / "stream", BUDGET, shard_bytes=interrupted.SHARD_BYTES, **options)
    assert report == qpc.report_of(made)
    assert interrupted.equal(tmp_path / "stream", tmp_path / "memory")
    assert qpc.verify(tmp_path / "stream").intact
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "stream"]


def test_interrupted_at_any_moment(stored: Callable[[str], Path], tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QPC_THREADS": "1"}
    command = [sys.executable, "-m", "tests.interrupted", stored("tiny"), tmp_path]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    trials = [interrupted.Trial(**trial) for trial in json.loads(done.stdout.splitlines()[-1])]
    kinds = {kind: [trial for trial in trials if trial.kind == kind] for kind in dict.fromkeys(trial.kind for trial in trials)}
    full = [trial for trial in trials if trial.kind in ("full", "starved", "too small")]
    assert len(kinds["killed"]) == interrupted.KILLS and len(full) >= interrupted.FULL_DISKS
    assert len(kinds["killed with samples"]) == interrupted.CALIBRATED_KILLS and kinds["lost activations"]
    for trial in trials:
        assert trial.same and (trial.repeated == 0) == (trial.kind not in ("lost tensors", "lost activations")), trial
    assert len({trial.finished for trial in kinds["killed"]}) > interrupted.KILLS // 2, "at different moments"
    assert sum(trial.code < 0 for trial in kinds["killed"]) >= interrupted.KILLS - interrupted.LAST_KILLS
    with_samples = kinds["killed with samples"]
    assert len({trial.finished for trial in with_samples}) > interrupted.CALIBRATED_KILLS // 2, "at different moments"
    assert sum(trial.code < 0 for trial in with_samples) >= interrupted.CALIBRATED_KILLS - interrupted.CALIBRATED_LAST_KILLS
    for trial in full:
        assert trial.code == interrupted.DISK_FULL and "make room and start again" in trial.told, trial
    assert len({trial.finished for trial in full if trial.kind == "starved"}) > interrupted.FULL_DISKS // 2, "at different moments"
    assert all("No space left on device" in trial.told for trial in full if trial.kind != "starved")


def test_an_embedding_is_known_without_its_values() -> None:
    embedding = decoder("Gemma3", num_hidden_layers=1).get_input_embeddings()
    scale = lookup_scale(embedding)
    embedding.weight = nn.Parameter(embedding.weight.to("meta"))
    assert scale not in (None, 1.0) and lookup_scale(embedding) == scale


def test_other_options_do_not_go_on(planned: Stream, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        again(planned).carry_out(out, progress=stop_at("quantize", 3))
    assert not out.exists()
    with pytest.raises(CheckpointError, match=r"another compile: seed is 0 there and 1 here.*remove .*out\.journal"):
        again(planned, seed=1).carry_out(out)
    with pytest.raises(CheckpointError, match="another compile: shard_bytes is"):
        again(planned).carry_out(out, shard_bytes=1000)
    (tmp_path / "out.journal").unlink()
    with pytest.raises(CheckpointError, match=r"out\.partial is in the way.*remove it"):
        again(planned, seed=1).carry_out(out)
    shutil.rmtree(tmp_path / "out.partial")
    again(planned, seed=1).carry_out(out)
    assert qpc.verify(out).intact and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_identity_is_that_of_weights_and_options(stored: Callable[[str], Path], planned: Stream, tmp_path: Path) -> None:
    """A copy with its times is the same model; any other option, weight or sensitivity is another one."""
    directory = shutil.copytree(stored("tiny"), tmp_path / "model")
    numbers = given(directory)
    known = planned.decisions
    assert identity(directory, known, "cpu") == planned.identity
    louder = replace(numbers, values={name: 2 * value for name, value in numbers.values.items()})
    text = Samples((tokens(),), (), "given")
    others = [
        identity(directory, replace(known, options=replace(known.options, seed=1)), "cpu"),
        identity(directory, replace(known, options=replace(known.options, exclude=("*.0.*",))), "cpu"),
        identity(directory, replace(known, sensitivities=louder), "cpu"),
        identity(directory, replace(known, samples=text), "cpu"),
        identity(directory, replace(known, samples=replace(text, batches=(tokens() + 1,))), "cpu"),
    ]
    path = min(directory.glob("*.safetensors"))
    os.utime(path, (0, 0))
    others.append(identity(directory, known, "cpu"))
    assert len({json.dumps(other) for other in (planned.identity, *others)}) == 7


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    """Before anything is begun, while another process works, and what was there is replaced only if it may be."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), working_on(target, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with working_on(target, {}, overwrite=True) as work:
        assert work is not None
        with pytest.raises(CheckpointError, match="another process"), working_on(target, {}, overwrite=True):
            pass
        (work.directory / "new").write_text("new")
        assert (target / "precious").read_text() == "old"
        work.publish(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in target.iterdir()] == ["new"]


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), working_on(tmp_path / "out", {"seed": 0}):
        raise KeyboardInterrupt
    for content in ("{\n", "1\n"):
        (tmp_path / "out.journal").write_text(content)
        with pytest.raises(CheckpointError, match=r"out\.journal is damaged.*begin anew"), working_on(tmp_path / "out", {"seed": 0}):
            pass


def test_a_changed_allocation_does_not_go_on(planned: Stream, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.journal"
    with pytest.raises(KeyboardInterrupt):
        again(planned).carry_out(out, progress=stop_at("read", 1))
    first, second = journal.read_text().splitlines()
    journal.write_text(f"{first}\n{json.dumps(json.loads(second) | {'sha256': 'another'})}\n")
    with pytest.raises(CheckpointError, match="allocation is another one"):
        again(planned).carry_out(out)


def break_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for path in directory.glob("*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                changed = change(tensors.pop(name))
                save_file(tensors if changed is None else tensors | {name: changed}, path, metadata={"format": "pt"})

    return apply


def cut_short(directory: Path) -> None:
    path = max(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_tensor(UP, lambda _: None), rf"stores no tensor {UP}"),
        (break_tensor(UP, lambda value: value[1:]), rf"{UP} in .* has shape \(191, 64\), the model needs \(192, 64\)"),
        (break_tensor(UP, lambda value: value.index_fill(0, torch.tensor([100]), float("nan"))), f"{UP} has values that are not finite"),
        (cut_short, "cut short or damaged"),
        (lambda directory: (directory / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_damaged_model_is_refused(damage: Callable[[Path], object], message: str, stored: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(stored("tiny"), tmp_path / "model")
    damage(directory)
    with pytest.raises(ModelError, match=message):
        qpc.stream(directory, tmp_path / "out", BUDGET, effort="fast", sensitivities=given(directory))
    assert not (tmp_path / "out").exists()


def command(*arguments: str | Path) -> object:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_the_command(
    stored: Callable[[str], Path], planned: Stream, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = stored("tiny")
    known = ("--sensitivities", directory / "sensitivities.json", "--calibration", "none")
    begin = ("compile", directory, "--bits", "2.3", "--effort", "fast", "--json")
    capfd.readouterr()
    assert command(*begin, *known, "-o", tmp_path / "out", "--stream") == 0
    found = json.loads(capfd.readouterr().out)
    report = again(planned).carry_out(tmp_path / "expected")
    assert found["rows"] == json.loads(json.dumps(report.to_json()))["rows"] and found["output"] == str(tmp_path / "out")
    assert interrupted.equal(tmp_path / "out", tmp_path / "expected")
    for options, words in (
        (("--stream", *known, "--fold"), "--no-fold"),
        (("--stream", *known[:2]), "--calibration none"),
    ):
        assert command(*begin, *options, "-o", tmp_path / "other") == 2
        assert words in capfd.readouterr().err
    monkeypatch.setattr(stream_command, "MEMORY_SHARE", 0.0)
    assert command(*begin, "-o", tmp_path / "other") == 2
    assert "--no-stream tries anyway" in capfd.readouterr().err


def test_what_cannot_be_read_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="GGUF"):
        qpc.stream(tmp_path / "model.gguf", tmp_path / "out", 3, sensitivities=Sensitivities({}, Loss.KL, 0.0, 0, 1))
    with pytest.raises(SettingsError, match="predict no KL; give those that `qpc sensitivities` wrote"):
        qpc.stream(tmp_path, tmp_path / "out", "0.1nats")
