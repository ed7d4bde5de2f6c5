"""Text that a language model makes up: data for a model that came without any."""

import inspect
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from qpc.errors import ModelError, SettingsError
from qpc.progress import Progress, silent, track

TOGETHER = 128
"""Sequences that are sampled at once; more would gain little speed and cost memory for their keys and values."""

TOGETHER_ON_GPU = 512
"""The same on a GPU; half as many, and half again, where its memory does not hold their keys and values."""


class Start(StrEnum):
    """How a sampled sequence begins.

    BOS: with the BOS token; a model that has none starts as with RANDOM.
    RANDOM: with the BOS token, if there is one, and a token drawn uniformly from the vocabulary (LLM-QAT, arXiv 2305.17888, section 3.1).
    CHAT: with the opening of a user's turn, so that an instruction-tuned model writes question and answer (Magpie, arXiv 2406.08464).
    """

    BOS = "bos"
    RANDOM = "random"
    CHAT = "chat"

    @staticmethod
    def parse(value: "Start | str") -> "Start":
        """The start of this name; raises `SettingsError` with the legal ones."""
        try:
            return Start(value)
        except ValueError:
            raise SettingsError(f"unknown start of samples {value!r}; known: {', '.join(Start)}") from None


def cannot_sample(model: nn.Module) -> str | None:
    """Why no text can be sampled from a model; None if nothing speaks against it."""
    if getattr(model, "config", None) is None:
        return f"{type(model).__name__} is not a language model of transformers"
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        return f"{type(model).__name__} cannot generate text"
    missing = {"input_ids", cache_name(model), "use_cache"} - inspect.signature(model.forward).parameters.keys()
    return f"the forward of {type(model).__name__} takes no {', '.join(sorted(missing))}" if missing else None


def cache_name(model: nn.Module) -> str:
    """What a model calls its keys and values, as an argument and in what it returns: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def chat_opening(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that stand before a user's first words in the chat template of a tokenizer. Raises `SettingsError` if it has none."""
    mark = "qpc"
    if getattr(tokenizer, "chat_template", None) is None:
        raise SettingsError("the tokenizer has no chat template; let samples start with 'bos' or 'random'")
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return tuple(tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"])


@torch.no_grad()
def sample(
    model: nn.Module,
    sequences: int,
    length: int,
    seed: int,
    *,
    temperature: float = 1.0,
    opening: Sequence[int] | None = None,
    random_first: bool = False,
    progress: Progress = silent,
) -> Tensor:
    """Sample from the unchanged distribution of a model: int64 [sequences, length] on the CPU, never stopped by an end token.

    opening: tokens that every sequence begins with; by default the BOS token, if the configuration has one.
    random_first: draw the token after the opening uniformly from the vocabulary; where the opening is empty this is always so.
    The uniform numbers behind the draws depend on the seed and the length alone: more sequences begin with the same ones, and how many are
    sampled at once changes nothing but the rounding of sums.

    Raises `ModelError` if the model returns no cache of keys and values, or logits that are not finite.
    """
    config: Any = model.config
    config = config.get_text_config()
    bos = getattr(config, "bos_token_id", None)
    if opening is None:
        opening = () if bos is None else (int(bos[0] if isinstance(bos, list) else bos),)
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(sequences, length, generator=draw, dtype=torch.float64)
    begin = torch.tensor(list(opening), dtype=torch.int64).expand(sequences, len(opening))
    if random_first or not opening:
        begin = torch.cat([begin, (uniform[:, len(opening) : len(opening) + 1] * config.vocab_size).long()], dim=1)
    begin = begin[:, :length]
    together = TOGETHER_ON_GPU if next(model.parameters()).is_cuda else TOGETHER
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        made: list[Tensor] = []
        while (start := sum(map(len, made))) < sequences:
            rows = slice(start, start + together)
            task = "sample" if together >= sequences else f"sample, from {start} of {sequences}"
            numbers = track(uniform[rows, begin.shape[1] :].T, task, length - begin.shape[1], progress)
            try:
                with torch.compiler.set_stance("force_eager"):  # a model that compiles itself in place may be waiting for this very text
                    made.append(_continued(model, begin[rows], numbers, temperature))
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
                together //= 2
                torch.cuda.empty_cache()
    finally:
        for module in training:
            module.training = True
    return torch.cat(made)


def _continued(model: nn.Module, begin: Tensor, uniform: Iterable[Tensor], temperature: float) -> Tensor:
    """Sequences that go on from `begin` [rows, n] by one token for each element of `uniform`, numbers [rows] each."""
    device = next(model.parameters()).device
    pieces = [begin.to(device)]
    cache, name = None, cache_name(model)
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    for made, numbers in enumerate(uniform, start=begin.shape[1]):
        # Without a mask that says otherwise, some models warn of padding where a sampled token happens to be that of padding.
        mask = {"attention_mask": torch.ones(len(begin), made, dtype=torch.int64, device=device)} if masked else {}
        output = model(input_ids=pieces[-1], use_cache=True, **{name: cache}, **mask)
        cache = getattr(output, name, None)
        if cache is None:
            raise ModelError(f"{type(model).__name__} returns no cache of keys and values")
        pieces.append(drawn(output.logits[:, -1].float() / temperature, numbers))
    return torch.cat(pieces, dim=1).cpu()


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """The tokens [rows, 1] at which the cumulative distributions of logits [rows, vocabulary] pass uniform numbers [rows].

    Raises `ModelError` for logits that leave no distribution.
    """
    cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise ModelError("the logits of the model are not finite")
    reached = torch.searchsorted(cumulative, uniform.to(logits.device)[:, None] * total, right=True)
    return reached.clamp_max(logits.shape[1] - 1)
