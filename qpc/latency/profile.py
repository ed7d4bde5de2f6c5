"""A measured latency table of one GPU, as `python -m benchmarks profile` and `python -m benchmarks transform` write it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency.lattice import Lattice, Point
from qpc.latency.model import Latency, LatencyModel
from qpc.plain_files import read_json
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import Quantizer

FORMAT = 1
"""Version of the form of the file."""

BFLOAT16 = "bf16"
"""Family of the rows of a weight that stays as it is."""

MOST = 10**12
"""Largest number in a table: of microseconds, eleven days."""

TRANSFORMS = ("rotate_operand", "rotate")
"""What may precede a quantized multiplication, the one that is taken first; other transforms of a file are left out."""

PS_PER_US = 1_000_000


@dataclass(frozen=True)
class Profile(LatencyModel):
    """Times of one GPU, interpolated.

    gpu: its name. launch_ps: one kernel in a CUDA graph [ps]. read_bytes_per_s: bandwidth of reading memory. multiplications: of each
    family, over batch, rate, out_features, in_features. transforms: over batch and features; None if none was measured.

    A shape, or a rate, that does not lie between measured ones gets an estimate, which says so in `Latency.estimates`. A family or a batch
    that was not measured is an error: another kernel runs there, of which the table says nothing.
    """

    gpu: str
    launch_ps: int
    read_bytes_per_s: int
    multiplications: tuple[tuple[str, Lattice], ...]
    transforms: Lattice | None

    @staticmethod
    def load(*paths: Path) -> "Profile":
        """Read one file, or several of the same GPU, whose rows are put together.

        Raises `ProfileError` that names the file, the row and the field if one cannot be read.
        """
        return Profile.parse({str(path): _json(path) for path in paths})

    @staticmethod
    def parse(files: Mapping[str, Any]) -> "Profile":
        """The same from JSON values under the names of their files.

        Rows with an `error` are left out: what failed was not measured. Raises `ProfileError`.
        """
        heads, multiplications, transforms = [], dict[str, dict[Point, int]](), dict[str, dict[Point, int]]()
        for name, content in files.items():
            heads.append(_Fields(f"{name}: measured_with", _head(name, content)))
            for number, row in enumerate(_Fields(name, content).rows()):
                fields = _Fields(f"{name}: row {number}", row)
                if "error" in fields.values:
                    continue
                if "transform" in fields.values:
                    table = transforms.setdefault(fields.text("transform"), {})
                    point: Point = (fields.count("batch"), fields.count("features"))
                else:
                    table = multiplications.setdefault(_line(fields.text("family"), fields.values.get("mixture") is True), {})
                    point = (fields.count("batch"), fields.number("rate"), fields.count("out_features"), fields.count("in_features"))
                if point in table:
                    raise ProfileError(f"{fields.where} measures again what another row did: {json.dumps(row)}")
                table[point] = max(1, round(fields.number("us") * PS_PER_US))
        if not multiplications:
            raise ProfileError(f"{', '.join(files) or 'no file'}: a profile needs measured multiplications, got none")
        if len(gpus := sorted({head.text("gpu") for head in heads})) > 1:
            raise ProfileError(f"a profile is of one GPU, got files of {', '.join(gpus)}")
        launch_ps = round(heads[0].number("launch_us") * PS_PER_US)
        fitted = tuple(
            (family, Lattice.fit(multiplications[family], (False, True, True, True), launch_ps)) for family in sorted(multiplications)
        )
        known = next((transforms[name] for name in TRANSFORMS if name in transforms), None)
        transform = None if known is None else Lattice.fit(known, (False, True), launch_ps)
        return Profile(gpus[0], launch_ps, round(heads[0].number("read_gb_s") * 10**9), fitted, transform)

    @property
    def title(self) -> str:
        """The GPU as CUDA names it."""
        return f"{self.gpu}, measured"

    def multiplication(self, shape: LinearShape, quantizer: Quantizer | None, batch: int) -> Latency:
        """Interpolated. Raises `ProfileError` for a family or a batch outside the table."""
        family, rate = (BFLOAT16, Fraction(16)) if quantizer is None else (quantizer.family, quantizer.rate)
        tables = dict(self.multiplications)
        if isinstance(quantizer, MixedRateQuantizer) and _line(family, True) in tables:
            family = _line(family, True)
        if family not in tables:
            raise ProfileError(f"the profile of {self.gpu} has no times of family {family!r}; it has {', '.join(tables)}")
        self._check_batch(tables[family], batch)
        ps, measured = tables[family].at((Fraction(batch), rate, Fraction(shape.out_features), Fraction(shape.in_features)))
        what = f"{family} at {rate} bits, {shape}, batch {batch}"
        return Latency(ps, () if measured else (f"{what}: not between times measured on {self.gpu}",))

    def transform(self, features: int, batch: int) -> Latency:
        """Interpolated; a launch, as an estimate, if no transform was measured. Raises `ProfileError` for a batch outside the table."""
        if self.transforms is None:
            return Latency(self.launch_ps, (f"no transform was measured on {self.gpu}: each counts as one launch",))
        self._check_batch(self.transforms, batch)
        ps, measured = self.transforms.at((Fraction(batch), Fraction(features)))
        what = f"transform of {features} features, batch {batch}"
        return Latency(ps, () if measured else (f"{what}: not between times measured on {self.gpu}",))

    @property
    def correction(self) -> float:
        """Largest relative change of a measured time that it took to make the times monotone."""
        tables = [table for _, table in self.multiplications] + ([] if self.transforms is None else [self.transforms])
        return max(table.correction for table in tables)

    def _check_batch(self, table: Lattice, batch: int) -> None:
        batches = table.axes[0]
        if not batches[0] <= batch <= batches[-1]:
            raise ProfileError(f"{batch=} must be from {batches[0]} to {batches[-1]}: the profile of {self.gpu} has no others")


@dataclass(frozen=True)
class _Fields:
    """The fields of a JSON object, checked as they are read. where: what an error calls the object."""

    where: str
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise ProfileError(f"{self.where} must be an object, got {type(self.values).__name__}")

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value:
            raise ProfileError(f"{self.where}: {name} must be a name, got {value!r}")
        return value

    def number(self, name: str) -> Fraction:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ProfileError(f"{self.where}: {name} must be a positive number, got {value!r}")
        if value > MOST:
            raise ProfileError(f"{self.where}: {name} must be at most {MOST:.0e}, got {float(min(value, 10**300)):.3g}")
        return Fraction(value)

    def count(self, name: str) -> Fraction:
        value = self.number(name)
        if value.denominator != 1:
            raise ProfileError(f"{self.where}: {name} must be a whole number, got {float(value)}")
        return value

    def rows(self) -> Sequence[Any]:
        value = self._get("rows")
        if not isinstance(value, list):
            raise ProfileError(f"{self.where}: rows must be a list, got {type(value).__name__}")
        return value

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise ProfileError(f"{self.where} has no {name}")
        return self.values[name]


def _line(family: str, mixture: bool) -> str:
    """What is measured apart: two rates in one weight take longer than either, so times would not be monotone in the rate."""
    return f"{family} mixture" if mixture else family


def _head(name: str, content: Any) -> Any:
    fields = _Fields(name, content)
    if (version := fields.values.get("format")) != FORMAT:
        raise ProfileError(f"{name} has format {version!r}, required {FORMAT}; measure it again with `python -m benchmarks profile`")
    if "measured_with" not in fields.values:
        raise ProfileError(f"{name} has no measured_with")
    return fields.values["measured_with"]


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} cannot be read as a latency profile: {error}") from error
