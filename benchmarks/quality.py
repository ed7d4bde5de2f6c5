"""Loss of quality against bits: `python -m benchmarks quality MODEL --text FILE --json FILE`.

Compiles one model at several rates, and measures perplexity and mean KL(original || compiled) in windows that do not overlap. `--single`
gives every linear the quantizer of one rate instead of an allocation; `--calibrations` compares sources of the moments for error feedback,
`--sensitivities` ways to estimate what each linear matters, `--tune` ways to tune it. `--own-tokens` measures on text of the kind that the
predictions are for, too.
`--double-newlines` prepares WikiText as its users do. README's figures and picture come from the files that it writes.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx, nn

import qpc
from benchmarks.rows import machine, write_rows
from qpc import compiler
from qpc.calibration import Calibration, Samples, SelfSampled, collect
from qpc.calibration import parse as parse_calibration
from qpc.capture import capture
from qpc.compiler import install, make_report, prepare, rounding
from qpc.evaluate import bos_of, evaluate
from qpc.integrations.transformers import load_pretrained
from qpc.ir.annotation import annotate, annotation
from qpc.ir.program import Program
from qpc.options import Options, parse_switch
from qpc.passes.allocate import Allocate
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.feedbacks import Known
from qpc.passes.fold import Fold
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.passes.tune import Tuning
from qpc.quant.neighbours import neighbours
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.trellis import TrellisQuantizer
from qpc.sensitivity import OutputMoments, Sensitivities
from qpc.sensitivity_cache import Gradients, estimated, weighed
from qpc.sensitivity_cache import parse as parse_sensitivity
from qpc.solver import Allocation


def main(arguments: list[str]) -> None:
    """Measure, print a line per row, write the file after each."""
    options = parsed(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original, tokenizer = load_pretrained(options.model, dtype=torch.float32)
    assert tokenizer is not None, f"{options.model} has no tokenizer"
    original = original.to(device)
    text = options.text.read_text(encoding="utf-8")
    ids = tokenizer(text.replace("\n", "\n\n") if options.double_newlines else text)["input_ids"][: options.tokens]
    tokens = torch.tensor(ids).to(device)
    bos = bos_of(tokenizer, tokens)
    own = own_text(original, options.own_tokens).to(device) if options.own_tokens else None
    rows: list[dict[str, Any]] = []
    for job, compiled, compile_s, predicted in _compiled(original, tokenizer, options):
        report = qpc.report_of(compiled)
        row: dict[str, Any] = {"model": options.model.name, "method": "single rate" if options.single else "mixed"}
        row |= {"effort": options.effort, "calibration": Path(job.calibration).name, "positions": job.positions, "shares": job.shares}
        row |= {
            "sensitivity": job.sensitivity and Path(job.sensitivity).name,
            "tune": job.tune,
            "row_feedback": job.rows,
            "fold": job.fold == "on",
            "seed": job.seed,
            "budget": job.bits,
            "bits": report.bits_per_weight,
        }
        row |= {"compile_s": compile_s, "weight_bytes": report.linear_bytes, "model_bytes": report.model_bytes}
        found = evaluate(compiled, original, tokens, options.window, bos=bos)
        row |= {"kl": found.kl, "perplexity": found.perplexity, "reference_perplexity": found.reference_perplexity}
        row |= {"top1_agreement": found.top1_agreement, "text": options.text.name, "tokens": options.tokens, "window": options.window}
        row |= {"kl_own_text": None if own is None else evaluate(compiled, original, own, OWN.length).kl}
        row |= {"kl_predicted": predicted, "kl_predicted_rounded": None if predicted is None else report.predicted_loss}
        row |= {"device": machine(device), "transformers": transformers.__version__}
        print(line(row), flush=True)
        rows.append(row)
        write_rows(options.json, "quality", rows)


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The options."""
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
    parser.add_argument("--sensitivities", nargs="+", default=["gradient"], help="random, self, gradient or text files")
    parser.add_argument("--positions", nargs="+", default=["weighed"], choices=["weighed", "alike"], help="how positions count in moments")
    parser.add_argument(
        "--shares", nargs="+", default=["expected"], choices=["expected", "ignored"], help="whether allocations know of feedback"
    )
    parser.add_argument("--tune", nargs="+", default=["off"], help="off, auto, steps, or fields of `Tuning`: steps=100,rounds=8")
    parser.add_argument(
        "--rows", nargs="+", default=["auto"], choices=["auto", "on", "off"], help="whether errors are carried between rows"
    )
    parser.add_argument("--fold", nargs="+", default=["off"], choices=["off", "on"], help="whether gains and rotations are folded")
    parser.add_argument("--own-tokens", type=int, default=0, help="measure on so many tokens that the model samples with another seed, too")
    parser.add_argument("--parallel", action="store_true", help="moments of the original model, not behind the quantized layers")
    parser.add_argument("--at-once", type=int, default=1, help="models of a single rate that are quantized at the same time")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=5120)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--double-newlines", action="store_true")
    return parser.parse_args(arguments)


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    what = f"{row['method']} {row['budget']:>5} bits ({row['bits']:.3f}) {row['calibration']:>12} {row['positions']:>7} seed {row['seed']}"
    what += " folded" if row["fold"] else ""
    if row["sensitivity"] is not None:
        what += f" {row['sensitivity']:>8}, shares {row['shares']}, tune {row['tune']}"
    own = "" if row["kl_own_text"] is None else f" on its own text {row['kl_own_text']:.4f}"
    predicted = ""
    if row["kl_predicted"] is not None:
        predicted = f" predicted {row['kl_predicted']:.4f} ({row['kl_predicted_rounded']:.4f} when rounded)"
    return f"{what}: KL {row['kl']:.4f}{own}{predicted}  ppl {row['perplexity']:.2f}  compiled in {row['compile_s']} s"


