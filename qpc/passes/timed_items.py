"""What the solver may choose from when time counts: every linear by itself, and every group that may run as one kernel."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from qpc.cost import Choice, Weight, possible, undominated
from qpc.ir.annotation import FusionGroup, LinearSite
from qpc.latency import Latency, LatencyModel
from qpc.passes.fusion import candidates
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.quantizer import Quantizer
from qpc.solver import Item

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Timing:
    """How an allocation counts time.

    model: times of the GPU. batch: rows of activations of one step. fuse: choose groups together with the quantizers within a limit of
    time; else the limit is kept by linears one by one, and those that happen to agree are fused afterwards.
    """

    model: LatencyModel
    batch: int = 1
    fuse: bool = True

    def items(
        self,
        places: Sequence[tuple[LinearSite, FusionGroup]],
        weights: Mapping[str, Weight],
        quantizers: Sequence[Quantizer],
        *,
        tied: bool,
        fuse: bool,
    ) -> list[Item]:
        """The items of a model.

        places: each application of a linear, with its largest legal group. weights: under their names. tied: linears will be tied to one
        quantizer, so that a choice may be the best of all though another beats it for one linear; else those are left out. fuse: with the
        groups.

        A weight that is applied several times is an item of its own, which takes the time of them all, and is never fused. Raises
        `ProfileError` if the model has no times for a quantizer.
        """
        latency = cache(self.latency)

        def table(stored: Sequence[Weight], times: int = 1) -> tuple[Choice, ...]:
            alike = tuple(replace(weight, sensitivity=1.0) for weight in stored)
            found = possible(stored, quantizers, lambda quantizer: times * latency(alike, quantizer).ps)
            return found if tied else undominated(found)

        applied: dict[str, list[str]] = {}
        for site, _ in places:
            applied.setdefault(site.weight, []).append(site.name)
        items = [Item(tuple(dict.fromkeys(names)), table([weights[weight]], len(names))) for weight, names in applied.items()]
        if not fuse:
            return items
        once = {names[0]: weight for weight, names in applied.items() if len(names) == 1}
        for group in dict.fromkeys(group for _, group in places):
            for legal in fusible(group.subset(once.keys())):
                quantized = (choice for choice in table([weights[once[name]] for name in legal.members]) if choice.quantizer is not None)
                if offered := tuple(quantized):
                    items.append(Item(legal.members, offered))
        return items

    def latency(self, stored: Sequence[Weight], quantizer: Quantizer | None) -> Latency:
        """Of linears that run as one; of those that stay as they are in bfloat16, or as much longer as they have more bytes."""
        found = self.model.group(tuple(weight.shape for weight in stored), quantizer, self.batch)
        kept = sum(weight.kept_bytes or 0 for weight in stored)
        in_bfloat16 = BFLOAT16_BYTES * sum(weight.shape.weights for weight in stored)
        if quantizer is not None or kept <= in_bfloat16:
            return found
        reason = f"{kept / in_bfloat16:g} times the bytes of bfloat16 count as so many times its time"
        return Latency(-(-found.ps * kept // in_bfloat16), (*found.estimates, reason))


def fusible(group: FusionGroup) -> Iterator[FusionGroup]:
    """The candidates of a legal group whose packed weights stack: all members but the last have whole blocks of rows."""
    for candidate in candidates(group):
        if all(shape.out_features % BLOCK_ROWS == 0 for shape in candidate.shapes[:-1]):
            yield candidate
