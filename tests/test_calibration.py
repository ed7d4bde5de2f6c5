"""Calibration: every form of the option, inputs of the right kind and number, kept on disk, and never a silent fallback."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpc import calibration
from qpc.calibration import HELD_OUT, Given, SelfSampled, collect, parse
from qpc.capture import capture
from qpc.errors import SettingsError
from qpc.integrations.transformers import load_tokenizer
from qpc.ir.program import Program
from qpc.passes.canonicalize import Canonicalize
from qpc.sampling import Start, sample
from tests.families import FAMILIES, VOCABULARY, grouped, tokens


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Any:
    """One of bytes that puts a BOS token, 0, in front of each text."""
    return load_tokenizer(tiny_directory)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def whole(samples: calibration.Samples) -> Tensor:
    return torch.cat([*samples.batches, *samples.held_out])


def test_forms_of_the_option(tokenizer: Any, tmp_path: Path) -> None:
    assert parse("self") == SelfSampled() == parse(SelfSampled())
    assert parse("self", tokens=100, start="random") == SelfSampled(tokens=100, start=Start.RANDOM)
    assert parse(SelfSampled(temperature=0.5), tokens=100) == SelfSampled(tokens=100, temperature=0.5)
    assert parse("none") is None and parse(None) is None
    text = tokens(2, 9)
    assert parse(text) == parse([text]) == parse(iter([text])) == parse(Given((text,))) == Given((text.clone(),))
    assert hash(parse(text)) == hash(Given((text.clone(),)))
    assert parse(text) != parse(text + 1) and parse(text) != parse([text, text])
    (tmp_path / "text").write_text("abc" * 200)
    found = parse(str(tmp_path / "text"), tokenizer=tokenizer)
    assert found == parse(tmp_path / "text", tokenizer=tokenizer) == parse(["abc" * 200], tokenizer=tokenizer)


def test_texts_are_read_whole_in_windows(tokenizer: Any) -> None:
    found = parse(["abc", "de"], tokenizer=tokenizer)
    assert isinstance(found, Given)
    assert tokenizer.decode(found.batches[0][0]) == "<s>abc<s>de"
    long = parse(["abcd" * 400], tokenizer=tokenizer, tokens=600)
    assert isinstance(long, Given)
    assert long.batches[0].shape == (2, SelfSampled.length)
    assert tokenizer.decode(long.batches[0].flatten()).startswith("<s>abcdabcd")


def test_a_chat_begins_with_its_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    try:
        found = parse("self", tokenizer=tokenizer, start="chat")
    finally:
        tokenizer.chat_template = None
    assert isinstance(found, SelfSampled) and tokenizer.decode(found.opening) == "<user>"
    assert max(found.opening or ()) < VOCABULARY, "else the tiny model could not read it"
    samples, _ = collect(found, grouped("llama"), 0)
    assert samples is not None
    assert bool((whole(samples)[:, : len("<user>")] == torch.tensor(found.opening)).all())


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("nowhere.txt", {}, "'nowhere.txt' is neither 'self' nor 'none'"),
        (3.5, {}, "must be 'self', 'none'"),
        (["text"], {}, "need the tokenizer"),
        ("self", {"start": "chat"}, "need the tokenizer"),
        ("self", {"start": "middle"}, "known: bos, random, chat"),
        ("self", {"tokens": 0}, "tokens=0 must be positive"),
        ("none", {"tokens": 9}, "number of tokens is for"),
        ("none", {"start": "bos"}, "start"),
        ([], {}, "no batches"),
        ([torch.zeros(0, 5)], {}, "non-empty"),
        ([3], {}, "must be a non-empty tensor .* got int"),
    ],
)
def test_bad_options(value: object, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(value, **options)


def test_bad_samples_and_texts(tokenizer: Any, tmp_path: Path) -> None:
    for fields in ({"length": 1}, {"temperature": 0.0}, {"tokens": -1}):
        with pytest.raises(SettingsError, match=next(iter(fields))):
            SelfSampled(**fields)
    with pytest.raises(SettingsError, match="the text has 4 tokens, 5 were asked for"):
        parse(["abc"], tokenizer=tokenizer, tokens=5)
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"not UTF-8 text \(byte 2\)"):
        parse(tmp_path / "latin", tokenizer=tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_default_is_the_text_of_the_model_and_enough_of_it(family: str) -> None:
    program = grouped(family)
    samples, remarks = collect(SelfSampled(), program, seed=5)
    assert samples is not None and remarks == ()
    text = whole(samples)
    widest = max(node.args[1].meta["val"].shape[0 if family == "gpt2" else 1] for node in program.linears())
    assert text.numel() >= calibration.TOKENS_PER_INPUT * min(widest, 112)
    assert torch.equal(text, sample(program.module, *text.shape, seed=5))
    assert sum(map(len, samples.held_out)) == len(text) // HELD_OUT
    assert f"{text.numel()} tokens in {len(text)} sequences" in samples.description


def test_what_is_asked_for_is_sampled() -> None:
    program = grouped("llama")
    samples, remarks = collect(SelfSampled(tokens=100, length=20, temperature=1e-6), program, seed=0)
    assert samples is not None and len(remarks) == 1 and "few" in str(remarks[0])
    text = whole(samples)
    assert text.numel() >= 100 and text.shape[1] <= 20
    assert text[:, 1:].unique(dim=0).shape[0] == 1, "at a temperature of zero all go the same way"
    samples, _ = collect(SelfSampled(tokens=10_000, length=500), program, seed=0)
    assert samples is not None and whole(samples).shape[1] == 128, "no longer than the model allows"


def test_a_second_compile_does_not_run_the_model(cache: Path) -> None:
    program = grouped("llama")
    program.module = FAMILIES["llama"]()
    runs: list[object] = []
    program.module.register_forward_hook(lambda *call: runs.append(call[1]))
    first, remarks = collect(SelfSampled(), program, seed=0)
    assert runs and first is not None and remarks == ()
    runs.clear()
    second, _ = collect(SelfSampled(), program, seed=0)
    assert not runs and second is not None
    assert torch.equal(whole(first), whole(second))
    for other, seed in ((SelfSampled(), 1), (SelfSampled(temperature=2.0), 0), (SelfSampled(start=Start.RANDOM), 0)):
        runs.clear()
        assert collect(other, program, seed=seed)[0] is not None and runs
    with torch.no_grad():
        program.module.get_parameter("model.norm.weight").mul_(2)
    runs.clear()
    assert collect(SelfSampled(), program, seed=0)[0] is not None and runs
    assert len(list(cache.iterdir())) == 5


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "file"))
    samples, remarks = collect(SelfSampled(), grouped("llama"), seed=0)
    assert samples is not None and "QPC_CACHE" in str(remarks[0])


def plain(*inputs: Tensor) -> Program:
    """A program that reads no text."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(32, 8) for _ in inputs)

        def forward(self, *xs: Tensor) -> Tensor:
            return torch.stack([linear(x) for linear, x in zip(self.linears, xs, strict=True)]).sum(0)

    program = capture(Sum().eval(), example_inputs=inputs)
    Canonicalize().run(program)
    return program


