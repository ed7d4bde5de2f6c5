"""Which rows and columns of its linears a process holds, and what stands in the way."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import gcd, lcm

from torch import nn

from qpc.errors import CheckpointError
from qpc.integrations.parallel.plan import Axis, Split
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.shard import Shard

MOST_RANKS = 16
"""A message names the numbers of processes up to this that a checkpoint can be split over."""

Place = tuple[slice, ...]


@dataclass(frozen=True)
class Site:
    """A linear that is to be split.

    name: in the model. block: of its rotation, 0 if there is none; None if the weight is not packed. head: features of a head of attention
    that may not be torn apart, 1 if there is none.
    """

    name: str
    out_features: int
    in_features: int
    block: int | None
    head: int
    split: Split

    @staticmethod
    def of(model: nn.Module, name: str, split: Split) -> "Site":
        """The linear of this name."""
        linear, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
        assert isinstance(linear, nn.Linear | QuantizedLinear)
        head = getattr(owner, "head_dim", None)
        block = linear.block if isinstance(linear, QuantizedLinear) else None
        return Site(name, linear.out_features, linear.in_features, block, head if isinstance(head, int) else 1, split)

    @property
    def size(self) -> int:
        """Features of the axis that is split."""
        return self.out_features if self.split.axis is Axis.ROWS else self.in_features

    @property
    def code_step(self) -> int:
        """Blocks of codes begin at multiples of this."""
        if self.block is None:
            return 1
        return BLOCK_ROWS if self.split.axis is Axis.ROWS else BLOCK_COLUMNS

    @property
    def step(self) -> int:
        """The axis can be cut at multiples of this."""
        return self.code_step if self.split.axis is Axis.ROWS else lcm(self.code_step, self.block or 1)

    def share(self, ranks: int) -> int:
        """Features of each process but the last ones, which have what is left; equal parts unless the value is whole anyway."""
        return -(-self.size // (ranks * self.step)) * self.step if self.split.whole else self.size // ranks

    def can_share(self, ranks: int) -> bool:
        """Whether every process has a part. A linear of few features, whose value is whole anyway, need not be split."""
        return (ranks - 1) * self.share(ranks) < self.size


class Obstacle(Enum):
    """Why a linear cannot be split in equal parts."""

    NUMBER = "no equal parts"
    CODES = "a block of codes"
    ROTATION = "blocks of codes and of its rotation"


def obstacle(site: Site, ranks: int) -> Obstacle | None:
    """What stands in the way of so many processes."""
    share = site.size // ranks
    if site.split.whole or (site.size % ranks == 0 and share % lcm(site.step, site.head) == 0):
        return None
    if site.size % ranks or share % site.head:
        return Obstacle.NUMBER
    return Obstacle.CODES if share % site.code_step else Obstacle.ROTATION


def check(sites: Iterable[Site], ranks: int) -> None:
    """Raise `CheckpointError`, which says what to do, unless all linears can be split."""
    sites = tuple(sites)
    found = {site: reason for site in sites if (reason := obstacle(site, ranks)) is not None}
    if not found:
        return
    site, reason = next(iter(found.items()))
    raise CheckpointError(
        f"{site.name} cannot be split over {ranks} processes: {_told(site, reason, ranks)}; {_advice(found, sites, ranks)}"
    )


def _told(site: Site, reason: Obstacle, ranks: int) -> str:
    heads = site.size // site.head
    what = f"{heads} head{'' if heads == 1 else 's'} of {site.head}" if site.head > 1 else str(site.size)
    held = f"{what} {site.split.axis.value}"
    if reason is Obstacle.NUMBER:
        return f"it has {held}, which are no {ranks} equal parts"
    step = site.code_step if reason is Obstacle.CODES else site.step
    return f"of its {held} each would hold {site.size // ranks}, required a multiple of {step} ({reason.value})"


def _advice(found: Mapping[Site, Obstacle], sites: tuple[Site, ...], ranks: int) -> str:
    """What to do: take another number of processes, or compile so that this one will do; else both."""
    reasons = {count: {reason for site in sites if (reason := obstacle(site, count)) is not None} for count in range(2, MOST_RANKS + 1)}
    ready = [str(count) for count in reasons if not reasons[count]]
    possible = [count for count in reasons if Obstacle.NUMBER not in reasons[count]]
    advice = [f"take {' or '.join(ready)} processes"] if ready else []
    if Obstacle.NUMBER not in found.values():
        advice.append(f"compile again with {_options(found, sites, ranks)}")
    elif possible and not ready:
        first = possible[0]
        others = {site: reason for site in sites if (reason := obstacle(site, first)) is not None}
        advice.append(f"compile again with {_options(others, sites, first)} and take {first} processes")
    return ", or ".join(advice or ["load it without tp"])


def _options(found: Mapping[Site, Obstacle], sites: Iterable[Site], ranks: int) -> str:
    """Those that make a model that so many processes can share: of the linears that stand in the way, none because of its size."""
    options = []
    if Obstacle.ROTATION in found.values():
        widths = (site.size // ranks for site in sites if site.split.axis is Axis.COLUMNS and site.block)
        options.append(f"--rotation-block {_power_of_two(widths)}")
    leaves = dict.fromkeys(site.name.rpartition(".")[2] for site, reason in found.items() if reason is Obstacle.CODES)
    return " ".join([*options, *(f"--exclude '*.{leaf}'" for leaf in leaves)])


def _power_of_two(widths: Iterable[int]) -> int:
    """The largest that divides all of these; what suits a narrow part suits a wider one too."""
    common = gcd(*widths)
    return common & -common


@dataclass(frozen=True)
class Part:
    """The rows and columns of a linear that a process holds. biased: whether it adds the bias."""

    rows: range
    columns: range
    biased: bool

    @staticmethod
    def of(site: Site, rank: int, ranks: int) -> "Part":
        """That of a process. The products of columns are summed up, so that the first one alone adds the bias."""
        share = site.share(ranks)
        held = range(rank * share, min((rank + 1) * share, site.size))
        if site.split.axis is Axis.ROWS:
            return Part(held, range(site.in_features), biased=True)
        return Part(range(site.out_features), held, biased=rank == 0)

    def places(self, linear: nn.Linear | QuantizedLinear) -> dict[str, tuple[str, Place]]:
        """Where the tensors of the part lie in those of the whole linear: the name of each there, and the slices of it."""
        rows, columns = slice(self.rows.start, self.rows.stop), slice(self.columns.start, self.columns.stop)
        found: dict[str, tuple[str, Place]] = {"bias": ("bias", (rows,))} if self.biased and linear.bias is not None else {}
        if not isinstance(linear, QuantizedLinear):
            return found | {"weight": ("weight", (rows, columns))}
        shard = Shard(linear.out_features, linear.in_features, linear.quantizer, linear.block, self.rows, self.columns)
        held = [f"codes{index}" for index, (_, blocks) in enumerate(shard.parts) if blocks.stop > blocks.start]
        stored = {f"codes{index}": leaf for index, leaf in enumerate(held)} | {"scales": "scales", "signs": "signs"}
        return found | {leaf: (there, shard.place(there)) for leaf, there in stored.items()}
