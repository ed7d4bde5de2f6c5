"""Sums over the four linears of a decoder layer, from rows of `benchmarks kernels`. Pure: tables and pictures are made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.weights import LAYER, Shape


@dataclass(frozen=True)
class Other:
    """A baseline besides bf16 as tables and pictures show it. bits: of a weight, with scales and zeros."""

    name: str
    bits: float


OTHERS = {
    "int4_us": Other("PyTorch int4, groups of 128", 4.25),
    "gemlite_int4_us": Other("GemLite int4, groups of 128", 4.25),
    "humming_int3_us": Other("Humming int3, groups of 128", 3.125),
    "humming_int4_us": Other("Humming int4, groups of 128", 4.125),
    "bitsandbytes_nf4_us": Other("bitsandbytes NF4, groups of 64", 4.127),
}
"""By their columns in a row."""


def shape_of(row: dict[str, Any]) -> Shape:
    """The shape that a row is about."""
    return row["out_features"], row["in_features"]


@dataclass(frozen=True)
class LayerSum:
    """One quantizer at one batch over the four linears. us, bf16_us: sums; others: sums by column, of the baselines that have all four."""

    family: str
    rate: float
    batch: int
    us: float
    bf16_us: float
    nbytes: int
    each: tuple[float, ...]
    others: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times faster than bf16."""
        return self.bf16_us / self.us

    def floor_us(self, read_gb_s: float) -> float:
        """The time that reading the bytes takes at the bandwidth measured."""
        return self.nbytes / read_gb_s / 1e3


def layer_sums(rows: Sequence[dict[str, Any]]) -> list[LayerSum]:
    """Sums of the quantizers and batches that have a time for all four shapes, by family, rate and batch."""
    found = []
    for family, rate, batch in sorted(
        {(row["family"], row["rate"], row["batch"]) for row in rows}, key=lambda key: (key[0] != "trellis", key)
    ):
        alike = [row for row in rows if (row["family"], row["rate"], row["batch"]) == (family, rate, batch) and "error" not in row]
        by_shape = {shape_of(row): row for row in alike}
        if not all(shape in by_shape for shape in LAYER):
            continue
        four = [by_shape[shape] for shape in LAYER]
        others = {column: sum(row[column] for row in four) for column in OTHERS if all(row.get(column) for row in four)}
        us, bf16_us, nbytes = (sum(row[column] for row in four) for column in ("us", "bf16_us", "bytes"))
        found.append(LayerSum(family, rate, batch, us, bf16_us, nbytes, tuple(row["us"] for row in four), others))
    return found


def layer_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The sums as lines of text."""
    yield f"{'family':8} {'bits':>5} {'batch':>5} {'us':>8} {'bf16':>8} {'ratio':>6}   {' / '.join(f'{o}x{i}' for o, i in LAYER)}"
    for each in layer_sums(rows):
        shapes = " / ".join(f"{us:.1f}" for us in each.each)
        yield f"{each.family:8} {each.rate:5} {each.batch:5} {each.us:8.1f} {each.bf16_us:8.1f} {each.ratio:6.2f}   {shapes}"