def own_text(model: nn.Module, tokens: int) -> torch.Tensor:
    """Tokens [n] that the model samples with a seed that no compile of this benchmark has, in sequences of `OWN.length`."""
    samples, _ = collect(replace(OWN, tokens=tokens), _grouped(model), OWN_SEED)
    assert samples is not None, "the model cannot sample text"
    return torch.cat([*samples.batches, *samples.held_out]).flatten()


OWN = SelfSampled()
OWN_SEED = 1_000_003


@dataclass(frozen=True)
class Job:
    """What is compiled. fold, positions, shares, tune: as the options of these names; sensitivity: None for a single rate."""

    fold: str
    seed: int
    calibration: str
    positions: str
    sensitivity: str | None
    shares: str
    bits: str
    tune: str
    rows: str

    @property
    def tuning(self) -> Tuning | None:
        """What `tune` means: what `Tuning.parse` reads, or the fields of a `Tuning`."""
        if "=" not in self.tune:
            return Tuning.parse(self.tune)
        given = dict(part.split("=") for part in self.tune.split(","))
        fields: dict[str, Any] = {name: type(getattr(Tuning, name))(value) for name, value in given.items()}
        return Tuning(anywhere=True, **fields)


def _jobs(options: argparse.Namespace) -> Iterator[Job]:
    """In order; without calibration the seed hardly matters for a single rate, so only the first is used."""
    given = (options.fold, options.seeds, options.calibrations, options.positions, options.rows)
    for fold, seed, calibration, positions, rows in product(*given):
        if calibration == "none" and (positions != options.positions[0] or (options.single and seed != options.seeds[0])):
            continue
        for sensitivity, shares in product([None] if options.single else options.sensitivities, options.shares):
            if shares != options.shares[0] and (options.single or calibration == "none"):
                continue
            for bits, tune in product(options.bits, ["off"] if options.single else options.tune):
                yield Job(fold, seed, calibration, positions, sensitivity, shares, bits, tune, rows)


def _compiled(
    original: nn.Module, tokenizer: Any, options: argparse.Namespace
) -> Iterator[tuple[Job, nn.Module, float | None, float | None]]:
    """The compiled model of each job, the seconds it took, unless several were made at once, and the predicted KL."""

    def data(job: Job) -> Calibration | None:
        name = job.calibration
        tokens = None if name == "none" else options.calibration_tokens
        return parse_calibration(name, tokenizer=tokenizer, tokens=tokens, start=options.start if name == "self" else None)

    effort, jobs = Effort.parse(options.effort), list(_jobs(options))
    if not options.single:
        for _, alike in groupby(jobs, lambda job: (job.fold, job.seed, job.calibration, job.positions, job.rows)):
            prepared: Prepared | None = None
            for job in alike:
                source = Options(
                    qpc.Budget.of(job.bits),
                    effort,
                    seed=job.seed,
                    fold=job.fold == "on",
                    calibration=data(job),
                    weigh_positions=job.positions == "weighed",
                    row_feedback=parse_switch("rows", job.rows),
                    sensitivity=parse_sensitivity(job.sensitivity, tokenizer=tokenizer),
                    tune=job.tuning,
                )
                prepared = Prepared.of(original, source) if prepared is None else prepared.but(source)
                made, elapsed_s, predicted = prepared.compiled(job.shares == "expected")
                yield job, made, round(elapsed_s, 1), predicted
        return
    torch.linalg.cholesky(torch.eye(2, device=next(original.parameters()).device))  # its first call may not be made by two threads
    for start in range(0, len(jobs), options.at_once):
        batch = jobs[start : start + options.at_once]
        plans = [SingleRate.of(original, job, effort, data(job)) for job in batch]
        start_s = time.monotonic()
        with ThreadPoolExecutor(options.at_once) as pool:
            models = list(pool.map(lambda plan: plan.quantized(not options.parallel), plans))
        for job, made in zip(batch, models, strict=True):
            yield job, made, round(time.monotonic() - start_s, 1) if len(batch) == 1 else None, None


