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
"""The same on a GPU, if the configuration does not tell how much memory a sequence takes."""

MOST_ON_GPU = 4096
"""The same if it does and memory allows: a step of few sequences takes hardly less time, most of which goes into launches."""

SHARE_OF_MEMORY = 0.5
"""Of what is free on a GPU, for keys, values and distributions; activations, among them keys and values of more heads, take more."""

BYTES_OF_LOGIT = 32
"""While a token is drawn: logits as they come, in float32 and over the temperature, probabilities, twice in float64."""


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


def cache_bytes(config: Any, length: int, element_bytes: int) -> int | None:
    """Of the keys and values of a sequence, at most; None if the configuration of a text model does not tell. element_bytes: of each."""
    heads = _told(config, "num_attention_heads")
    kept, width = _told(config, "num_key_value_heads") or heads, _told(config, "head_dim") or _told(config, "hidden_size") // max(1, heads)
    return 2 * _told(config, "num_hidden_layers") * kept * width * length * element_bytes or None


def fitting(config: Any, length: int, element_bytes: int, free_bytes: int) -> int:
    """How many sequences of so many tokens are sampled at once on a GPU with so much free memory: from 1 to `MOST_ON_GPU`."""
    grown, vocabulary = cache_bytes(config, length, element_bytes), _told(config, "vocab_size")
    if grown is None or not vocabulary:
        return TOGETHER_ON_GPU
    return max(1, min(MOST_ON_GPU, int(SHARE_OF_MEMORY * free_bytes) // (grown + BYTES_OF_LOGIT * vocabulary)))


def _told(config: Any, name: str) -> int:
    """A positive number of a configuration; 0 if it has none of this name."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else 0


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
    device = next(model.parameters()).device
    together = _together(model, config, length)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        made: list[Tensor] = []
        while (start := sum(map(len, made))) < sequences:
            rows = slice(start, start + together)
            task = "sample" if together >= sequences else f"sample, from {start} of {sequences}"
            numbers = track(uniform[rows, begin.shape[1] :].T.to(device), task, length - begin.shape[1], progress)
            try:
                with torch.compiler.set_stance("force_eager"):  # a model that compiles itself in place may be waiting for this very text
                    made.append(_continued(model, begin[rows], numbers, length, temperature))
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
                together //= 2
                torch.cuda.empty_cache()
    finally:
        for module in training:
            module.training = True
    return torch.cat(made)


def _together(model: nn.Module, config: Any, length: int) -> int:
    """How many sequences are sampled at once; half as many, and half again, where memory does not suffice for that."""
    first = next(model.parameters())
    if not first.is_cuda:
        return TOGETHER
    idle = torch.cuda.memory_reserved(first.device) - torch.cuda.memory_allocated(first.device)
    return fitting(config, length, first.element_size(), torch.cuda.mem_get_info(first.device)[0] + idle)


def _continued(model: nn.Module, begin: Tensor, uniform: Iterable[Tensor], length: int, temperature: float) -> Tensor:
    """Sequences that go on from `begin` [rows, n] to `length` by one token for each element of `uniform`, numbers [rows] each."""
    from qpc.roomy_cache import give_room  # only here, for it imports transformers

    device = next(model.parameters()).device
    pieces = [begin.to(device)]
    cache, name = None, cache_name(model)
    takes = inspect.signature(model.forward).parameters.keys()
    finite = torch.ones((), dtype=torch.bool, device=device)
    for made, numbers in enumerate(uniform, start=begin.shape[1]):
        # Without a mask that says otherwise, some models warn of padding where a sampled token happens to be that of padding.
        optional = {"attention_mask": torch.ones(len(begin), made, dtype=torch.int64, device=device), "logits_to_keep": 1}
        taken = {given: value for given, value in optional.items() if given in takes}
        output = model(input_ids=pieces[-1], use_cache=True, **{name: cache}, **taken)
        cache = getattr(output, name, None)
        if cache is None:
            raise ModelError(f"{type(model).__name__} returns no cache of keys and values")
        if len(pieces) == 1:
            give_room(cache, length)
        tokens, found = drawn(output.logits[:, -1].float() / temperature, numbers)
        finite &= found
        pieces.append(tokens)
    if not finite:  # looked at once, for it waits for the device
        raise ModelError("the logits of the model are not finite")
    return torch.cat(pieces, dim=1).cpu()


def drawn(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [rows, 1] at which the cumulative distributions of logits [rows, vocabulary] pass uniform numbers [rows].

    And a bool on the device, whether all logits leave a distribution; tokens are any where they do not.
    """
    cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    reached = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    return reached.clamp_max(logits.shape[1] - 1), total.isfinite().all()
