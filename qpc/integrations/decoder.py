"""A language model of transformers with memory for a batch of sequences, and the step that continues each by one token.

The step reads and writes tensors at fixed places, so that a CUDA graph can hold all of its launches.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from qpc.errors import ModelError, SettingsError
from qpc.integrations.attention import decode_attention
from qpc.integrations.static_cache import FixedCache
from qpc.kernels.attention_ops import supports_attention
from qpc.sampling import cache_name, cannot_sample

WARM_UPS = 2
"""Steps before a step is captured: the first compiles kernels and makes workspaces, the second finds them."""

MOST_OFF, MOST_OFF_ROUNDED = 1e-3, 0.25
"""Relative difference of logits, of random keys and values, that is rounding: in float32, and in 16 bits through many random layers.
Another mask is far beyond either."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Stepping(StrEnum):
    """How a step runs. EAGER: as it is. GRAPH: its launches in a CUDA graph. COMPILED: by Inductor, and on a GPU in a CUDA graph."""

    EAGER = "eager"
    GRAPH = "graph"
    COMPILED = "compiled"

    @staticmethod
    def parse(value: "Stepping | str | None", device: torch.device) -> "Stepping":
        """The way of this name; by default a graph on a GPU. Raises `SettingsError` for an unknown name, or a graph without a GPU."""
        if value is None:
            return Stepping.GRAPH if device.type == "cuda" else Stepping.EAGER
        try:
            found = Stepping(value)
        except ValueError:
            raise SettingsError(f"unknown stepping {value!r}; known: {', '.join(Stepping)}") from None
        if found is Stepping.GRAPH and device.type != "cuda":
            raise SettingsError(f"stepping {found!r} needs a CUDA device, the model is on {device}; leave it out, or use 'compiled'")
        return found