def test_models_without_text_fall_back_with_a_remark() -> None:
    for program, reason in ((plain(torch.ones(4, 32)), "no text"), (plain(torch.ones(4, 32), torch.ones(4, 32)), "2 inputs")):
        samples, remarks = collect(SelfSampled(), program, seed=0)
        assert samples is None and len(remarks) == 1
        assert reason in str(remarks[0]) and "without error feedback" in str(remarks[0])
    assert collect(None, plain(torch.ones(4, 32)), seed=0) == (None, ())


def test_a_model_that_breaks_falls_back_with_a_remark() -> None:
    program = grouped("llama")
    program.module = FAMILIES["llama"]()
    with torch.no_grad():
        program.module.get_parameter("lm_head.weight").fill_(torch.inf)
    samples, remarks = collect(SelfSampled(), program, seed=0)
    assert samples is None and "not finite" in str(remarks[0])


def test_given_inputs_are_cut_into_batches_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_INPUTS", 64)
    program = grouped("llama")
    given = [tokens(40, 9), tokens(1, 128), tokens(3, 9)]
    samples, remarks = collect(Given(tuple(given)), program, seed=0)
    assert samples is not None and remarks == ()
    assert all(batch.numel() <= 64 or len(batch) == 1 for batch in samples.batches)
    for length, count in ((9, 43), (128, 1)):
        kept, apart = (
            torch.cat([batch for batch in part if batch.shape[1] == length] or [torch.zeros(0, length)])
            for part in (samples.batches, samples.held_out)
        )
        assert len(apart) == count // HELD_OUT
        assert torch.equal(torch.cat([kept, apart]), torch.cat([batch for batch in given if batch.shape[1] == length]))
    assert f"{43 * 9 + 128} tokens in 44 sequences" in samples.description


def test_given_inputs_of_a_plain_module() -> None:
    samples, _ = collect(Given((torch.randn(16, 32),)), plain(torch.ones(4, 32)), seed=0)
    assert samples is not None and "16 tokens in 16 sequences" in samples.description


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 9), r"int64 \[sequences, length\], got torch.float32"),
        (torch.zeros(9, dtype=torch.int64), r"got torch.int64 \(9,\)"),
        (torch.full((2, 9), VOCABULARY), rf"in 0\.\.{VOCABULARY - 1}, got {VOCABULARY}"),
        (torch.full((2, 9), -1), "got -1"),
    ],
)
def test_given_inputs_that_the_model_cannot_take(batch: Tensor, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        collect(Given((batch,)), grouped("llama"), seed=0)


def test_given_inputs_need_a_model_with_one_input() -> None:
    with pytest.raises(SettingsError, match="one input"):
        collect(Given((torch.ones(4, 32),)), plain(torch.ones(4, 32), torch.ones(4, 32)), seed=0)
