"""Sampled text follows the model and its seed, begins as asked, and models that cannot speak say so."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qpc import sampling
from qpc.errors import ModelError, SettingsError
from qpc.integrations.transformers import load_pretrained
from qpc.sampling import (
    BYTES_OF_LOGIT,
    MOST_ON_GPU,
    TOGETHER,
    TOGETHER_ON_GPU,
    Start,
    cache_bytes,
    cache_name,
    cannot_sample,
    chat_opening,
    drawn,
    fitting,
    sample,
)
from tests.families import FAMILIES, PLAIN, VOCABULARY, model


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> tuple[Any, Any]:
    """A model with the BOS token 0, and its tokenizer of bytes."""
    return load_pretrained(tiny_directory)


def test_samples_repeat_with_their_seed(tiny: tuple[Any, Any]) -> None:
    first, again, other = (sample(tiny[0], 3, 20, seed=seed) for seed in (1, 1, 2))
    assert first.shape == (3, 20) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert bool((first[:, 0] == 0).all()), "every row starts with the BOS token"
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_samples_follow_the_model(name: str) -> None:
    """At a temperature of almost zero the likeliest continuation must come out: the cache carries what came before."""
    text = sample(model(name), 2, 24, seed=0, temperature=1e-6)
    with torch.no_grad():
        logits = model(name)(text).logits[:, :-1]
    taken = logits.gather(2, text[:, 1:, None])[..., 0]
    assert (logits.max(dim=2).values - taken).max() < 1e-4


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """A uniform grid of numbers hits each token in proportion to its probability, and no token of probability zero."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -2.0, -torch.inf]])
    count = 1 << 16
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, finite = drawn(logits.expand(count, 5), uniform)
    found = torch.bincount(tokens.flatten(), minlength=5)
    torch.testing.assert_close(found / count, logits[0].softmax(0), rtol=0, atol=2 / count)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn(logits.expand(2, 5), ends)[0].flatten().tolist() == [0, 3]
    assert finite and not any(drawn(torch.stack([logits[0], logits[0] + bad]), ends)[1] for bad in (torch.nan, torch.inf, -torch.inf))


def test_without_bos_the_first_token_is_random(tiny_directory: Path) -> None:
    network, _ = load_pretrained(tiny_directory)
    assert isinstance(network, nn.Module)
    network.config.bos_token_id = None
    text = sample(network, 32, 2, seed=0)
    assert text[:, 0].unique().numel() > 8
    assert int(text.min()) >= 0 and int(text.max()) < 257


def test_samples_begin_as_asked() -> None:
    llama = model("llama")
    text = sample(llama, 40, 6, seed=0, opening=(5, 7), random_first=True)
    assert bool((text[:, :2] == torch.tensor([5, 7])).all())
    assert text[:, 2].unique().numel() > 16
    assert sample(llama, 2, 3, seed=0, opening=(5, 6, 7, 8)).tolist() == [[5, 6, 7]] * 2, "an opening that fills the sequence"


def test_more_sequences_than_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    text = sample(model("llama"), TOGETHER + 3, 4, seed=0)
    assert text.shape == (TOGETHER + 3, 4)
    for fewer in (TOGETHER, 5):
        assert torch.equal(text[:fewer], sample(model("llama"), fewer, 4, seed=0))
    monkeypatch.setattr(sampling, "TOGETHER", 50)
    assert torch.equal(text, sample(model("llama"), TOGETHER + 3, 4, seed=0))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_configuration_tells_what_a_sequence_keeps(name: str) -> None:
    network = model(name)
    with torch.no_grad():
        output = network(torch.ones(1, 7, dtype=torch.int64), use_cache=True)
    kept = sum(part.nbytes for layer in getattr(output, cache_name(network)).layers for part in (layer.keys, layer.values))
    assert cache_bytes(network.config, 7, 4) == kept > 0


@given(st.integers(1, 1 << 15), st.sampled_from([2, 4]), st.integers(0, 1 << 40), st.sampled_from(sorted(FAMILIES)))
def test_as_many_run_together_on_a_gpu_as_memory_allows(length: int, element_bytes: int, free: int, name: str) -> None:
    config = model(name).config
    found, kept = fitting(config, length, element_bytes, free), cache_bytes(config, length, element_bytes)
    assert kept is not None and 1 <= found <= MOST_ON_GPU
    each = kept + VOCABULARY * (4 + 4 + 4 + 8 + 8)  # logits, over the temperature, probabilities, twice in float64
    assert found == 1 or found * each <= free / 2
    assert found == MOST_ON_GPU or (found + 1) * (kept + VOCABULARY * BYTES_OF_LOGIT) > free // 2


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_hidden_layers": [2]}, {"num_attention_heads": 0}, {"vocab_size": None}])
def test_a_configuration_that_does_not_tell(change: dict[str, object]) -> None:
    config = SimpleNamespace(**{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 96} | change)
    assert fitting(config, 8, 4, 0) == TOGETHER_ON_GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_samples_the_same() -> None:
    there, here = (sample(FAMILIES["llama"]().to(device), 9, 12, seed=0, temperature=1e-6) for device in ("cuda", "cpu"))
    assert torch.equal(there, here)


def test_the_mode_of_the_model_is_given_back() -> None:
    network = FAMILIES["llama"]()
    network.train()
    network.get_submodule("model.layers.0").eval()
    before = [module.training for module in network.modules()]
    sample(network, 1, 3, seed=0)
    assert [module.training for module in network.modules()] == before


def test_progress_ends(tiny: tuple[Any, Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    sample(tiny[0], 2, 9, seed=0, progress=lambda *report: seen.append(report))
    assert seen[0] == ("sample", 0, 8) and seen[-1] == ("sample", 8, 8)


def test_the_opening_of_a_chat(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    with pytest.raises(SettingsError, match="no chat template"):
        chat_opening(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    try:
        assert tokenizer.decode(chat_opening(tokenizer)) == "<user>"
    finally:
        tokenizer.chat_template = None


def test_what_cannot_speak_says_why() -> None:
    assert all(cannot_sample(model(name)) is None for name in FAMILIES)
    assert "not a language model" in (cannot_sample(model(sorted(PLAIN)[0])) or "")


def test_logits_that_are_not_finite() -> None:
    network = FAMILIES["llama"]()
    with torch.no_grad():
        network.get_parameter("lm_head.weight").fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        sample(network, 1, 3, seed=0)


def test_the_cache_has_one_of_two_names() -> None:
    class Renamed(nn.Module):
        """The same model with the name that transformers 5.24 gave to its cache."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model("llama")
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
            output = self.inner(input_ids, use_cache=use_cache, **{cache_name(self.inner): cache})
            return type("Output", (), {"logits": output.logits, "cache": getattr(output, cache_name(self.inner))})

    assert cannot_sample(Renamed()) is None
    assert torch.equal(sample(Renamed(), 3, 9, seed=0), sample(model("llama"), 3, 9, seed=0))


def test_a_model_without_cache() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 8)
            self.config = model("llama").config

        def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> Any:
            return type("Output", (), {"logits": self.table(input_ids)})

    assert cannot_sample(Forgetful()) is None
    with pytest.raises(ModelError, match="no cache"):
        sample(Forgetful(), 1, 3, seed=0)


def test_starts_are_parsed() -> None:
    assert [Start.parse(str(start)) for start in Start] == list(Start)
    with pytest.raises(SettingsError, match="known: bos, random, chat"):
        Start.parse("end")
