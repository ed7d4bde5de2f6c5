"""Checkpoints whose pages are looked at: a tiny Llama with times, a tiny Gemma with error feedback, a module that repeats nothing."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

import qpc
from qpc.page import Source
from qpc.report import ReportRow
from qpc.sensitivity import Loss, Sensitivities
from tests.compiled import compiled_pair
from tests.families import FAMILIES, PLAIN, plain_inputs


@cache
def compiled(name: str) -> nn.Module:
    """The model of this name, compiled once. "llama" has times and no feedback, "llama_packed" a packed embedding, others feedback."""
    if name == "llama":
        model = FAMILIES["llama"]()
        known = guessed(model)
        return qpc.compile(model, 3.5, effort="fast", calibration=None, sensitivities=known, gpu="h100", same_quantizer_in_group=True)
    if name == "llama_packed":
        model = FAMILIES["llama_tied"]()
        return qpc.compile(model, 3.5, effort="fast", calibration=None, sensitivities=guessed(model), embeddings=6)
    if name == "mlp":
        return qpc.compile(PLAIN["mlp"](), 4, effort="fast", calibration=None, example_inputs=plain_inputs())
    return compiled_pair(name)[1]


def guessed(model: nn.Module) -> Sensitivities:
    """Sensitivities that nobody estimated, from one to sixteen times the least."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    return Sensitivities({each: 0.01 * 2 ** (index % 5) for index, each in enumerate(names)}, Loss.KL, 0.02, 0, 256)


NAMES = ("llama", "llama_packed", "gemma3", "mlp")


def saved(name: str, directory: Path) -> Path:
    """Its checkpoint in a new directory within this one."""
    qpc.save(compiled(name), directory / name)
    return directory / name


@cache
def source(name: str) -> Source:
    """What its page is made of."""
    with TemporaryDirectory() as directory:
        return Source.read(saved(name, Path(directory)))


HOSTILE = "h.0.</script><img src=x onerror=alert(1)>'\"&{{ 7 * 7 }}"


def hostile() -> Source:
    """A checkpoint that says in every place what must not be taken for a part of the page."""
    given = source("llama")
    row = ReportRow(HOSTILE, 64, 64, HOSTILE, 3.0, 1536, 0.02, 1.0, 0.4, (HOSTILE,), HOSTILE)
    report = replace(
        given.report,
        rows=(row, replace(row, name="h.1.kept", quantizer=None, distortion=None)),
        remarks=(f"{HOSTILE}: {HOSTILE}",) * 2,
        budget=HOSTILE,
        effort=HOSTILE,
        calibration=HOSTILE,
        gpu=HOSTILE,
    )
    block = report.block
    assert block is not None
    boxes = tuple(replace(box, name=HOSTILE, label=HOSTILE, operators=(HOSTILE, HOSTILE)) for box in block.after.boxes)
    report = replace(report, block=replace(block, name=HOSTILE, after=replace(block.after, boxes=boxes)))
    return Source(HOSTILE, HOSTILE, report, {}, {f"{HOSTILE}.codes0": 1536, "norm.weight": 64})
