"""`qpc.generate`: a lean loop that continues prompts token by token, greedily or by temperature."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpc.errors import SettingsError
from qpc.integrations.decoder import Decoder, Stepping

CAPACITY_STEP = 128
"""Places of a cache are a multiple of this, so that calls of similar length share one, and with it a step that was compiled or captured."""

ATTRIBUTE = "_qpc_decoders"
"""Attribute of a model that holds its decoders, so that they live as long as it does."""


class Decoders(dict[tuple[int, Stepping], Decoder]):
    """The decoder that was used last for each batch and way of stepping; copies of the model begin without any."""

    def __deepcopy__(self, memo: object) -> "Decoders":
        return Decoders()

    def __reduce__(self) -> tuple[type["Decoders"], tuple[()]]:
        return Decoders, ()


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    tokens: int64 [batch, new] on the CPU, without the prompts; behind its stop token a sequence is padded. lengths: tokens of each
    sequence, stop token included. prepare_s: until the step was compiled or captured, if it was not. first_token_s: from then to the first
    token of each sequence. elapsed_s: to the last.
    stepping: how steps ran. attention: why they attended as the model does by itself; None: by `qpc::decode_attention`.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    prepare_s: float
    first_token_s: float
    elapsed_s: float
    stepping: Stepping
    attention: str | None

    @property
    def sequences(self) -> list[Tensor]:
        """The tokens of each sequence, without padding."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, after the first token of each; 0 if there are no others."""
        rest = sum(self.lengths) - len(self.lengths)
        return rest / (self.elapsed_s - self.first_token_s) if rest else 0.0


def generate(
    model: nn.Module,
    tokens: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    stepping: Stepping | str | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> Generated:
    """Continue prompts. At temperature 0 the result is that of `model.generate(do_sample=False)` of transformers.

    model: a causal language model of transformers, compiled or not, on one device.
    tokens: the prompts, int64 [batch, length], or lists of tokens, which are padded on the left.
    attention_mask: [batch, length], 0 where `tokens` are padding, which must be on the left.
    max_new_tokens: of each sequence; with the prompt, at most the positions that the model has.
    temperature: logits are divided by it before tokens are drawn; 0 takes the likeliest. seed: of the draws, which depend on the device.
    stop: tokens behind which a sequence ends; by default those of the generation configuration. Nothing else of that is followed.
    stepping: how each step runs, by default in a CUDA graph where the model is on a GPU.
    on_tokens: called after each step with the new token of each sequence, None for those that have ended.

    Raises `SettingsError` for arguments that do not fit, `ModelError` for a model that cannot generate.
    """
    called_s = time.monotonic()
    prompts, mask = _padded(tokens, attention_mask)
    batch, length = prompts.shape
    _check_limits(model, length, max_new_tokens, temperature)
    stops = _stop_tokens(model) if stop is None else tuple(stop)
    padding = _padding_token(model, stops)
    lengths, first_token_s = [0] * batch, 0.0
    columns: list[list[int]] = []
    running = [True] * batch
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        decoder = _decoder(model, batch, length + max_new_tokens, stepping)
        decoder.ready(temperature == 0)
        started_s = time.monotonic()
        decoder.begin(prompts, mask, temperature, seed)
        for column in _columns(decoder, max_new_tokens, temperature == 0):
            if not columns:
                first_token_s = time.monotonic() - started_s
            fresh = [token if alive else None for token, alive in zip(column, running, strict=True)]
            columns.append([padding if token is None else token for token in fresh])
            lengths = [count + alive for count, alive in zip(lengths, running, strict=True)]
            running = [token is not None and token not in stops for token in fresh]
            if on_tokens is not None:
                on_tokens(fresh)
            if not any(running):
                break
    finally:
        for module in training:
            module.training = True
    made, elapsed_s = torch.tensor(columns).T.contiguous(), time.monotonic() - started_s
    return Generated(made, tuple(lengths), started_s - called_s, first_token_s, elapsed_s, decoder.stepping, decoder.attention)


def _columns(decoder: Decoder, count: int, greedy: bool) -> Iterator[list[int]]:
    """The token of each sequence after each step, `count` times. A GPU begins a step before the token of the one before is read."""
    if decoder.device.type != "cuda":
        for step in range(count):
            if step:
                decoder.advance(greedy)
            yield decoder.tokens[:, 0].tolist()
        return
    places = [torch.empty((decoder.batch,), dtype=torch.int64, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
    for step in range(count + 1):
        if step < count:
            if step:
                decoder.advance(greedy)
            places[step % 2].copy_(decoder.tokens[:, 0], non_blocking=True)
            events[step % 2].record()
        if step:
            events[(step - 1) % 2].synchronize()
            yield places[(step - 1) % 2].tolist()


def _padded(tokens: Tensor | Sequence[Sequence[int]], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts and mask, int64 [batch, length]. Raises `SettingsError` unless each prompt has a token and padding is on the left."""
    if not isinstance(tokens, Tensor):
        if mask is not None:
            raise SettingsError("attention_mask goes with a tensor of tokens; lists of tokens are padded as they need it")
        if not tokens or not all(len(row) for row in tokens):
            raise SettingsError("each prompt needs at least one token")
        longest = max(map(len, tokens))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in tokens])
        tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tokens])
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise SettingsError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}, required int64 [batch, length] of at least one token")
    mask = torch.ones_like(tokens) if mask is None else mask.to(tokens)
    if mask.shape != tokens.shape:
        raise SettingsError(f"attention_mask is {tuple(mask.shape)}, tokens are {tuple(tokens.shape)}; required the same shape")
    if not bool((mask[:, -1] == 1).all()) or bool((mask.diff(dim=1) < 0).any()):
        raise SettingsError("attention_mask must be ones, behind zeros where a prompt is padded on its left")
    return tokens, mask


def _check_limits(model: nn.Module, length: int, max_new_tokens: int, temperature: float) -> None:
    """Raise `SettingsError` for a number that cannot be meant."""
    if max_new_tokens < 1:
        raise SettingsError(f"{max_new_tokens=} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise SettingsError(f"{temperature=} must be 0 or more, and finite")
    most = _positions(model)
    if most is not None and length + max_new_tokens > most:
        raise SettingsError(f"a prompt of {length} tokens and {max_new_tokens=} are more than the {most} positions of the model")


def _positions(model: nn.Module) -> int | None:
    """Of a sequence at most; None if the configuration does not say."""
    config: Any = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def _stop_tokens(model: nn.Module) -> tuple[int, ...]:
    """Those of the generation configuration; none if it names none."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _padding_token(model: nn.Module, stops: Sequence[int]) -> int:
    """What follows a stop token: the padding token of the generation configuration, else the first stop token."""
    found = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return int(found) if found is not None else stops[0] if stops else 0


def _decoder(model: nn.Module, batch: int, capacity: int, stepping: Stepping | str | None) -> Decoder:
    """One that has room, the one before if it is enough and the model is still where it was."""
    device = next(model.parameters()).device
    way = Stepping.parse(stepping, device)
    known: Decoders = model.__dict__.setdefault(ATTRIBUTE, Decoders())
    found = known.get((batch, way))
    if found is None or found.capacity < capacity or found.device != device:
        places = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        found = known[batch, way] = Decoder(model, batch, min(places, _positions(model) or places), way)
    return found
