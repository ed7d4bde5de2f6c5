"""Sensitivities, and the importance of positions, from gradients: the loss to second order.

Let z be a random change of the output such that half the mean of (z . d)^2 is what a small change d of it costs (for the KL from the
model's own distribution p its covariance is diag(p) - p p^T at each position: the Fisher information of the logits; see `Reference`).
With G the gradient of z . output with respect to a weight W, an error E of W costs half the mean of <G, E>^2. Noise whose rows are
white and have t times the square of the rows w_i of W therefore costs

    t / (2 n) * sum over rows i of |w_i|^2 E|G_i|^2,    n = in_features,

and a_l is that over t and the number of positions: what noise injection finds as the noise gets small. One backward pass gives a sample
of it for every weight at once.

G is the sum of d_s x_s^T over the positions s, d_s being the gradient with respect to the output of the linear. Without the terms that
couple positions, the same cost of an error whose rows are E_i = |w_i| u is half the mean over u of

    u^T (sum over s of q_s x_s x_s^T) u,    q_s = sum over i of |w_i|^2 d_si^2,

so q_s is how much a position matters when the linear is rounded: error feedback takes its moments with these weights. (Gradients in the
moments: GuidedQuant, arXiv 2505.07004; YAQA, arXiv 2505.22988.)
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from qpc.errors import ModelError
from qpc.ir.annotation import site_of
from qpc.ir.linear import LINEAR, stored_matrix
from qpc.ir.program import Program
from qpc.ir.walk import Walk
from qpc.progress import Progress, silent, track
from qpc.sensitivity.output_loss import main_output, reference_of
from qpc.sensitivity.output_moments import OutputMoments
from qpc.sensitivity.sites import by_weight
from qpc.sensitivity.values import Loss, Method, Sensitivities

POSITIONS_AT_ONCE = 1024
"""Positions of one backward pass, at least one sequence: few, for every pass is another sample; their activations are in memory at once."""


Importance = Sequence[Mapping[str, Tensor]]
"""How much each position matters to each linear: for each batch, by name of the linear node, float32 [positions] on the CPU."""


@dataclass(frozen=True)
class Backward:
    """What one backward pass found.

    energy: a_l times the number of positions, by name of the parameter. importance: float32 [positions] by name of the linear node; not of
    stacks of experts.
    """

    energy: Mapping[str, float]
    importance: Mapping[str, Tensor]
    positions: int
    kind: Loss


Sink = Callable[[str, Tensor], None]
"""`sink(weight, gradient [..., out_features])`: with respect to what a linear writes, by name of its parameter."""

Recall = Callable[[int, Callable[[], Backward]], Backward]
"""`recall(number, make)`: what the pass of this number found, by making it if it is not known."""


def by_gradient(
    program: Program,
    batches: Sequence[Tensor],
    *,
    seed: int = 0,
    recall: Recall = lambda number, make: make(),
    moments: OutputMoments | None = None,
    held_out: int = 0,
    progress: Progress = silent,
) -> tuple[Sensitivities, Importance]:
    """Sensitivities, and the importance of every position, on batches of the only input of a program.

    program: CANONICAL or later. batches: each a tensor with sequences as first axis. The model is not modified.
    moments: where those of the gradients are added up, of each pass that is made. held_out: how many of the last batches are held out.

    Raises `ModelError` if there are no linears, if the output cannot be differentiated, or if a gradient is not finite.
    """
    passes = [(number, part) for number, batch in enumerate(batches) for part in parts(batch)]
    totals: dict[str, float] = {}
    importance: list[dict[str, list[Tensor]]] = [{} for _ in batches]
    positions, kind = 0, Loss.KL
    for number, (batch, part) in enumerate(track(passes, "gradients", len(passes), progress)):
        apart = batch >= len(batches) - held_out
        sink = None if moments is None else partial(moments.add, held_out=apart)
        found = recall(number, partial(backward, program, part, (seed, number), sink))
        positions, kind = positions + found.positions, found.kind
        for weight, energy in found.energy.items():
            totals[weight] = totals.get(weight, 0.0) + energy
        for node, values in found.importance.items():
            importance[batch].setdefault(node, []).append(values)
    joined = [{node: torch.cat(pieces) for node, pieces in each.items()} for each in importance]
    coefficients = {site_of(node).name: totals[site_of(node).weight] / positions for node in program.linears()}
    return Sensitivities(coefficients, kind, 0.0, seed, positions, Method.GRADIENT), joined


def backward(program: Program, tokens: Tensor, key: tuple[object, ...], sink: Sink | None = None) -> Backward:
    """One pass forward and back, on a value of the only input. key: decides the draw of z. sink: takes the gradients of all outputs.

    Attention is computed by its formula, for the fused kernels may add up gradients in any order, and the same seed must give the same.

    Raises `ModelError` as `by_gradient` does.
    """
    groups = by_weight(program)
    if not groups:
        raise ModelError("the model has no linear that may be quantized")
    device = program.device
    generator = torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))
    energy: dict[str, Tensor] = {}
    importance: dict[str, Tensor] = {}
    leaves: dict[fx.Node, Tensor] = {}
    lengths: dict[fx.Node, Tensor] = {}

    def watch(node: fx.Node, value: Tensor) -> None:
        if node.target is not LINEAR:  # rows that are sorted by expert: which position is which depends on the batch
            return

        def take(gradient: Tensor) -> None:
            importance[node.name] = (gradient.detach().float().square() @ lengths[node]).flatten()
            if sink is not None:
                sink(site_of(node).weight, gradient)

        importance[node.name] = torch.zeros(value.numel() // value.shape[-1], device=device)
        value.register_hook(take)  # type: ignore[no-untyped-call]

    try:
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for nodes in groups:
                leaf = stored_matrix(program, site_of(nodes[0])).requires_grad_()
                square = torch.linalg.vector_norm(leaf.detach(), dim=1, dtype=torch.float32).square()
                leaf.register_post_accumulate_grad_hook(partial(_take_energy, energy, site_of(nodes[0]).weight, square))  # type: ignore[no-untyped-call]
                leaves |= dict.fromkeys(nodes, leaf)
                lengths |= dict.fromkeys(nodes, square)
            outputs = Walk(program, (tokens.to(device),)).finish(leaves, watch)
            reference = reference_of(program, outputs)
            output = main_output(outputs)
            cotangent = reference.cotangent(generator).to(output.dtype)
            torch.autograd.backward(output, cotangent, inputs=list(dict.fromkeys(leaves.values())))
    except RuntimeError as error:
        raise ModelError(f"{type(program.module).__name__} cannot be differentiated: {str(error).splitlines()[0]}") from error
    found = {weight: float(value) for weight, value in energy.items()}
    for nodes in groups:
        if not math.isfinite(found.get(site_of(nodes[0]).weight, math.nan)):
            raise ModelError(f"{site_of(nodes[0]).name}: the output has no finite gradient with respect to its weight")
    return Backward(found, {name: value.cpu() for name, value in importance.items()}, reference.positions, reference.kind)


def _take_energy(energy: dict[str, Tensor], weight: str, square: Tensor, leaf: Tensor) -> None:
    """Keep what the gradient of a weight says, and forget it: gradients of all weights would need the memory of the model again."""
    assert leaf.grad is not None
    rows = torch.linalg.vector_norm(leaf.grad, dim=1, dtype=torch.float32).square()
    energy[weight] = (square @ rows) / (2 * leaf.shape[1])
    leaf.grad = None


def parts(batch: Tensor, positions: int = POSITIONS_AT_ONCE) -> Iterator[Tensor]:
    """The sequences of a batch, those together that go through one backward pass: of so many positions, at least one sequence."""
    each = max(1, math.prod(batch.shape[1:-1] if batch.is_floating_point() else batch.shape[1:]))
    yield from torch.split(batch, max(1, positions // each))
