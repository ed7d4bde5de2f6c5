"""`qpc.generate`: what transformers generates, token for token, in a loop of its own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AttentionInterface

import qpc
from qpc.errors import ModelError, SettingsError
from qpc.integrations import attention
from qpc.integrations.decoder import Decoder, Stepping
from qpc.integrations.generation import CAPACITY_STEP
from qpc.integrations.prompts import TextStream
from tests.compiled import BUDGET, DEVICES, compiled_pair
from tests.families import FAMILIES, PLAIN, VOCABULARY, model

NEW = 24
"""Beyond the sliding windows of the tiny models."""


@pytest.fixture(autouse=True)
def clean() -> None:
    torch.compiler.reset()


def prompts(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths: tokens and mask."""
    tokens = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, :2] = 0, 0
    return tokens.to(device), mask.to(device)


def by_transformers(network: nn.Module, tokens: Tensor, mask: Tensor, stop: int | None = None) -> Tensor:
    """The continuations, padded with zeros."""
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": stop}
    found: Tensor = network.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :]
    return found.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_transformers_token_for_token(family: str, device: str) -> None:
    """Of the original and of the compiled model; also with a stop token that some sequence meets midway."""
    tokens, mask = prompts(device)
    for network in compiled_pair(family, device):
        free = by_transformers(network, tokens, mask)
        stop = int(free[0, NEW // 2])
        found = qpc.generate(network, tokens, attention_mask=mask, max_new_tokens=NEW, stop=())
        assert torch.equal(found.tokens, free) and found.lengths == (NEW,) * 3
        assert found.stepping is (Stepping.GRAPH if device == "cuda" else Stepping.EAGER)
        assert device != "cpu" or "on a CPU" in str(found.attention)
        found = qpc.generate(network, tokens, attention_mask=mask, max_new_tokens=NEW, stop=[stop])
        assert torch.equal(found.tokens, by_transformers(network, tokens, mask, stop))
        assert found.lengths[0] == free[0].tolist().index(stop) + 1
        assert all(int(row[-1]) == stop or len(row) == NEW for row in found.sequences)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_both_doors_generate_the_same(family: str, device: str) -> None:
    """A model that is compiled in place by the backend: one graph for the prompt and one for the step, without a break."""
    network, (tokens, mask) = FAMILIES[family]().to(device), prompts(device)
    expected = qpc.generate(compiled_pair(family, device)[1], tokens, attention_mask=mask, max_new_tokens=NEW, stop=(), stepping="eager")
    options = {"budget": BUDGET, "effort": "fast", "tune": "off", "inner": "eager"}
    network.compile(backend="qpalette", options=options, fullgraph=True)
    counters.clear()
    graphs: list[int] = []
    found = qpc.generate(
        network,
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        stop=(),
        stepping="eager",
        on_tokens=lambda _: graphs.append(counters["stats"]["unique_graphs"]),
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert graphs[1] == graphs[-1] and not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_compiled_step_is_compiled_once(family: str, device: str) -> None:
    _, network = compiled_pair(family, device)
    tokens, mask = prompts(device)
    expected = by_transformers(network, tokens, mask)
    counters.clear()
    graphs: list[int] = []
    options = {"max_new_tokens": NEW, "stop": (), "stepping": "compiled"}
    found = qpc.generate(
        network, tokens, attention_mask=mask, on_tokens=lambda _: graphs.append(counters["stats"]["unique_graphs"]), **options
    )
    assert torch.equal(found.tokens, expected)
    again = qpc.generate(network, tokens[:, 3:], attention_mask=mask[:, 3:] | 1, **options)
    assert again.tokens.shape == (3, NEW)
    assert found.prepare_s > again.prepare_s, "compiled once, before the clock of the tokens begins"
    assert graphs[-1] == 1 == counters["stats"]["unique_graphs"] and not counters["graph_break"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_in_one_launch_gives_the_same_tokens(family: str, device: str) -> None:
    """Where it takes the place of the model's own; where it cannot, that is found out before."""
    network = FAMILIES[family]().to(device)
    tokens, mask = prompts(device)
    decoder = Decoder(network, 3, 12 + NEW, Stepping.EAGER)
    decoder.attention = decoder._obstacle()
    without = {"gemma2": "softcap"} | ({"llama_odd": "power of two"} if device == "cuda" else {})
    assert without.get(family, "None") in str(decoder.attention)
    decoder.begin(tokens, mask, 0.0, 0)
    columns = [decoder.tokens[:, 0].tolist()]
    for _ in range(NEW - 1):
        decoder.advance(greedy=True)
        columns.append(decoder.tokens[:, 0].tolist())
    assert torch.equal(torch.tensor(columns).T, by_transformers(network, tokens, mask))


@pytest.mark.parametrize(
    ("family", "change"), [("mistral", {"sliding_window": None}), ("llama", {"scaling": 0.5}), ("gemma3", {"sliding_window": 9})]
)
def test_another_attention_is_found_out(family: str, change: dict[str, object]) -> None:
    AttentionInterface.register(attention.NAME, lambda *given, **named: attention.attend(*given, **(named | change)))
    try:
        reason = Decoder(FAMILIES[family](), 2, 64, Stepping.EAGER)._obstacle()
    finally:
        AttentionInterface.register(attention.NAME, attention.attend)
    assert reason is not None and "other logits" in reason


def test_lists_are_padded() -> None:
    network = model("llama")
    rows = [[5, 6, 7], [8]]
    found = qpc.generate(network, rows, max_new_tokens=6)
    alone = [qpc.generate(network, [row], max_new_tokens=6).sequences[0].tolist() for row in rows]
    assert [row.tolist() for row in found.sequences] == alone


def test_tokens_stream_in_order_and_end_with_their_sequence() -> None:
    network = model("qwen2")
    tokens, mask = prompts()
    stop = int(qpc.generate(network, tokens, attention_mask=mask, max_new_tokens=NEW, stop=()).tokens[1, 3])
    seen: list[list[int | None]] = []
    found = qpc.generate(network, tokens, attention_mask=mask, max_new_tokens=NEW, stop=[stop], on_tokens=seen.append)
    for row, length in enumerate(found.lengths):
        assert [column[row] for column in seen] == [*found.sequences[row].tolist(), *[None] * (len(seen) - length)]
    assert found.lengths[1] <= 4
    assert 0 < found.first_token_s <= found.elapsed_s and found.tokens_per_second > 0


def test_generation_ends_where_all_have_ended() -> None:
    network = model("llama")
    first = int(qpc.generate(network, [[5, 6]], max_new_tokens=1, stop=()).tokens[0, 0])
    found = qpc.generate(network, [[5, 6]], max_new_tokens=NEW, stop=[first])
    assert found.tokens.tolist() == [[first]] and found.tokens_per_second == 0


def test_draws_follow_the_distribution_and_the_seed() -> None:
    network = model("llama")
    with torch.no_grad():
        expected = (network(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 0.5).softmax(0)
    draws = qpc.generate(network, [[5, 6]] * 4000, max_new_tokens=1, temperature=0.5, seed=1).tokens[:, 0]
    counts = torch.bincount(draws, minlength=VOCABULARY)
    kept = expected * len(draws) > 5
    chi_square = ((counts - expected * len(draws)).square() / (expected * len(draws)))[kept].sum()
    assert chi_square < kept.sum() + 5 * (2 * kept.sum()) ** 0.5
    some = [qpc.generate(network, [[5, 6]], max_new_tokens=NEW, temperature=1, seed=seed, stop=()).tokens for seed in (1, 1, 2)]
    assert torch.equal(some[0], some[1]) and not torch.equal(some[0], some[2])


def test_a_longer_call_and_a_copy_get_memory_of_their_own() -> None:
    network = FAMILIES["llama"]()
    network.config.max_position_embeddings = 4 * CAPACITY_STEP
    short = qpc.generate(network, [[5, 6]], max_new_tokens=NEW, stop=()).tokens
    long = qpc.generate(network, [[5, 6]], max_new_tokens=CAPACITY_STEP, stop=()).tokens
    assert torch.equal(long[:, :NEW], short)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_parameter("lm_head.weight").neg_()
    assert not torch.equal(qpc.generate(twin, [[5, 6]], max_new_tokens=NEW, stop=()).tokens, short)
    assert torch.equal(qpc.generate(network, [[5, 6]], max_new_tokens=NEW, stop=()).tokens, short)


def test_a_model_in_training_stays_in_it() -> None:
    network = FAMILIES["gpt2"]().train()
    expected = qpc.generate(model("gpt2"), [[5, 6]], max_new_tokens=NEW, stop=()).tokens
    assert torch.equal(qpc.generate(network, [[5, 6]], max_new_tokens=NEW, stop=()).tokens, expected), "dropout was off"
    assert all(module.training for module in network.modules())


TWO = torch.ones((2, 3), dtype=torch.int64)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        (TWO.int(), {}, "int64"),
        (TWO[0], {}, "batch, length"),
        (TWO, {"attention_mask": TWO[:, :2]}, "the same shape"),
        (TWO, {"attention_mask": torch.tensor([[1, 0, 1]] * 2)}, "on its left"),
        (TWO, {"attention_mask": torch.tensor([[1, 1, 0]] * 2)}, "on its left"),
        ([[1]], {"attention_mask": TWO}, "lists of tokens"),
        (TWO, {"max_new_tokens": 0}, "at least 1"),
        (TWO, {"max_new_tokens": 126}, "128 positions"),
        (TWO, {"temperature": -1.0}, "0 or more"),
        (TWO, {"stepping": "walk"}, "eager, graph, compiled"),
    ],
)
def test_arguments_are_checked(tokens: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        qpc.generate(model("llama"), tokens, **options)  # type: ignore[arg-type]


def test_what_cannot_generate_says_why() -> None:
    with pytest.raises(SettingsError, match="needs a CUDA device"):
        Stepping.parse("graph", torch.device("cpu"))
    with pytest.raises(ModelError, match="not a language model"):
        qpc.generate(model(sorted(PLAIN)[0]), [[1]])
    broken = FAMILIES["llama"]()
    with torch.no_grad():
        broken.get_parameter("lm_head.weight").fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        qpc.generate(broken, [[1]])


def test_text_waits_for_whole_characters(tiny_directory: object) -> None:
    """The tokenizer has a token for each byte."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    text = "naïve 漢字 🙂!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text and stream.end() == ""
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    cut = TextStream(tokenizer)
    for token in tokenizer("🙂", add_special_tokens=False)["input_ids"][:2]:
        assert cut.add(token) == ""
    assert cut.end() != ""
