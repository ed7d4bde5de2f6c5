"""Loss of quality against bits: `python -m benchmarks quality MODEL --text FILE --json FILE`.

Compiles one model at several rates, and measures perplexity and mean KL(original || compiled) in windows that do not overlap. `--single`
gives every linear the quantizer of one rate instead of an allocation; `--calibrations` compares sources of the moments for error feedback.
`--double-newlines` prepares WikiText as its users do. README's figures and picture come from the files that it writes.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx, nn

import qpc
from benchmarks.rows import machine, write_rows
from qpc.calibration import Calibration, Samples, collect
from qpc.calibration import parse as parse_calibration
from qpc.capture import capture
from qpc.compiler import Options, install, make_report
from qpc.evaluate import evaluate
from qpc.integrations.transformers import load_pretrained
from qpc.ir.program import Program
from qpc.passes.allocate import Allocate
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.quant.neighbours import neighbours
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.trellis import TrellisQuantizer
from qpc.sensitivity import Loss, Sensitivities


def main(arguments: list[str]) -> None:
    """Measure, print a line per row, write the file after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bits", nargs="+", default=["2", "2.5", "3", "3.25", "4"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--single", action="store_true", help="one rate for all linears")
    parser.add_argument("--calibrations", nargs="+", default=["self"], help="self, none or text files")
    parser.add_argument("--calibration-tokens", type=int)
    parser.add_argument("--start", help="how self-sampled sequences begin")
    parser.add_argument("--parallel", action="store_true", help="moments of the original model, not behind the quantized layers")
    parser.add_argument("--at-once", type=int, default=1, help="models of a single rate that are quantized at the same time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--double-newlines", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original, tokenizer = load_pretrained(options.model, dtype=torch.float32)
    assert tokenizer is not None, f"{options.model} has no tokenizer"
    original = original.to(device)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text.replace("\n", "\n\n") if options.double_newlines else text)["input_ids"])[: options.tokens].to(
        device
    )
    jobs = list(_jobs(options.seeds, options.calibrations, options.bits))
    rows: list[dict[str, Any]] = []
    for (seed, calibration, bits), compiled, compile_s in _compiled(original, tokenizer, jobs, options):
        report = qpc.report_of(compiled)
        row: dict[str, Any] = {
            "model": options.model.name,
            "method": "single rate" if options.single else "mixed",
            "effort": options.effort,
        }
        row |= {"calibration": Path(calibration).name, "seed": seed, "budget": bits, "bits": report.bits_per_weight}
        row |= {"compile_s": compile_s, "weight_bytes": report.linear_bytes, "model_bytes": report.model_bytes}
        found = evaluate(compiled, original, tokens, options.window)
        row |= {"kl": found.kl, "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}
        row |= {"top1_agreement": found.top1_agreement, "text": options.text.name, "tokens": options.tokens, "window": options.window}
        row |= {"device": machine(device), "transformers": transformers.__version__}
        what = f"{row['method']} {bits:>5} bits ({row['bits']:.3f}) {row['calibration']:>12} seed {seed}"
        print(f"{what}: KL {row['kl']:.4f}  ppl {row['perplexity']:.2f}  compiled in {compile_s} s", flush=True)
        rows.append(row)
        write_rows(options.json, "quality", rows)


Job = tuple[int, str, str]
"""Seed, calibration, bits."""


def _jobs(seeds: list[int], calibrations: list[str], rates: list[str]) -> Iterator[Job]:
    """What is compiled, in order; without calibration the seed hardly matters, so only the first is used."""
    for seed in seeds:
        for calibration in calibrations:
            if calibration == "none" and seed != seeds[0]:
                continue
            for bits in rates:
                yield seed, calibration, bits


def _compiled(
    original: nn.Module, tokenizer: Any, jobs: list[Job], options: argparse.Namespace
) -> Iterator[tuple[Job, nn.Module, float | None]]:
    """The compiled model of each job, and the seconds it took, unless several were made at once."""

    def data(job: Job) -> Calibration | None:
        name = job[1]
        tokens = None if name == "none" else options.calibration_tokens
        return parse_calibration(name, tokenizer=tokenizer, tokens=tokens, start=options.start if name == "self" else None)

    if not options.single:
        known: dict[int, Sensitivities] = {}
        for job in jobs:
            start_s = time.monotonic()
            seed, _, bits = job
            made = qpc.compile(original, bits, effort=options.effort, seed=seed, calibration=data(job), sensitivities=known.get(seed))
            values = {each.name: each.sensitivity or 0.0 for each in qpc.report_of(made).rows}
            known[seed] = Sensitivities(values, Loss.KL, noise=0.02, seed=seed, tokens=0)
            yield job, made, round(time.monotonic() - start_s, 1)
        return
    effort = Effort.parse(options.effort)
    torch.linalg.cholesky(torch.eye(2, device=next(original.parameters()).device))  # its first call may not be made by two threads
    for start in range(0, len(jobs), options.at_once):
        some = jobs[start : start + options.at_once]
        plans = [SingleRate.of(original, Fraction(bits), effort, seed, data((seed, name, bits))) for seed, name, bits in some]
        start_s = time.monotonic()
        with ThreadPoolExecutor(options.at_once) as pool:
            models = list(pool.map(lambda plan: plan.quantized(not options.parallel), plans))
        for job, made in zip(some, models, strict=True):
            yield job, made, round(time.monotonic() - start_s, 1) if len(some) == 1 else None


@dataclass(frozen=True)
class SingleRate:
    """A compile with every linear at one rate: what `qpc.compile` does, but for the allocation."""

    model: nn.Module
    program: Program
    samples: Samples | None
    options: Options

    @staticmethod
    def of(model: nn.Module, rate: Fraction, effort: Effort, seed: int, calibration: Calibration | None) -> "SingleRate":
        """Everything up to the allocation, and the samples; mixtures and their tables are made on the way."""
        program = _fresh(_grouped(model))
        quantizer = trellis_at(rate, effort)
        Pipeline((Allocate.uniform(quantizer),)).run(program)
        samples, remarks = collect(calibration, program, seed)
        program.remarks += remarks
        for part, _ in quantizer.parts(1 << 16):
            assert isinstance(part, TrellisQuantizer)
            neighbours(part.step_bits, part.window_bits, next(model.parameters()).device)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return SingleRate(model, program, samples, Options(qpc.Budget.of(rate), effort, seed=seed, calibration=calibration))

    def quantized(self, sequential: bool) -> nn.Module:
        """The compiled copy; on a GPU on a stream of its own, so that small layers of several models share it."""
        with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
            quantize = Quantize(self.options.seed, samples=self.samples, sequential=sequential)
            Pipeline((quantize, Lower())).run(self.program)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        result = install(self.model, self.program)
        result.qpc_report = make_report(self.program, self.options)  # type: ignore[assignment]
        return result


@cache
def _grouped(model: nn.Module) -> Program:
    """The model up to the stage GROUPED, captured once."""
    program = capture(model)
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def _fresh(program: Program) -> Program:
    """A program of its own at the same stage."""
    graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    books = {"excluded": dict(program.excluded), "remarks": list(program.remarks), "history": list(program.history)}
    return replace(program, graph_module=graph_module, packed={}, decisions={}, **books)