@dataclass(frozen=True)
class Prepared:
    """A compile that stands before the allocation, from where it goes on with several budgets: samples, sensitivities, feedback.

    rounded: the last program that was rounded at once, and the seconds it took.
    """

    model: nn.Module
    program: Program
    options: Options
    sensitivities: Sensitivities
    samples: Samples | None
    known: Known
    rounded: dict[tuple[object, ...], tuple[Program, float]] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, options: Options) -> "Prepared":
        """As `qpc.compile` does it, but that the graph is captured once."""
        program, start_s = _fresh(_grouped(model)), time.monotonic()
        if options.fold:
            Pipeline((Fold(options.seed, options.rotation_block),)).run(program)
        found = prepare(program, options, None)
        sensitivities = found.sensitivities
        for remark in program.remarks:
            if remark.pass_name in ("sensitivities", "calibration"):
                print(remark, flush=True)
        print(f"prepared in {time.monotonic() - start_s:.1f} s: {sensitivities.method}, {sensitivities.linearity}", flush=True)
        return Prepared(model, program, options, sensitivities, found.samples, found.known)

    def but(self, options: Options) -> "Prepared":
        """With another budget, or another method for the sensitivities."""
        if options.sensitivity == self.options.sensitivity:
            return replace(self, options=options)
        start_s = time.monotonic()
        gradients = None if self.samples is None else Gradients(self.program, self.samples, options.seed)
        sensitivities, remarks = estimated(self.program, options.sensitivity, options.seed, gradients)
        for remark in remarks:
            print(remark, flush=True)
        print(f"estimated in {time.monotonic() - start_s:.1f} s: {sensitivities.method}, {sensitivities.linearity}", flush=True)
        return replace(self, options=options, sensitivities=sensitivities)

    def compiled(self, shares: bool) -> tuple[nn.Module, float, float]:
        """The compiled copy, the seconds it took, and the KL predicted before rounding. shares: let the allocation know of feedback.

        What is tuned only after rounding is rounded once for all ways of tuning it.
        """
        start_s = time.monotonic()
        quantize, *rest = rounding(self.program, self.options, compiler.Prepared(self.sensitivities, self.samples, self.known.fork()))
        key = (self.options.budget, self.options.sensitivity, shares)
        alone = self.options.tune is None or self.options.tune.rounds == 1
        before_s = 0.0
        if alone and key in self.rounded:
            program, before_s = self.rounded[key]
            program = _fresh(program)
        else:
            program = _fresh(self.program)
            if not shares:
                for node in program.linears():
                    annotate(node, annotation(node).but(share=None))
            Pipeline((self.options.allocate(self.options.budget, self.sensitivities), quantize)).run(program)
            if alone:
                self.rounded.clear()
                self.rounded[key] = _fresh(program), time.monotonic() - start_s
        assert isinstance(program.allocation, Allocation)
        Pipeline((*rest, Lower())).run(program)
        elapsed_s = before_s + time.monotonic() - start_s
        for remark in program.remarks:
            if "held-out" in remark.reason:
                print(remark, flush=True)
        result = install(program)
        result.qpc_report = make_report(program, self.options)  # type: ignore[assignment]
        return result, elapsed_s, program.allocation.cost.distortion


@dataclass(frozen=True)
class SingleRate:
    """A compile with every linear at one rate: what `qpc.compile` does, but for the allocation."""

    model: nn.Module
    program: Program
    samples: Samples | None
    options: Options

    @staticmethod
    def of(model: nn.Module, job: Job, effort: Effort, calibration: Calibration | None) -> "SingleRate":
        """Everything up to the allocation, and the samples; mixtures and their tables are made on the way."""
        program, rate, seed = _fresh(_grouped(model)), Fraction(job.bits), job.seed
        quantizer = trellis_at(rate, effort)
        if job.fold == "on":
            Pipeline((Fold(seed),)).run(program)
        Pipeline((Allocate.uniform(quantizer),)).run(program)
        samples, remarks = collect(calibration, program, seed)
        program.remarks += remarks
        rows = parse_switch("rows", job.rows)
        found = Options(qpc.Budget.of(rate), effort, seed=seed, fold=job.fold == "on", calibration=calibration, row_feedback=rows)
        if samples is not None and job.positions == "weighed":
            moments = OutputMoments.of(program) if found.couples_rows(program.device) else None
            samples, remarks = weighed(Gradients(program, samples, seed, moments=moments))
            program.remarks += remarks
        for part, _ in quantizer.parts(1 << 16):
            assert isinstance(part, TrellisQuantizer)
            neighbours(part.step_bits, part.window_bits, next(model.parameters()).device)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return SingleRate(model, program, samples, found)

    def quantized(self, sequential: bool) -> nn.Module:
        """The compiled copy; on a GPU on a stream of its own, so that small layers of several models share it."""
        with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
            quantize = Quantize(self.options.seed, samples=self.samples, sequential=sequential)
            Pipeline((quantize, Lower())).run(self.program)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        result = install(self.program)
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
    books |= {"tensors": dict(program.tensors), "rotated": set(program.rotated)}
    books |= {"packed": dict(program.packed), "tuned": dict(program.tuned), "decisions": dict(program.decisions)}
    return replace(program, graph_module=graph_module, **books)
