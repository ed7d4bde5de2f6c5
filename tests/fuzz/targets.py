"""The doors that are knocked at: each takes a `Random`, and ends well or by a `QpcError`."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

import qpc
from qpc import checkpoint
from qpc.budget import Budget
from qpc.capture import capture
from qpc.ir.program import Program
from qpc.latency import LatencyModel, Profile, latency_of
from qpc.options import Options
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from qpc.quant import palette
from qpc.quant.feedback import Feedback, row_deviations
from qpc.quant.moment import Moment
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.quantizer import Quantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.stacking import quantize_stacked
from qpc.quant.vector import VectorQuantizer
from qpc.sensitivity import Loss, Sensitivities
from qpc.tensor_files import INDEX, TENSORS
from tests.fuzz.damage import damage_bytes, damage_file, damage_tensors, damage_value, text_of
from tests.latency.tables import file as table_file
from tests.latency.tables import full

NUMBERS = ("3", "0", "-1", "13/4", "1/0", ".5", "3.", "1e3", "0.1", "99999999999999999999", "nan", "inf", "٣", "+4", "0x3", "")
UNITS = ("", "bit", "bits", "MB", "GiB", "kB", "B", "nats", "nat", "ms", "us", "s", "tok/s", "ms@8", "s@0", "ms@", "@8", "parsecs", "🙂")
GLUE = ("", " ", ",", ", ", "..", " @ ", "@", "/", ";", "\n", "\x00")


class Toy(nn.Module):
    """Small, and with everything that a checkpoint can hold of a module that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(48, 32, bias=False)
        self.norm, self.last = nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x))) + self.second(x).sum()
        return out


@cache
def toy() -> nn.Module:
    """One of them, compiled."""
    torch.manual_seed(0)
    known = Sensitivities({"first": 1.0, "second": 2.0, "last": 0.5}, Loss.RELATIVE_ERROR, 0.01, 0, 1)
    return qpc.compile(Toy(), 4, effort="fast", calibration=None, sensitivities=known, example_inputs=(torch.zeros(2, 48),))


@cache
def home() -> Path:
    """A checkpoint of it."""
    directory = Path(mkdtemp()) / "toy"
    qpc.save(toy(), directory)
    return directory


@cache
def grouped() -> Program:
    """Its graph, before it was decided what becomes of it."""
    program = capture(Toy(), example_inputs=(torch.zeros(2, 48),))
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


@cache
def times() -> LatencyModel:
    """A measured table."""
    return latency_of("h100")


def budget(draw: Random) -> None:
    """Texts that are almost budgets. What is read is printed as it is read."""
    wild = draw.random() < 0.5
    numbers, units, glue = (NUMBERS, UNITS, GLUE) if wild else (("3", "13/4", "0.1", ".5", "7"), UNITS[1:11], (", ",))
    parts = [draw.choice(numbers) + draw.choice(glue if wild else ("", " ")) + draw.choice(units) for _ in range(draw.choice((1, 1, 2, 3)))]
    text = draw.choice(glue).join(parts)
    if wild and draw.random() < 0.2:
        text = damage_bytes(draw, text.encode("utf-8")).decode("utf-8", "replace")
    found = Budget.parse(text)
    assert Budget.parse(str(found)) == found, text


def loader(draw: Random) -> None:
    """A checkpoint of which one file is damaged, inside or as a whole."""
    directory = home().parent / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(home(), directory)
    path = directory / draw.choice((checkpoint.MANIFEST, checkpoint.MANIFEST, TENSORS))
    content = path.read_bytes()
    match draw.randrange(8):
        case 0:
            damage_file(draw, path, home() / draw.choice((checkpoint.MANIFEST, TENSORS)))
        case 1:
            path.write_bytes(damage_bytes(draw, content))
        case 2:
            shards = damage_value(draw, {"metadata": {}, "weight_map": dict.fromkeys(stored(), "model-00001-of-00002.safetensors")})
            (directory / INDEX).write_bytes(text_of(shards))
            (directory / TENSORS).rename(directory / "model-00001-of-00002.safetensors")
        case _ if path.name == TENSORS:
            path.write_bytes(damage_tensors(draw, content))
        case _:
            path.write_bytes(text_of(damage_value(draw, json.loads(content))))
    checkpoint.read_report(directory)
    checkpoint.read_quantizers(directory)
    found = qpc.load(directory, Toy())
    with torch.no_grad():
        found(torch.zeros(1, 48))


@cache
def stored() -> tuple[str, ...]:
    """The names of its tensors."""
    return tuple(checkpoint.stored(toy()))


@cache
def documents() -> Mapping[str, object]:
    """Good JSON of every kind that is read."""
    known = Sensitivities({f"layers.{index}": 0.1 * index for index in range(4)}, Loss.KL, 0.01, 0, 64)
    return {
        "sensitivities": json.loads(known.to_json()),
        "profile": json.loads(json.dumps(table_file(full()[:40]))),
        "report": json.loads(json.dumps(qpc.report_of(toy()).to_json())),
        "quantizer": [palette.to_json(each) for each in (trellis_at(Fraction(13, 4)), ScalarQuantizer(3), VectorQuantizer(2, 6))],
    }


