"""The command line, run as a user runs it: results on stdout, one line for every mistake, nothing left behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qpc
from qpc import terminal
from qpc.__main__ import main
from qpc.evaluate import evaluate, first_tokens
from qpc.integrations.transformers import load_pretrained
from qpc.terminal import ProgressBars
from tests.latency.tables import file, of_palette


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command in this process. However slow the machine is, it writes no line of progress."""
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", math.inf)

    def call(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, out, err)

    return call


@pytest.fixture(scope="module")
def compiled(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 3.25 bits, made by the command itself."""
    output = tmp_path_factory.mktemp("compiled") / "out"
    with pytest.raises(SystemExit) as caught:
        main(["compile", str(tiny_directory), "-o", str(output), "--bits", "3.25", "--effort", "fast"])
    assert caught.value.code == 0
    return output


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency table."""
    path = tmp_path_factory.mktemp("gpu") / "toy.json"
    path.write_text(json.dumps(file(of_palette())))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night. " * 8)
    return path


def refused(outcome: Outcome, *words: str) -> None:
    """A mistake of the user: code 2, one line on stderr with these words, nothing on stdout."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err, outcome.err


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"qpc {qpc.__version__}\n", "")


def test_compile_prints_one_json_object(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    outcome = run("compile", tiny_directory, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["output"] == str(tmp_path / "out")
    assert 2 < result["bits_per_weight"] <= 4
    assert (result["budget"], result["effort"], result["seed"]) == ("4bit", "fast", 0)
    assert result["linear_bytes"] == sum(row["weight_bytes"] for row in result["rows"] if row["quantizer"] is not None)
    assert qpc.is_checkpoint(tmp_path / "out")


def test_compile_keeps_a_size(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    outcome = run("compile", tiny_directory, "-o", tmp_path / "out", "--size", "110kB", "--effort", "fast", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["model_bytes"] <= 110_000


def test_compile_keeps_a_predicted_loss_with_the_smallest_model(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    options = ("--effort", "fast", "--calibration", "none", "--overwrite", "--json")
    sizes = []
    for kl in ("0.001", "0.0001nats"):
        outcome = run("compile", tiny_directory, "-o", tmp_path / "out", "--kl", kl, *options)
        assert outcome.code == 0, outcome.err
        result = json.loads(outcome.out)
        assert 0.5 * float(kl.removesuffix("nats")) < result["predicted_loss"] < 1.1 * float(kl.removesuffix("nats"))
        sizes.append(result["model_bytes"])
    assert sizes[0] < sizes[1]


def test_compile_keeps_a_time(run: Run, tiny_directory: Path, tmp_path: Path, gpu: Path) -> None:
    options = ("--latency", "26us@4", "--gpu", gpu, "--effort", "fast", "--calibration", "none")
    outcome = run("compile", tiny_directory, "-o", tmp_path / "out", *options, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["budget"], result["batch"], result["gpu"]) == ("0.026ms@4", 4, "NVIDIA Toy, measured")
    assert 0 < result["latency_s"] <= 26e-6
    shown = run("inspect", tmp_path / "out")
    assert "us per token at batch 4" in shown.out and max(map(len, shown.out.splitlines())) <= 80


def test_excluded_linears_stay(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    pattern = "*.down_proj"
    outcome = run("compile", tiny_directory, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast", "--exclude", pattern, "--json")
    names = [row["name"] for row in json.loads(outcome.out)["rows"] if row["quantizer"] is not None]
    assert names and not any(name.endswith("down_proj") for name in names)


def test_embeddings_and_blocks_are_options(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    options = ("--bits", "4", "--effort", "fast", "--embeddings", "6", "--rotation-block", "32")
    outcome = run("compile", tiny_directory, "-o", tmp_path / "out", *options, "--json")
    assert outcome.code == 0, outcome.err
    (table,) = [row for row in json.loads(outcome.out)["rows"] if not row["budgeted"]]
    assert table["name"] == "model.embed_tokens" and 6 < table["bits"] < 8
    manifest = json.loads((tmp_path / "out" / "qpc.json").read_text())
    assert {entry["block"] for entry in (*manifest["linears"].values(), *manifest["embeddings"].values())} == {32}
    shown = run("inspect", tmp_path / "out")
    assert "embedding" in shown.out and max(map(len, shown.out.splitlines())) <= 80
    refused(run("compile", tiny_directory, "-o", tmp_path / "no", "--bits", "4", "--embeddings", "5.9"), "59/10", "palette")


def test_folding_is_an_option(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    options = ("--bits", "4", "--effort", "fast", "--calibration", "none", "--sensitivity", "random")
    for fold, blocks in (("--no-fold", {64, 128}), ("--fold", {0, 64, 128})):  # its heads are too narrow to be folded
        outcome = run("compile", tiny_directory, "-o", tmp_path / fold, *options, fold, "--json")
        assert outcome.code == 0, outcome.err
        manifest = json.loads((tmp_path / fold / "qpc.json").read_text())
        assert {entry["block"] for entry in manifest["linears"].values()} == blocks
        assert any(remark.startswith("fold") for remark in json.loads(outcome.out)["remarks"]) == (fold == "--fold")


def test_calibration_is_as_asked(run: Run, tiny_directory: Path, tmp_path: Path, text: Path) -> None:
    for options, expected in (
        (("--calibration", "none"), None),
        (("--calibration", text, "--calibration-tokens", "200"), "given, 200 tokens in 1 sequences"),
        (
            ("--calibration-tokens", "320", "--calibration-start", "random"),
            "self-sampled from random at temperature 1, 320 tokens in 32 sequences",
        ),
    ):
        outcome = run(
            "compile", tiny_directory, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast", "--overwrite", "--json", *options
        )
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["calibration"] == expected
    assert "320 tokens" in run("inspect", tmp_path / "out").out


def test_plan_draws_a_falling_curve(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pareto.png"
    arguments = ("plan", tiny_directory, "--bits", "2.5..4", "--step", "0.5", "--effort", "fast", "--calibration-tokens", "512")
    outcome = run(*arguments, "--plot", picture, "--json")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    points = json.loads(outcome.out)["points"]
    assert [point["budget"] for point in points] == ["2.5bit", "3bit", "3.5bit", "4bit"]
    losses = [point["predicted_loss"] for point in points]
    assert losses == sorted(losses, reverse=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = run(*arguments)
    assert [line.split()[0] for line in table.out.splitlines()[:5]] == ["budget", "2.5bit", "3bit", "3.5bit", "4bit"]
    assert "with error feedback" in table.out
    assert "sensitivities: gradient; 14 of 14 checked linears are linear" in " ".join(table.out.split())
    assert "\x1b" not in table.out and max(map(len, table.out.splitlines())) <= 80


def test_plan_shows_times_where_there_is_a_gpu(run: Run, tiny_directory: Path, tmp_path: Path, gpu: Path) -> None:
    arguments = ("plan", tiny_directory, "--effort", "fast", "--gpu", gpu)
    outcome = run(*arguments, "--latency", "25us..29us", "--step", "2us", "--batch", "8", "--plot", tmp_path / "times.png", "--json")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    points = json.loads(outcome.out)["points"]
    assert [point["budget"] for point in points] == ["0.025ms@8", "0.027ms@8", "0.029ms@8"]
    assert all(point["latency_s"] <= limit and point["batch"] == 8 for point, limit in zip(points, (25e-6, 27e-6, 29e-6), strict=True))
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    for budget in (("--bits", "3..4", "--step", "1"), ("--latency", "26us")):
        shown = run(*arguments, *budget)
        assert " us" in shown.out and "come on top" in shown.out and max(map(len, shown.out.splitlines())) <= 80, shown.out


def test_a_plan_is_what_a_compile_does(run: Run, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "cache"))
    budget = ("--bits", "4", "--kl", "0.0001", "--effort", "fast", "--calibration", "none", "--sensitivity", "random")
    planned = json.loads(run("plan", tiny_directory, *budget, "--json").out)
    assert (planned["sensitivity"], planned["calibration"]) == ("random", None) and planned["linearity"]["growth"]
    (kept,) = (tmp_path / "cache").iterdir()
    options = (*budget, "--json")
    for given in ((), ("--sensitivities", kept)):
        made = json.loads(run("compile", tiny_directory, "-o", tmp_path / "out", "--overwrite", *options, *given).out)
        for of_plan, of_compile in zip(planned["report"]["rows"], made["rows"], strict=True):
            for name in ("name", "quantizer", "weight_bytes", "group", "sensitivity"):
                assert of_plan[name] == of_compile[name]
        assert planned["points"][0]["model_bytes"] == made["model_bytes"]
    shown = run("plan", tiny_directory, *budget, "--sensitivities", kept)
    assert "q_proj" in shown.out and "4bit, 0.0001nats" in shown.out and max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_time_without_a_gpu_says_what_to_do(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    refused(run("plan", tiny_directory, "--latency", "3ms"), "this machine has none", "h100", "python -m benchmarks profile")
    refused(run("compile", tiny_directory, "-o", tmp_path / "out", "--latency", "3ms"), "this machine has none")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("no budget", "--bits 3.25")),
        (("--bits", "3..2"), ("'3..2'", "no range")),
        (("--bits", "2..3", "--step", "0"), ("must be positive",)),
        (("--bits", "2..3", "--step", "0.001"), ("larger steps",)),
        (("--bits", "2..3", "--kl", "0.1"), ("--kl", "one of them")),
        (("--bits", "3", "--plot", "p.png"), ("--plot", "2.5..4.5")),
        (("--bits", "2..3", "--plot", "p.bmp"), ("p.bmp", ".png")),
        (("--bits", "0.5..3"), ("0.5bit", "smallest feasible")),
        (("--bits", "2..3", "--size", "10kB"), ("10kB", "smallest feasible")),
        (("--kl", "0.00001", "--size", "85kB"), ("85kB", "cannot be kept", "least feasible KL", "smallest feasible size")),
        (("--latency", "3ms..1ms..2ms", "--gpu", "h100"), ("no range of times",)),
        (("--latency", "1ms..2ms", "--bits", "2..3"), ("one of --bits and --latency",)),
        (("--latency", "1ms..2ms", "--kl", "0.1"), ("--kl", "one of them")),
        (("--latency", "3ms@8", "--batch", "4"), ("3ms@8 names the batch", "--batch 4")),
        (("--latency", "3bit"), ("--latency 3bit", "a time such as 3ms", "--bits takes bits")),
        (("--bits", "3ms"), ("--latency takes a time",)),
        (("--latency", "1us", "--gpu", "h100"), ("0.001ms cannot be kept", "least feasible time of the linears is")),
        (("--latency", "1us", "--gpu", "h100", "--size", "10kB"), ("on its own", "smallest feasible size", "least feasible time")),
        (("--bits", "3", "--gpu", "abacus"), ("'abacus'", "h100", "python -m benchmarks profile")),
        (("--bits", "3", "--gpu", __file__), ("cannot be read as a latency profile",)),
        (("--bits", "3", "--sensitivities", "nowhere.json"), ("nowhere.json cannot be read",)),
        (("--bits", "3", "--sensitivities", __file__), ("no sensitivities",)),
    ],
)
def test_bad_options_of_plan(run: Run, tiny_directory: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("plan", tiny_directory, "--effort", "fast", *options), *words)


def test_inspect_tells_the_same_twice(run: Run, compiled: Path) -> None:
    table, machine = run("inspect", compiled), run("inspect", compiled, "--json")
    assert (table.code, machine.code, table.err, machine.err) == (0, 0, "", "")
    assert "q_proj" in table.out and "bits per weight" in table.out
    assert "\x1b" not in table.out and max(map(len, table.out.splitlines())) <= 80
    assert f"{json.loads(machine.out)['bits_per_weight']:.3f} bits per weight" in table.out


def test_inspect_makes_a_page(run: Run, compiled: Path, tmp_path: Path) -> None:
    made = run("inspect", compiled, "--html", tmp_path / "report.html")
    assert (made.code, made.out, made.err) == (0, f"{tmp_path / 'report.html'}: written\n", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rate = json.loads(run("inspect", compiled, "--json", "--html", tmp_path / "again.html").out)["bits_per_weight"]
    assert page == (tmp_path / "again.html").read_text(encoding="utf-8")
    assert "model.layers.1.mlp.down_proj" in page and f"{rate:.3f}" in page and "One block: model.layers.1" in page
    refused(run("inspect", compiled, "--html", tmp_path / "none" / "report.html"), "none", "cannot be written")


def test_generate_continues_the_prompt(run: Run, compiled: Path, tiny_directory: Path) -> None:
    for directory in (compiled, tiny_directory):
        outcome = run("generate", directory, "Once", "--max-new-tokens", "5")
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith("Once")
        assert outcome.err.startswith("5 tokens, the first after ") and "tokens/s" in outcome.err


def test_generate_continues_several_prompts_as_each_alone(run: Run, compiled: Path) -> None:
    prompts = ("Once upon", "A")
    together = json.loads(run("generate", compiled, *prompts, "--max-new-tokens", "9", "--json").out)
    alone = [json.loads(run("generate", compiled, each, "--max-new-tokens", "9", "--json").out)["results"][0] for each in prompts]
    assert together["results"] == alone
    assert 0 < together["first_token_s"] < together["elapsed_s"] and together["tokens_per_second"] > 0
    shown = run("generate", compiled, *prompts, "--max-new-tokens", "9").out
    assert shown == "\n\n".join(each["prompt"] + each["text"] for each in alone) + "\n"


def test_generate_prints_as_it_goes_what_it_reports(run: Run, compiled: Path) -> None:
    options = ("Once", "--max-new-tokens", "20", "--temperature", "2")
    assert (
        run("generate", compiled, *options).out
        == "Once" + json.loads(run("generate", compiled, *options, "--json").out)["results"][0]["text"] + "\n"
    )


def test_generate_repeats_with_its_seed(run: Run, compiled: Path) -> None:
    def drawn(seed: int) -> Any:
        options = ("--max-new-tokens", "12", "--temperature", "1", "--seed", str(seed), "--json")
        (result,) = json.loads(run("generate", compiled, "Once", *options).out)["results"]
        assert result["tokens"] == 12
        return result["text"]

    assert drawn(1) == drawn(1) != drawn(2)


def test_generate_compiles_the_step_if_asked(run: Run, compiled: Path) -> None:
    plain, fast = (
        json.loads(run("generate", compiled, "Once", "--max-new-tokens", "4", "--json", *how).out) for how in ((), ("--compile",))
    )
    assert fast["results"] == plain["results"]
    assert (plain["stepping"], fast["stepping"]) == ("graph" if torch.cuda.is_available() else "eager", "compiled")


def test_generate_needs_room(run: Run, compiled: Path) -> None:
    refused(run("generate", compiled, "Once", "--max-new-tokens", "1000"), "256 positions")


def test_eval_measures_both_models(run: Run, compiled: Path, tiny_directory: Path, text: Path) -> None:
    arguments = ("eval", compiled, "--reference", tiny_directory, "--text", text, "--tokens", "128", "--window", "32")
    result = json.loads(run(*arguments, "--json").out)
    assert (result["tokens"], result["window"]) == (128, 32)
    assert result["kl"] > 0 and 0 <= result["top1_agreement"] <= 1
    alone = json.loads(run("eval", tiny_directory, "--text", text, "--tokens", "128", "--window", "32", "--json").out)
    assert alone["perplexity"] == pytest.approx(result["reference_perplexity"]) and alone["kl"] is None
    model, tokenizer = load_pretrained(tiny_directory)
    ids = first_tokens(tokenizer, text.read_text(), 128)
    assert alone["perplexity"] == pytest.approx(evaluate(model, None, ids, 32, bos=int(ids[0])).perplexity), "behind the BOS token"
    assert f"{result['kl']:.4f} nats per token" in run(*arguments).out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("no budget", "--bits 3.25")),
        (("--bits", "lots"), ("'lots'", "not a number")),
        (("--bits", "nan"), ("'nan'", "not a number")),
        (("--bits", "-3"), ("must be positive",)),
        (("--bits", "80MB"), ("--size takes bytes",)),
        (("--size", "80"), ("--bits takes bits",)),
        (("--kl", "3bit"), ("--kl 3bit", "nats", "--bits takes bits")),
        (("--bits", "0.1nats"), ("--kl takes nats",)),
        (("--bits", "2", "--kl", "1e-3"), ("'1e-3'", "not a number")),
        (("--bits", "2", "--kl", "0.000001"), ("2bit, 0.000001nats", "cannot be kept", "least feasible KL", "smallest feasible size")),
        (("--bits", "0.5"), ("below the palette", "smallest feasible")),
        (("--size", "10kB"), ("smallest feasible",)),
        (("--latency", "3"), ("--latency 3", "3ms@8")),
        (("--bits", "4", "--effort", "heroic"), ("heroic", "fast", "max")),
        (("--bits", "4", "--exclude", "*"), ("no linear layers",)),
        (("--bits", "4", "--device", "abacus"), ("--device abacus",)),
        (("--bits", "4", "--calibration", "nowhere.txt"), ("'nowhere.txt'", "cannot be read")),
        (("--bits", "4", "--calibration-start", "middle"), ("'middle'", "bos, random, chat")),
        (("--bits", "4", "--calibration-start", "chat"), ("no chat template",)),
        (("--bits", "4", "--calibration-tokens", "0"), ("tokens=0",)),
        (("--bits", "4", "--tune", "much"), ("'much'", "auto", "off")),
        (("--bits", "4", "--tune", "0"), ("steps=0",)),
    ],
)
def test_bad_options_of_compile(run: Run, tiny_directory: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("compile", tiny_directory, "-o", tmp_path / "out", *options), *words)
    assert not any(tmp_path.iterdir())


def test_missing_model(run: Run, tmp_path: Path) -> None:
    refused(run("compile", tmp_path / "none", "-o", tmp_path / "out", "--bits", "4"), "none does not exist")
    for command in (("generate", "a"), ("eval", "--text", __file__)):
        refused(run(command[0], tmp_path / "none", *command[1:]), "none does not exist")
    refused(run("inspect", tmp_path / "none"), "none")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(run: Run, tiny_directory: Path, tmp_path: Path, value: float) -> None:
    model = shutil.copytree(tiny_directory, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][1, 2] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(run("compile", model, "-o", tmp_path / "out", "--bits", "4"), "model.layers.0.self_attn.v_proj.weight", "NaN or infinite")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("command", [("inspect",), ("generate", "a"), ("eval", "--text", __file__)])
def test_damaged_checkpoints(run: Run, compiled: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    def attempt(directory: Path) -> Outcome:
        return run(command[0], directory, *command[1:])

    unknown = shutil.copytree(compiled, tmp_path / "unknown")
    manifest = json.loads((unknown / "qpc.json").read_text())
    (unknown / "qpc.json").write_text(json.dumps(manifest | {"format_version": 99}))
    refused(attempt(unknown), "format version 99")
    short = shutil.copytree(compiled, tmp_path / "short")
    (short / "qpc.json").write_text(json.dumps(manifest)[:200])
    refused(attempt(short), "qpc.json")
    if command != ("inspect",):
        tensors = shutil.copytree(compiled, tmp_path / "tensors") / "model.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-100])
        refused(attempt(tensors.parent), "model.safetensors", "cut short")
        tensors.unlink()
        refused(attempt(tensors.parent), "missing")


def test_output_must_be_free(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    arguments = ("compile", tiny_directory, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast")
    refused(run(*arguments), "not empty")
    assert (tmp_path / "out" / "diary.txt").read_text() == "mine"
    assert run(*arguments, "--overwrite").code == 0
    assert qpc.is_checkpoint(tmp_path / "out") and not (tmp_path / "out" / "diary.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_must_be_writable(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        refused(run("compile", tiny_directory, "-o", output, "--bits", "4"), "file")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        refused(run("compile", tiny_directory, "-o", tmp_path / "locked" / "out", "--bits", "4"), "not a writable directory")


def test_compiled_models_are_not_compiled_again(run: Run, compiled: Path, tmp_path: Path) -> None:
    refused(run("compile", compiled, "-o", tmp_path / "out", "--bits", "2"), "compiled model already")
    refused(run("plan", compiled, "--bits", "2"), "compiled model already")


def test_bad_texts(run: Run, tiny_directory: Path, text: Path, tmp_path: Path) -> None:
    refused(run("eval", tiny_directory, "--text", tmp_path / "none.txt"), "none.txt cannot be read")
    refused(run("eval", tiny_directory, "--text", text, "--tokens", "5000"), "the text has 257 tokens", "--tokens 257")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    refused(run("eval", tiny_directory, "--text", tmp_path / "latin.txt"), "not UTF-8", "byte 2")


def test_a_model_without_tokenizer_cannot_read(run: Run, tiny_directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_directory / name, tmp_path / name)
    refused(run("generate", tmp_path, "a"), "no tokenizer")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_compile_leaves_nothing(
    run: Run, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr(ProgressBars, "__call__", lambda self, task, done, total: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
    try:
        outcome = run("compile", tiny_directory, "-o", tmp_path / "out", "--bits", "4", "--effort", "fast")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome == Outcome(code, "", "")
    assert not any(tmp_path.iterdir())


def test_as_a_process(tmp_path: Path) -> None:
    """The real interpreter: an error has no traceback, and stdout stays empty."""
    command = [sys.executable, "-m", "qpc", "compile", str(tmp_path / "none"), "-o", str(tmp_path / "out"), "--bits", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    refused(Outcome(done.returncode, done.stdout, done.stderr), "none does not exist")
