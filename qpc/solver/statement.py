"""What is asked of the solver, and what it answers."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from fractions import Fraction

from qpc.cost import Choice, Cost
from qpc.errors import BudgetError, SolverError
from qpc.quant.quantizer import Quantizer


class Resource(Enum):
    """What an allocation spends; any one may be minimised, the others limited. The values are the order of the solver's tables."""

    LOSS = 0
    BYTES = 1
    LATENCY = 2

    def of(self, cost: Cost) -> float:
        """How much of it a cost has: nats, bytes, picoseconds."""
        return (cost.distortion, cost.weight_bytes, cost.latency_ps)[self.value]

    def show(self, amount: float) -> str:
        """An amount with its unit."""
        return f"a loss of {amount!r}" if self is Resource.LOSS else f"{int(amount)} {'bytes' if self is Resource.BYTES else 'ps'}"


@dataclass(frozen=True)
class Limits:
    """What an allocation may spend in all; None is no limit. A limit may be met exactly, and is never exceeded.

    weight_bytes [bytes], latency_ps [picoseconds], loss [the unit of the choices' distortions].
    """

    weight_bytes: int | None = None
    latency_ps: int | None = None
    loss: float | None = None

    def of(self, resource: Resource) -> float | None:
        """The limit of one resource."""
        return (self.loss, self.weight_bytes, self.latency_ps)[resource.value]

    @property
    def given(self) -> dict[Resource, float]:
        """The limits that are set."""
        return {resource: limit for resource in Resource if (limit := self.of(resource)) is not None}


@dataclass(frozen=True)
class Item:
    """Linears that may run as one: a single, a legal group, or several that share a weight.

    Items may overlap: every subset that may be fused is an item of its own. An allocation takes items that cover each site exactly once.

    sites: names of the linears. choices: one for each quantizer that the item may take, with bytes, loss and latency of all its sites.

    Raises `SolverError` if there are no sites or choices, a quantizer occurs twice, or a cost is negative or not finite.
    """

    sites: tuple[str, ...]
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        names = ", ".join(self.sites)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise SolverError(f"an item needs distinct sites, got {names or 'none'}")
        if not self.choices:
            raise SolverError(f"{names}: no quantizer of the palette supports this linear; exclude it or add one that does")
        if not all(math.isfinite(choice.cost.distortion) for choice in self.choices):
            raise SolverError(f"{names}: a loss is not finite; check the sensitivities")
        if any(choice.cost.weight_bytes < 0 or choice.cost.latency_ps < 0 for choice in self.choices):
            raise SolverError(f"{names}: a choice has negative bytes or a negative latency")


@dataclass(frozen=True)
class Rules:
    """What an allocation must keep beside its limits.

    alike: each of these sets of sites takes one quantizer, together with every site that an item ties to them.
    allowed: the quantizers that a site may take; None among them is to stay as it is. Other sites may take any.
    least_rate: a site takes no quantizer of a lower rate [bits per weight], or stays as it is.
    excluded: sites that stay as they are.
    most_quantizers: largest number of distinct quantizers; to stay as it is counts as none.

    Raises `SolverError` if most_quantizers is negative.
    """

    alike: Sequence[Collection[str]] = ()
    allowed: Mapping[str, Collection[Quantizer | None]] = field(default_factory=dict)
    least_rate: Mapping[str, Fraction] = field(default_factory=dict)
    excluded: Collection[str] = frozenset()
    most_quantizers: int | None = None

    def __post_init__(self) -> None:
        if self.most_quantizers is not None and self.most_quantizers < 0:
            raise SolverError(f"most_quantizers={self.most_quantizers} must not be negative")

    def permit(self, site: str, quantizer: Quantizer | None) -> bool:
        """Whether a site may take a quantizer."""
        if site in self.allowed and quantizer not in self.allowed[site]:
            return False
        return quantizer is None or (site not in self.excluded and quantizer.rate >= self.least_rate.get(site, 0))


class Status(StrEnum):
    """How the search ended: within the gap that was asked for, or stopped, with the gap that was reached."""

    OPTIMAL = "optimal"
    TIME_LIMIT = "time limit"
    SIZE_LIMIT = "size limit"


@dataclass(frozen=True)
class Allocation:
    """What the solver chose.

    choices: quantizer of each site; None leaves it as it is. groups: the sites of each item that was taken. cost: bytes, loss and latency
    in all. lower_bound: no allocation that keeps limits and rules has less of what was minimised. gap: (reached - lower_bound) / reached.
    """

    choices: Mapping[str, Quantizer | None]
    groups: tuple[tuple[str, ...], ...]
    cost: Cost
    lower_bound: float
    gap: float
    status: Status


class InfeasibleError(BudgetError):
    """No allocation keeps all the limits.

    nearest: for each limit that bites, the least amount with which the other limits can be kept (the least that was found, where the
    message says that time was short). Empty if no single limit can mend it, or the rules leave no allocation at all. alone: where that is
    empty, for each limit that cannot even be kept without the others, the least amount without them.
    """

    def __init__(self, message: str, nearest: Mapping[Resource, float], alone: Mapping[Resource, float] | None = None) -> None:
        super().__init__(message)
        self.nearest = dict(nearest)
        self.alone = dict(alone or {})