def document(draw: Random) -> None:
    """JSON in which something is wrong: sensitivities, latency tables, reports, quantizers."""
    kind = draw.choice(list(documents()))
    made = damage_value(draw, documents()[kind])
    match kind:
        case "sensitivities":
            text = text_of(made) if draw.random() < 0.9 else damage_bytes(draw, text_of(made))
            found = Sensitivities.from_json(text.decode("utf-8", "replace"))
            assert all(math.isfinite(value) for value in found.values.values())
        case "profile":
            Profile.parse({"a file": made})
        case "report":
            qpc.Report.from_json(made)
        case _:
            for each in made if isinstance(made, list) else [made]:
                palette.from_json(each)


def plan(draw: Random) -> None:
    """Sensitivities of any size, budgets at and beyond both edges."""
    limits: dict[str, object] = {
        "bits_per_weight": draw.choice([1e-9, 0.5, 1, 1.2, 2, 3.7, 6, 8, 16, 17, 1e9]),
        "total_bytes": draw.choice([1, 1000, 4000, 8000, 20_000, 10**15]),
        "kl_nats": draw.choice([1e-300, 1e-6, 0.1, 10.0, 1e300]),
        "seconds_per_token": draw.choice([1e-12, 5e-6, 1e-5, 1.0, 1e9]),
    }
    chosen = draw.sample(list(limits), draw.choice((1, 1, 2, 3)))
    text = {"bits_per_weight": "{} bit", "total_bytes": "{} B", "kl_nats": "{:.400f} nats", "seconds_per_token": "{:.20f} s"}
    wanted = Budget.parse(", ".join(text[name].format(limits[name]) for name in chosen))
    values = {name: draw.choice([0.0, 5e-324, 1e-30, 0.1, 1.0, 1e30, 1e308]) for name in ("first", "second", "last")}
    if draw.random() < 0.1:
        values.pop(draw.choice(list(values)))
    loss = draw.choice(list(Loss))
    options = Options(
        wanted,
        Effort.FAST,
        same_quantizer_in_group=draw.random() < 0.3,
        latency=times() if "seconds_per_token" in chosen else None,
    )
    program = grouped()
    found = options.allocate(wanted, Sensitivities(values, loss, 0.01, 0, 1)).solve(program)
    assert found.gap >= 0


QUANTIZERS: tuple[Quantizer, ...] = (
    ScalarQuantizer(2),
    ScalarQuantizer(8),
    VectorQuantizer(2, 4),
    trellis_at(Fraction(2), Effort.FAST),
    trellis_at(Fraction(5, 4), Effort.FAST),
)
SHAPES = ((1, 1), (1, 16), (64, 1), (1, 333), (65, 17), (3, 48), (130, 15))


def pack(draw: Random) -> None:
    """Weights that no training leaves behind: what is packed is finite, of its shape, and as large as it was said to be."""
    rows, columns = draw.choice(SHAPES)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    weight = torch.randn(rows, columns, generator=generator) * draw.choice([1e-45, 1e-38, 1e-20, 1.0, 1e20, 1e38])
    place = draw.randrange(rows), draw.randrange(columns)
    match draw.randrange(7):
        case 0:
            weight[place] = draw.choice([math.nan, math.inf, -math.inf])
        case 1:
            weight[place] = draw.choice([3e38, 1e5, -65520.0])
        case 2:
            weight[place[0]] = 0.0
        case 3:
            weight.zero_()
        case 4:
            weight[place[0]] = draw.choice([1.0, -1e-40, 3.3e38])
        case 5:
            weight = weight.to(draw.choice([torch.float16, torch.bfloat16, torch.float64]))
    quantizer, feedback = draw.choice(QUANTIZERS), None
    if draw.random() < 0.4:
        inputs = torch.randn(draw.choice((1, 50)), columns, generator=generator) * draw.choice([0.0, 1e-20, 1.0, 1e18])
        feedback = Feedback.of(Moment(inputs.T @ inputs, len(inputs)))
        if draw.random() < 0.5:
            gradients = torch.randn(draw.choice((1, 50)), rows, generator=generator) * draw.choice([0.0, 1e-20, 1.0, 1e18])
            feedback = feedback.and_of(Moment(gradients.T @ gradients, len(gradients)).scaled(row_deviations(weight)))
    (packed,) = quantize_stacked(quantizer, [weight], None, None if feedback is None else [feedback])
    made = packed.rotated()
    assert made.shape == weight.shape and bool(made.isfinite().all()), f"{quantizer} {tuple(weight.shape)} {weight.dtype}"


TARGETS: Mapping[str, tuple[Callable[[Random], None], float]] = {
    "budget": (budget, 0.38),
    "document": (document, 0.3),
    "loader": (loader, 0.22),
    "plan": (plan, 0.05),
    "pack": (pack, 0.05),
}
"""Each with its share of the cases."""
