"""Perplexity, and the distance of a compiled model from its reference, on a stretch of text.

The protocol: windows that do not overlap, one at a time, each behind the BOS token if the tokenizer puts that before a text (some models
are far worse without it); the log-likelihood of every token but the first of its window; the KL divergence of the next-token
distributions at every position. Softmax in float32, sums in float64.
"""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qpc import cache
from qpc.errors import EvaluationError, ModelError
from qpc.journal import Journal, Step
from qpc.progress import Progress, silent, track

CHUNK = 128
"""Positions whose softmax over the vocabulary is held at once."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. The fields about the reference are None when there was none.

    perplexity, reference_perplexity: exp of the mean negative log-likelihood per predicted token.
    kl: mean KL(reference || model) in nats per position.
    top1_agreement: share of positions at which both models rank the same token first.
    tokens: number of tokens read, but for those put before windows. window: tokens per window.
    """

    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    tokens: int
    window: int


@dataclass(frozen=True)
class Sums:
    """Sums over some positions: negative log-likelihoods in nats of both models, divergence in nats, and how often both agree."""

    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: float = 0.0

    @staticmethod
    def of(measurement: dict[str, float] | None) -> "Sums | None":
        """From a journal; None if that has no sums of this form."""
        return Sums(**measurement) if measurement is not None and measurement.keys() == asdict(Sums()).keys() else None

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.loss + other.loss,
            self.reference_loss + other.reference_loss,
            self.divergence + other.divergence,
            self.agreed + other.agreed,
        )


def evaluate(
    model: nn.Module,
    reference: nn.Module | None,
    tokens: Tensor,
    window: int = 1024,
    progress: Progress = silent,
    journal: Journal[dict[str, float]] | None = None,
    bos: int | None = None,
) -> Evaluation:
    """Evaluate a causal language model on `tokens`, beside a reference if there is one.

    tokens: int64 [n], n >= 2. A last window shorter than `window` counts if it predicts at least one token.
    journal: windows of these models that it holds are not measured again, others are added to it.
    bos: a token to put before each window that does not begin with it.
    Raises `EvaluationError` for too short a text or window, `ModelError` for logits that are not finite.
    """
    if tokens.ndim != 1 or tokens.numel() < 2:
        raise EvaluationError(f"evaluation needs a row of at least 2 tokens, got shape {tuple(tokens.shape)}; give a longer text")
    if window < 2:
        raise EvaluationError(f"{window=} must be at least 2: the first token of a window is never predicted")
    added = [bos is not None and int(piece[0]) != bos for piece in torch.split(tokens, window)]
    pieces = [functional.pad(piece, (int(more), 0), value=bos) for piece, more in zip(torch.split(tokens, window), added, strict=True)]
    windows = [piece for piece in pieces if piece.numel() > 1]
    name: Step = () if journal is None else ("window", fingerprint(model), None if reference is None else fingerprint(reference))
    sums = Sums()
    for piece in track(windows, "evaluate", len(windows), progress):
        step = (*name, hashlib.sha256(piece.cpu().numpy().tobytes()).hexdigest()[:32])
        known = None if journal is None else Sums.of(journal[step])
        found = window_sums(model, reference, piece) if known is None else known
        if journal is not None:
            journal[step] = asdict(found)
        sums += found
    positions = sum(piece.numel() for piece in windows)
    predicted = positions - len(windows)
    return Evaluation(
        perplexity=exp(sums.loss / predicted),
        reference_perplexity=None if reference is None else exp(sums.reference_loss / predicted),
        kl=None if reference is None else sums.divergence / positions,
        top1_agreement=None if reference is None else sums.agreed / positions,
        tokens=positions - sum(added),
        window=window,
    )


def fingerprint(model: nn.Module) -> str:
    """What tells a model from others in a journal: a digest of its configuration and tensors."""
    return cache.key(model, 1, {})


@torch.inference_mode()
def window_sums(model: nn.Module, reference: nn.Module | None, tokens: Tensor) -> Sums:
    """The sums over one window, int64 [length]."""
    logits = logits_of(model, tokens[None])[0]
    other = None if reference is None else logits_of(reference, tokens[None])[0]
    sums = Sums()
    for start in range(0, tokens.numel(), CHUNK):
        span = slice(start, start + CHUNK)
        targets = tokens[start + 1 : start + CHUNK + 1].to(logits.device)
        mine = log_probabilities(logits[span], "the model")
        if other is None:
            sums += Sums(loss=-likelihood(mine, targets))
            continue
        theirs = log_probabilities(other[span].to(logits.device), "the reference")
        if theirs.shape != mine.shape:
            raise EvaluationError(
                f"the model has {mine.shape[1]} logits and the reference {theirs.shape[1]}; both must share one vocabulary"
            )
        divergence = (theirs.exp() * (theirs - mine)).sum(dtype=torch.float64).item()
        agreed = (theirs.argmax(dim=1) == mine.argmax(dim=1)).sum().item()
        sums += Sums(-likelihood(mine, targets), -likelihood(theirs, targets), divergence, agreed)
    return sums


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of tokens [batch, length], whether a model returns them alone, in a tuple or as `.logits`."""
    device = next((parameter.device for parameter in model.parameters()), tokens.device)
    output = model(tokens.to(device), use_cache=False) if hasattr(model, "generation_config") else model(tokens.to(device))
    logits = getattr(output, "logits", output)
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(f"the model returns {type(output).__name__}, not logits [batch, length, vocabulary]")
    return logits


def log_probabilities(logits: Tensor, whose: str) -> Tensor:
    """Float32 log-softmax of logits [positions, vocabulary]. Raises `ModelError` if one is NaN."""
    values = logits.float().log_softmax(dim=1)
    if values.isnan().any():
        raise ModelError(f"the logits of {whose} are not finite, so nothing can be measured; check its weights and dtype")
    return values


def likelihood(log_probability: Tensor, targets: Tensor) -> float:
    """Summed log-likelihood of int64 `targets`, the tokens that follow the first positions of [positions, vocabulary]."""
    picked = log_probability[: targets.numel()].gather(1, targets[:, None])
    return picked.sum(dtype=torch.float64).item()


def exp(mean_loss: float) -> float:
    """Perplexity of a mean loss in nats; infinite where a float cannot hold it."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bos_of(tokenizer: Any, tokens: Tensor) -> int | None:
    """The BOS token, if the tokenizer put it in front of these tokens of a text."""
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and tokens[0] == bos else None


def first_tokens(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first tokens of a text, int64 [count], with whatever the tokenizer itself puts in front.

    Raises `EvaluationError` if the text has fewer.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    if ids.numel() < count:
        raise EvaluationError(f"the text has {ids.numel()} tokens, --tokens asks for {count}; give a longer text or --tokens {ids.numel()}")
    return ids[:count]