class Decoder:
    """Sequences of one batch that grow together. `begin` takes their prompts, `advance` continues each by one token.

    model: in evaluation mode, on one device. batch: sequences. capacity: tokens of each, prompt included.
    tokens: int64 [batch, 1], the last token of each sequence, rewritten by `advance`. attention: why steps do not attend by
    `qpc::decode_attention`, None where they do; it is compared with that of the model before it is used.

    Raises `ModelError` if the model is none that generates text.
    """

    def __init__(self, model: nn.Module, batch: int, capacity: int, stepping: Stepping) -> None:
        reason = cannot_sample(model)
        if reason is not None:
            raise ModelError(f"no text can be generated: {reason}")
        config: Any = model.config
        self.batch, self.capacity, self.stepping = batch, capacity, stepping
        self.device = next(model.parameters()).device
        self.model = model
        self._takes = inspect.signature(model.forward).parameters.keys()
        self.cache = FixedCache(config.get_text_config().num_hidden_layers, batch, capacity, self.device)
        self.position, self.starts = self.cache.position, self.cache.starts
        self.tokens = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self.mask = torch.ones((batch, capacity), dtype=torch.int64, device=self.device)
        self.temperature = torch.ones((), device=self.device)
        self.generator = torch.Generator(self.device)
        self._forward: Forward = self._logits
        if stepping is Stepping.COMPILED:
            self._forward = torch.compile(self._logits, fullgraph=True, dynamic=False)
        self._graphs: dict[bool, torch.cuda.CUDAGraph | None] = {}
        with torch.no_grad():
            self._logits(self.tokens, self.tokens, self.mask[:, :1])  # makes the places of the cache
        self.attention = self._obstacle() if self.device.type == "cuda" else "the attention of the model is used on a CPU"

    @torch.no_grad()
    def begin(self, tokens: Tensor, mask: Tensor, temperature: float, seed: int) -> None:
        """Read prompts and choose the first token of each, greedily at temperature 0.

        tokens, mask: int64 [batch, length]; the mask is 0 where a prompt is padded on its left.
        Raises `ModelError` if the logits are not finite.
        """
        length = tokens.shape[1]
        assert tokens.shape == mask.shape == (self.batch, length) and length < self.capacity, f"{tokens.shape=}, {mask.shape=}"
        self.ready(temperature == 0)
        self.mask.fill_(1)
        self.mask[:, :length] = mask
        self.starts.copy_((1 - mask).sum(1))
        self.position.zero_()
        self.temperature.fill_(temperature or 1.0)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self._logits(tokens.to(self.device), positions.to(self.device), mask.to(self.device))
        if not bool(logits.isfinite().all()):
            raise ModelError("the logits of the model are not finite")
        self.position.fill_(length)
        self.generator.manual_seed(seed)
        self.tokens.copy_(self._choose(logits, temperature == 0))

    @torch.no_grad()
    def ready(self, greedy: bool) -> None:
        """Compile and capture the step, if that was not done. Tokens and position stay; what the cache holds at the position does not."""
        if self.stepping is Stepping.EAGER or greedy in self._graphs:
            return
        position, tokens = self.position.clone(), self.tokens.clone()
        if self.device.type == "cuda":
            self._graphs[greedy] = self._captured(greedy)
        else:
            self._graphs[greedy] = None
            self.step(greedy)
        self.position.copy_(position)
        self.tokens.copy_(tokens)

    @torch.no_grad()
    def compared(self) -> float:
        """By how much the logits of the step at this position differ from those of an eager one with the model's attention, relatively."""
        positions = (self.position - self.starts)[:, None]
        expected = self._logits(self.tokens, positions, self.mask).float()
        with self._attention(self.attention is None):
            found = self._forward(self.tokens, positions, self.mask).float()
        return float((found - expected).norm() / expected.norm())

    @torch.no_grad()
    def advance(self, greedy: bool) -> None:
        """One token more for each sequence. greedy: as it was begun."""
        graph = self._graphs.get(greedy)
        if graph is None:
            self.step(greedy)
        else:
            graph.replay()

    @torch.no_grad()
    def _obstacle(self) -> str | None:
        """Why `qpc::decode_attention` cannot take the place of the model's attention. A cache full of random keys and values tells."""
        if not getattr(self.model, "_supports_attention_backend", False):
            return f"the layers of {type(self.model).__name__} do not let another attention take the place of theirs"
        draw = torch.Generator(self.device).manual_seed(0)
        for layer in self.cache.fixed:
            if layer.keys is None or layer.values is None or layer.keys.shape != layer.values.shape:
                return "keys and values differ in shape"
            found = supports_attention(layer.keys.shape[-1], layer.keys.dtype, self.device)
            if found.implementation is None:
                return found.reason
            layer.keys.normal_(generator=draw)
            layer.values.normal_(generator=draw)
        self.position.fill_(self.capacity - 1)
        step = (self.tokens, self.tokens + self.capacity - 1, self.mask)
        try:
            with self._attention(True):
                ours = self._logits(*step).float()
        except ModelError as error:
            return str(error)
        theirs = self._logits(*step).float()
        for layer in self.cache.fixed:
            layer.reset()
        self.position.zero_()
        off = float((ours - theirs).norm() / theirs.norm())
        keys = self.cache.fixed[0].keys
        assert keys is not None, "the steps have written to the cache"
        most = MOST_OFF if keys.dtype == torch.float32 else MOST_OFF_ROUNDED
        return None if off <= most else f"it gives other logits than the attention of the model, by {off:.1%}"

    @contextmanager
    def _attention(self, deferred: bool) -> Iterator[None]:
        """Let steps attend by `qpc::decode_attention`, if `deferred`."""
        if not deferred:
            yield
            return
        self.cache.defer(True)
        try:
            with decode_attention(self.model):
                yield
        finally:
            self.cache.defer(False)

    def step(self, greedy: bool) -> None:
        """`advance`, launch by launch."""
        with self._attention(self.attention is None):
            logits = self._forward(self.tokens, (self.position - self.starts)[:, None], self.mask)
        self.tokens.copy_(self._choose(logits, greedy))
        self.position.add_(1)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Of the last position, [batch, vocabulary], writing keys and values to the cache."""
        optional = {"position_ids": positions, "attention_mask": mask, "logits_to_keep": 1}
        taken = {name: value for name, value in optional.items() if name in self._takes}
        output = self.model(input_ids=tokens, use_cache=True, **{cache_name(self.model): self.cache}, **taken)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _choose(self, logits: Tensor, greedy: bool) -> Tensor:
        """The next tokens [batch, 1]: the likeliest, or drawn by the smallest of exponential times, which needs no cumulative sums."""
        if greedy:
            return logits.argmax(1, keepdim=True)
        probabilities = (logits.float() / self.temperature).softmax(1)
        times = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / times).argmax(1, keepdim=True)

    def _captured(self, greedy: bool) -> torch.cuda.CUDAGraph:
        """A graph of one step, of which some run before."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        position = self.position.clone()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.position.copy_(position)
                self.step(greedy)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.step(greedy)
        return graph
