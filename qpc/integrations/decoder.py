"""A language model of transformers with memory for a batch of sequences, and the step that continues each by one token.

The step reads and writes tensors at fixed places, so that a CUDA graph can hold all of its launches.
"""

import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from qpc.errors import ModelError, SettingsError
from qpc.integrations.static_cache import fixed_cache
from qpc.sampling import cannot_sample

WARM_UPS = 2
"""Steps before a step is captured: the first compiles kernels and makes workspaces, the second finds them."""

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
    tokens: int64 [batch, 1], the last token of each sequence, rewritten by `advance`.

    Raises `ModelError` if the model is none that generates text.
    """

    def __init__(self, model: nn.Module, batch: int, capacity: int, stepping: Stepping) -> None:
        reason = cannot_sample(model)
        if reason is not None:
            raise ModelError(f"no text can be generated: {reason}")
        config: Any = model.config
        self.batch, self.capacity, self.stepping = batch, capacity, stepping
        self.device = next(model.parameters()).device
        self._model = model
        self._takes = inspect.signature(model.forward).parameters.keys()
        self.cache, self.position = fixed_cache(config.get_text_config().num_hidden_layers, capacity, self.device)
        self.tokens = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self.mask = torch.ones((batch, capacity), dtype=torch.int64, device=self.device)
        self.padding = torch.zeros((batch, 1), dtype=torch.int64, device=self.device)
        self.temperature = torch.ones((), device=self.device)
        self.generator = torch.Generator(self.device)
        self._forward: Forward = self._logits
        if stepping is Stepping.COMPILED:
            self._forward = torch.compile(self._logits, fullgraph=True, dynamic=False)
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def begin(self, tokens: Tensor, mask: Tensor, temperature: float, seed: int) -> None:
        """Read prompts and choose the first token of each, greedily at temperature 0.

        tokens, mask: int64 [batch, length]; the mask is 0 where a prompt is padded on its left.
        Raises `ModelError` if the logits are not finite.
        """
        length = tokens.shape[1]
        assert tokens.shape == mask.shape and len(tokens) == self.batch and length < self.capacity, (
            tokens.shape,
            mask.shape,
            self.capacity,
        )
        self.mask.fill_(1)
        self.mask[:, :length] = mask
        self.padding.copy_((1 - mask).sum(1, keepdim=True))
        self.position.zero_()
        self.temperature.fill_(temperature or 1.0)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = self._logits(tokens.to(self.device), positions.to(self.device), mask.to(self.device))
        if not bool(logits.isfinite().all()):
            raise ModelError("the logits of the model are not finite")
        self.position.fill_(length)
        if self.stepping is not Stepping.EAGER and self.device.type == "cuda" and (temperature == 0) not in self._graphs:
            self.tokens.copy_(logits.argmax(1, keepdim=True))
            self._graphs[temperature == 0] = self._captured(temperature == 0)
            self.position.fill_(length)
        self.generator.manual_seed(seed)
        self.tokens.copy_(self._choose(logits, temperature == 0))

    @torch.no_grad()
    def advance(self, greedy: bool) -> None:
        """One token more for each sequence. greedy: as it was begun."""
        if greedy in self._graphs:
            self._graphs[greedy].replay()
        else:
            self._step(greedy)

    def _step(self, greedy: bool) -> None:
        logits = self._forward(self.tokens, self.position - self.padding, self.mask)
        self.tokens.copy_(self._choose(logits, greedy))
        self.position.add_(1)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Of the last position, [batch, vocabulary], writing keys and values to the cache."""
        optional = {"position_ids": positions, "attention_mask": mask, "logits_to_keep": 1}
        taken = {name: value for name, value in optional.items() if name in self._takes}
        output = self._model(input_ids=tokens, past_key_values=self.cache, use_cache=True, **taken)
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
        """A graph of one step. The steps before it write keys and values where the first real step writes them anew."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        begin, first = self.position.clone(), self.tokens.clone()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(greedy)
                self.position.copy_(begin)
                self.tokens.copy_(first)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self._step(greedy)
        return graph
