"""What a change of a model's output costs: exactly, and to second order."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from qpc.errors import ModelError
from qpc.ir.program import Program
from qpc.ir.random_inputs import vocabulary
from qpc.sensitivity.values import Loss

ROWS_AT_ONCE = 32
"""Positions whose distributions are compared at a time; bounds the memory of the temporaries."""


class Reference(ABC):
    """The output of the unchanged model, and the loss of another one against it.

    positions: what the loss is an average over. usable: a bool on the device, whether there is a loss against this output.
    """

    kind: ClassVar[Loss]

    def __init__(self, output: Tensor) -> None:
        self.usable = output.isfinite().all()
        self.positions = output.numel() // output.shape[-1] if output.ndim else 1

    def loss(self, outputs: Sequence[Any]) -> float:
        """Loss of these outputs of the graph; NaN or infinity if they are not finite."""
        return float(self.measured(outputs))

    @abstractmethod
    def measured(self, outputs: Sequence[Any]) -> Tensor:
        """The same as a float64 scalar, without waiting for the device."""

    @abstractmethod
    def distance(self, outputs: Sequence[Any]) -> Tensor:
        """The same as a scalar with a gradient, float32; it has fewer digits."""

    @abstractmethod
    def cotangent(self, generator: torch.Generator) -> Tensor:
        """A random z of the shape of the output: for small changes d of it, positions * loss is half the mean of (z . d)^2."""


class _RelativeError(Reference):
    kind = Loss.RELATIVE_ERROR

    def __init__(self, output: Tensor) -> None:
        super().__init__(output)
        self._output = output
        self._energy = output.double().square().sum()
        self.usable = self.usable & (self._energy > 0)

    def measured(self, outputs: Sequence[Any]) -> Tensor:
        return (main_output(outputs) - self._output).double().square().sum() / self._energy

    def distance(self, outputs: Sequence[Any]) -> Tensor:
        return (main_output(outputs).float() - self._output.float()).square().sum() / self._energy.float()

    def cotangent(self, generator: torch.Generator) -> Tensor:
        draw = torch.randn(self._output.shape, generator=generator, device=self._output.device)
        return draw * math.sqrt(2 * self.positions / float(self._energy))


class _Divergence(Reference):
    kind = Loss.KL

    def __init__(self, output: Tensor) -> None:
        super().__init__(output)
        self._shape = output.shape
        self._log_p = output.float().flatten(0, -2).log_softmax(dim=-1)

    def measured(self, outputs: Sequence[Any]) -> Tensor:
        """KL(p || q) with q proportional to p exp(d) is log E_p[exp(d)] for d of mean zero under p, so no digits cancel for small d."""
        output = main_output(outputs).flatten(0, -2)
        total = torch.zeros((), dtype=torch.float64, device=output.device)
        for log_p, logits in zip(torch.split(self._log_p, ROWS_AT_ONCE), torch.split(output, ROWS_AT_ONCE), strict=True):
            p, d = log_p.exp(), logits.float() - log_p
            d -= (p * d).sum(dim=-1, keepdim=True)
            rows = torch.log1p((p * (torch.expm1(d) - d)).sum(dim=-1))
            rows = torch.where(rows.isfinite(), rows, torch.logsumexp(log_p + d, dim=-1))
            total += rows.clamp_min(0).double().sum()
        return total / len(self._log_p)

    def distance(self, outputs: Sequence[Any]) -> Tensor:
        log_q = main_output(outputs).float().flatten(0, -2).log_softmax(dim=-1)
        return functional.kl_div(log_q, self._log_p, reduction="sum", log_target=True) / len(self._log_p)

    def cotangent(self, generator: torch.Generator) -> Tensor:
        """Of covariance diag(p) - p p^T at each position: that of the gradients of log p(y) for labels y drawn from p, but Gaussian.

        Labels would do, but a rare one gives a long gradient, so their squares vary more.
        """
        p = self._log_p.exp()
        root = p.sqrt() * torch.randn(p.shape, generator=generator, device=p.device)
        return (root - p * root.sum(dim=-1, keepdim=True)).reshape(self._shape)


def reference_of(program: Program, outputs: Sequence[Any]) -> Reference:
    """The reference for these outputs of the unchanged graph: KL if there is one value for each token that the model reads.

    Raises `ModelError` if they are not usable.
    """
    reference = reference_in_passing(program, outputs)
    check_usable(reference.usable)
    return reference


def check_usable(usable: Tensor) -> None:
    """Raise `ModelError` unless that is so."""
    if not usable:
        raise ModelError(
            "the output of the unchanged model is not finite, or zero, on the given inputs, so nothing can be compared with it"
        )


def reference_in_passing(program: Program, outputs: Sequence[Any]) -> Reference:
    """`reference_of` without waiting for the device, so whether it is usable remains to be checked."""
    output = main_output(outputs).detach()
    placeholders = program.graph.find_nodes(op="placeholder")
    tables = {vocabulary(program, node) for node in placeholders if node.name in program.inputs}
    tables.add(getattr(getattr(program.module, "config", None), "vocab_size", None))
    return _Divergence(output) if output.ndim > 1 and output.shape[-1] in tables else _RelativeError(output)


def main_output(outputs: Sequence[Any]) -> Tensor:
    """The first floating-point output. Raises `ModelError` if there is none."""
    for value in outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("the model has no floating-point output to compare")
