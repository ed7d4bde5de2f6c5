"""Perplexity and divergence against values worked out by hand."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpc.errors import EvaluationError, ModelError
from qpc.evaluate import CHUNK, evaluate
from qpc.journal import Journal

VOCABULARY = 11


class Bigram(nn.Module):
    """Next-token logits that depend on the current token alone: a language model that can be summed up by hand."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(VOCABULARY, VOCABULARY, generator=draw))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def text(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("bos", [None, VOCABULARY - 1])
@pytest.mark.parametrize(("count", "window"), [(64, 16), (70, 16), (65, 16), (3 * CHUNK + 5, 2 * CHUNK + 3), (2, 1024)])
def test_equals_the_sums_written_out(count: int, window: int, bos: int | None) -> None:
    model, reference, tokens = Bigram(1), Bigram(2), text(count)
    mine, theirs = (bigram.table.detach().double().log_softmax(1) for bigram in (model, reference))
    loss: list[float] = []
    divergence: list[float] = []
    added = 0
    for start in range(0, count, window):
        row = tokens[start : start + window].tolist()
        if bos is not None and row[0] != bos:
            row, added = [bos, *row], added + 1
        if len(row) > 1:
            loss += [-float(mine[now, after]) for now, after in pairwise(row)]
            divergence += [float((theirs[now].exp() * (theirs[now] - mine[now])).sum()) for now in row]
    result = evaluate(model, reference, tokens, window, bos=bos)
    assert result.perplexity == pytest.approx(math.exp(sum(loss) / len(loss)), rel=1e-5)
    assert result.kl == pytest.approx(sum(divergence) / len(divergence), rel=1e-5)
    assert result.tokens == len(divergence) - added
    if bos is None:
        agreed = (mine.argmax(1) == theirs.argmax(1))[tokens[: result.tokens]].double().mean().item()
        assert result.top1_agreement == pytest.approx(agreed)


def test_a_model_agrees_with_itself() -> None:
    model = Bigram(3)
    result = evaluate(model, model, text(40), 8)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert result.perplexity == result.reference_perplexity


def test_without_reference_nothing_is_claimed_about_one() -> None:
    result = evaluate(Bigram(3), None, text(40), 8)
    assert (result.kl, result.top1_agreement, result.reference_perplexity) == (None, None, None)


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = Bigram(0)
    nn.init.zeros_(model.table)
    assert evaluate(model, None, text(50), 10).perplexity == pytest.approx(VOCABULARY)


def test_progress_counts_the_windows() -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(Bigram(0), None, text(50), 20, lambda *event: seen.append(event))
    assert seen == [("evaluate", done, 3) for done in range(4)]


class Counting(Bigram):
    """Counts the windows that it reads."""

    read = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.read += 1
        return super().forward(tokens)


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    model, reference, tokens = Counting(1), Bigram(2), text(50)

    def interrupt(task: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, reference, tokens, 10, interrupt, Journal.open(tmp_path / "done"))
    assert model.read == 3
    whole = evaluate(model, reference, tokens, 10, journal=Journal.open(tmp_path / "done"))
    assert model.read == 5
    assert whole == evaluate(Bigram(1), reference, tokens, 10)


def test_what_is_kept_is_of_these_models_and_this_text(tmp_path: Path) -> None:
    model, tokens, journal = Bigram(1), text(50), Journal.open(tmp_path / "done")
    evaluate(model, Bigram(2), tokens, 10, journal=journal)
    for other, reference, read in (
        (Bigram(3), Bigram(2), tokens),
        (model, None, tokens),
        (model, Bigram(3), tokens),
        (model, Bigram(2), tokens.flip(0)),
    ):
        assert evaluate(other, reference, read, 10, journal=journal) == evaluate(other, reference, read, 10)
    with torch.no_grad():
        model.table.mul_(0.5)
    assert evaluate(model, Bigram(2), tokens, 10, journal=journal) == evaluate(model, Bigram(2), tokens, 10)


@pytest.mark.parametrize(("tokens", "window"), [(text(1), 8), (text(8)[None], 8), (text(8), 1), (text(0), 8)])
def test_nothing_to_evaluate(tokens: Tensor, window: int) -> None:
    with pytest.raises(EvaluationError):
        evaluate(Bigram(0), None, tokens, window)


def test_nan_logits_are_named() -> None:
    model = Bigram(0)
    with torch.no_grad():
        model.table[3, 3] = math.nan
    with pytest.raises(ModelError, match="the logits of the reference are not finite"):
        evaluate(Bigram(1), model, text(50), 16)


def test_vocabularies_must_agree() -> None:
    other = Bigram(0)
    other.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY + 1))
    with pytest.raises(EvaluationError, match="11 logits and the reference 12"):
        evaluate(Bigram(1), other, text(50), 16)


def test_not_a_language_model() -> None:
    with pytest.raises(ModelError, match="not logits"):
        evaluate(nn.Identity(), None, text(50), 16)
