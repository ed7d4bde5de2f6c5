"""`qpc.compile`: the pipeline from a module and a budget to a lowered model that keeps its module tree."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpc.budget import PS_PER_S, Budget
from qpc.calibration import Samples, SelfSampled, collect
from qpc.capture import EMBEDDING, OUTPUT_HEAD, capture
from qpc.errors import ModelError, QpcError
from qpc.inductor.hook import register
from qpc.ir.annotation import Annotation, annotation, site_of
from qpc.ir.outline import outline
from qpc.ir.program import Program, Remark
from qpc.ir.sketch import Block
from qpc.ir.table import APART
from qpc.kernels.embedding import QuantizedEmbedding
from qpc.kernels.experts import QuantizedExperts, place_experts, routes_experts
from qpc.kernels.linear import QuantizedLinear, join
from qpc.kernels.packed_module import PackedModule, share_signs, tie
from qpc.latency import LatencyModel
from qpc.options import Options
from qpc.passes.base import Pass
from qpc.passes.calibrate import Calibrate
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.embeddings import Embeddings
from qpc.passes.feedbacks import Known
from qpc.passes.fold import Fold
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.lower_embeddings import LowerEmbeddings
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.passes.shares import Shares
from qpc.passes.tune import Tune
from qpc.progress import Progress, silent
from qpc.quant.palette import Effort, default_palette
from qpc.report import Report, ReportRow, typical_block
from qpc.sensitivity import Method, OutputMoments, Sensitivities, check_finite, fitted
from qpc.sensitivity_cache import Gradients, estimated, weighed
from qpc.solver import Allocation

UNWEIGHED = "all positions count alike in the moments, which are taken without gradients"

LESSON_SEED = 2_000_003
"""Added to the seed of a compile where the model samples more text, to learn from."""


def compile(
    model: nn.Module,
    budget: Budget | Fraction | float | str,
    *,
    effort: Effort | str = Effort.DEFAULT,
    exclude: Iterable[str] = (),
    seed: int = 0,
    same_quantizer_in_group: bool = False,
    rotation_block: int | None = None,
    fold: bool = False,
    embeddings: Fraction | float | str | None = None,
    calibration: object = "self",
    tokenizer: Any | None = None,
    row_feedback: object = "auto",
    example_inputs: tuple[Tensor, ...] | None = None,
    sensitivity: object = Method.GRADIENT,
    tune: object = "auto",
    sensitivities: Sensitivities | None = None,
    gpu: LatencyModel | Path | str | None = None,
    batch: int = 1,
    ray: str | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """Compress the linears of `model` to a budget, with the least predicted loss.

    model: any causal language model of transformers, or another `nn.Module` together with `example_inputs`. It is left as it was; what
        is neither quantized nor tuned is shared between it and the result.
    budget: average bits per weight of the quantized linears (`3.25`), bytes of the whole model (`"80MB"`), the predicted
        KL that the smallest model may have (`"0.1nats"`), the time of all these linears in a step of a batch (`"3ms@8"`, or
        `"2000tok/s@8"`; the rest of the model is not in it), several (`"4bit, 0.1nats"`), or a `Budget`.
    fold: multiply gains of norms and rotations into the weights around them, where no output changes by it; what layers pass on to each
        other is then rotated.
    embeddings: bits per weight of embeddings and output heads, which do not count for a budget in bits; by default they stay as they are.
    calibration: inputs for error feedback: "self" (text that the model samples from itself; a `SelfSampled` says how), tokens (int64
        [sequences, length] or an iterable of such), texts or the path of a text file, or None. tokenizer: reads texts.
    row_feedback: whether errors are carried between the rows of a weight too, as gradients say which outputs matter together: "on", "off",
        or "auto" (if the model is on a GPU).
    sensitivity: how to estimate what each linear matters: "gradient" (on the inputs of the calibration), "self" (noise, on text that the
        model samples), "random" (noise, on random tokens), or noise on inputs given as for the calibration.
    sensitivities: as estimated before, instead.
    tune: steps in which scales, norms and biases are tuned after rounding, on the inputs of the calibration; "auto" (as many as usual if
        the model is on a GPU), "off", or a `Tuning`.
    gpu: where times are predicted, and linears fused so that they are least: the name of a known GPU ("h100"), the path of a table that
        `python -m benchmarks profile` wrote, or a `LatencyModel`; by default this machine's, if the budget limits a time. batch: of the
        time that is predicted, where the budget limits none.
    ray: the address of a Ray cluster over whose workers weights are spread while they are packed: "auto" for the one that runs on this
        machine. The result is the same.

    Returns a model of the same class; `qpc.report_of(result)` says what was done to each linear.
    Raises `QpcError` if the model, an option or the budget cannot be used.
    """
    options = Options.of(
        budget,
        effort=effort,
        exclude=exclude,
        seed=seed,
        same_quantizer_in_group=same_quantizer_in_group,
        rotation_block=rotation_block,
        fold=fold,
        embeddings=embeddings,
        calibration=calibration,
        tokenizer=tokenizer,
        row_feedback=row_feedback,
        sensitivity=sensitivity,
        tune=tune,
        gpu=gpu,
        batch=batch,
        ray=ray,
    )
    program = build(model, options, example_inputs=example_inputs, sensitivities=sensitivities, progress=progress)
    return finish(program, options)


def finish(program: Program, options: Options) -> nn.Module:
    """From QUANTIZED to the model and its report."""
    name = typical_block(site_of(node).name for node in program.linears())
    before = None if name is None else outline(program, name)
    Pipeline(lowering(program)).run(program)
    after = None if name is None else outline(program, name)
    block = None if name is None or before is None or after is None else Block(name, before, after)
    result = install(program)
    result.qpc_report = replace(make_report(program, options), block=block)  # type: ignore[assignment]
    return result


def report_of(model: nn.Module) -> Report:
    """What was done to each linear of a compiled model."""
    found = getattr(model, "qpc_report", None)
    if not isinstance(found, Report):
        raise ModelError("this model was not compiled by qpc; use the result of qpc.compile or qpc.load")
    return found


def build(
    model: nn.Module,
    options: Options,
    *,
    example_inputs: tuple[Tensor, ...] | None = None,
    sensitivities: Sensitivities | None = None,
    progress: Progress = silent,
) -> Program:
    """Everything before lowering: a program at QUANTIZED."""
    return decide(captured(model, options, example_inputs), options, sensitivities=sensitivities, progress=progress)


def captured(model: nn.Module, options: Options, example_inputs: tuple[Tensor, ...] | None = None) -> Program:
    """A program at CAPTURED, without the linears that are excluded or that no other module can take the place of."""
    program = capture(model, example_inputs=example_inputs, exclude=options.exclude)
    program.excluded.update(irreplaceable(model))
    return program


def decide(program: Program, options: Options, *, sensitivities: Sensitivities | None = None, progress: Progress = silent) -> Program:
    """From CAPTURED to QUANTIZED."""
    options = options.on(program.device)
    group(program, options)
    prepared = prepare(program, options, sensitivities, progress)
    Pipeline((options.allocate(options.budget, prepared.sensitivities), *rounding(program, options, prepared, progress))).run(program)
    return program


def group(program: Program, options: Options) -> None:
    """From CAPTURED to GROUPED. Raises `ModelError` if there is nothing to quantize, or a weight is not finite."""
    if options.embeddings is not None:
        apart = {name: APART for name, reason in program.excluded.items() if reason in (OUTPUT_HEAD, EMBEDDING)}
        program.excluded.update(apart)
    folding = (Fold(options.seed, options.rotation_block),) if options.fold else ()
    Pipeline((Canonicalize(), Fusion(), *folding)).run(program)
    if not any(True for _ in program.linears()):
        kept = "; ".join(f"{name}: {reason}" for name, reason in sorted(program.excluded.items())[:3])
        raise ModelError("the model has no linear layers that could be quantized" + (f" (left out: {kept})" if kept else ""))
    check_finite(program)


@dataclass(frozen=True)
class Prepared:
    """What allocation and rounding need to know: sensitivities, inputs of the calibration, and what feedback is expected to do."""

    sensitivities: Sensitivities
    samples: Samples | None
    known: Known


def prepare(
    program: Program, options: Options, sensitivities: Sensitivities | None, progress: Progress = silent, *, rounds: bool = True
) -> Prepared:
    """Find that out for a program at GROUPED; its linears are annotated with the share of the error that feedback will leave.

    Embeddings, if they are to be quantized, are packed, for their size counts. sensitivities: as given; None estimates them.
    rounds: whether weights will be rounded; otherwise what is known from before is not made again.
    """
    samples, remarks = collect(options.calibration, program, options.seed, progress)
    program.remarks += remarks
    program.calibration = None if samples is None else samples.description
    moments = OutputMoments.of(program) if options.couples_rows(program.device) else None
    gradients = None if samples is None else Gradients(program, samples, options.seed, progress, moments)
    if sensitivities is None:
        sensitivities, remarks = estimated(program, options.sensitivity, options.seed, gradients, progress)
    else:
        sensitivities, remarks = fitted(program, sensitivities)
    program.remarks += remarks
    known = Known()
    if samples is not None and gradients is not None:
        settings = {"seed": options.seed, "rotation block": options.rotation_block, "weigh": options.weigh_positions}
        settings |= {"rows": True} if moments is not None else {}
        file = Shares.of(program, samples, settings)
        known = file.read()
        if options.weigh_positions and (rounds or not known.expected):
            samples, remarks = weighed(gradients)
            program.remarks += remarks
        elif not options.weigh_positions:
            program.remarks.append(unweighed(program))
        Pipeline((Calibrate(samples, options.seed, options.rotation_block, known, progress, options.spread),)).run(program)
        file.write(known)
    if options.embeddings is not None:
        quantizer = default_palette(options.effort).at(options.embeddings)
        Pipeline((Embeddings(quantizer, options.seed, options.rotation_block, progress, spread=options.spread),)).run(program)
    return Prepared(sensitivities, samples, known)


def unweighed(program: Program) -> Remark:
    """That positions count alike."""
    return Remark("calibration", type(program.module).__name__, UNWEIGHED)


def rounding(program: Program, options: Options, prepared: Prepared, progress: Progress = silent) -> tuple[Pass, ...]:
    """The passes from ALLOCATED to QUANTIZED, and beyond to what is tuned."""
    tuning, samples = options.tune, prepared.samples
    quantize = Quantize(options.seed, options.rotation_block, progress, samples, known=prepared.known, spread=options.spread)
    if tuning is None or samples is None:
        return (quantize,)
    lessons = samples
    tokens = tuning.more_tokens(samples)
    if tokens and isinstance(options.calibration, SelfSampled) and tuning.declines(program, samples) is None:
        more, remarks = collect(replace(options.calibration, tokens=tokens), program, options.seed + LESSON_SEED, progress)
        program.remarks += remarks
        assert more is not None, "what could be sampled once can be sampled again"
        lessons = replace(samples, batches=(*samples.batches, *more.batches, *more.held_out), importance=None)
    return (replace(quantize, tuning=tuning, lessons=lessons), Tune(tuning, lessons, options.seed, progress))


def lowering(program: Program) -> tuple[Pass, ...]:
    """The passes from QUANTIZED to LOWERED."""
    return (LowerEmbeddings(), Lower()) if program.tables else (Lower(),)


def irreplaceable(model: nn.Module) -> dict[str, str]:
    """Modules with a weight matrix that are more than `x W^T + b`, so that no other module can take their place; stacks of others, too."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding) and not is_plain_linear(module):
            found[name] = f"its class {type(module).__name__} is not a plain linear"
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and leaf != "weight" and not routes_experts(module):
                found[f"{name}.{leaf}" if name else leaf] = f"its class {type(module).__name__} is none of the experts of transformers"
    return found


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the forward of a module is that of `nn.Linear` or of transformers' `Conv1D`."""
    forward = type(module).forward
    return forward is nn.Linear.forward or (forward.__module__ == "transformers.pytorch_utils" and forward.__qualname__ == "Conv1D.forward")


def install(program: Program) -> nn.Module:
    """A copy of the program's module tree with quantized linears, tables and tuned parameters; every other tensor is shared with it.

    Wherever Inductor compiles it in this process, linears that were grouped run as one.
    """
    model = program.module
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, value in program.tuned.items():
        live = program.tensor(name)
        kept[id(live)] = nn.Parameter(value, live.requires_grad)
    result = copy.deepcopy(model, kept)
    stacks = {site.name: site.experts for node in program.linears() if (site := site_of(node)).experts is not None}
    for name, packed in program.packed.items():
        if name in stacks:
            place_experts(result, name, QuantizedExperts.from_packed(packed, stacks[name]))
        else:
            result.set_submodule(name, QuantizedLinear.from_packed(packed, getattr(result.get_submodule(name), "bias", None)))
    for table in program.tables.values():
        readers: list[PackedModule] = []
        for lookup in table.lookups:
            readers.append(QuantizedEmbedding.from_packed(table.packed, program.tensor(table.weight).dtype, lookup.scale))
        for name in table.heads:
            readers.append(QuantizedLinear.from_packed(table.packed, getattr(result.get_submodule(name), "bias", None)))
        for name, module in zip(table.names, readers, strict=True):
            result.set_submodule(name, module)
        tie(readers)
    for members in {note.group.members for note in program.decisions.values() if note.group is not None and note.quantizer is not None}:
        if len(members) > 1:
            join([module for module in map(result.get_submodule, members) if isinstance(module, QuantizedLinear)])
    share_signs(module for module in result.modules() if isinstance(module, PackedModule))
    register()
    return result


def make_report(program: Program, options: Options) -> Report:
    """Collect what was decided for each site, and the sizes before and after: from ALLOCATED on."""
    rows = []
    decisions = program.decisions or {note.site.name: note for node in program.linears() if (note := annotation(node)).site is not None}
    for name, note in decisions.items():
        assert note.site is not None and note.group is not None
        original = program.tensor(note.site.weight)
        stored = note.weight_bytes if note.quantizer is not None and note.weight_bytes is not None else original.nbytes
        rows.append(
            ReportRow(
                name=name,
                out_features=note.site.shape.out_features,
                in_features=note.site.shape.in_features,
                quantizer=str(note.quantizer) if note.quantizer is not None else None,
                bits=8 * stored / note.site.shape.weights,
                weight_bytes=stored,
                distortion=note.distortion,
                sensitivity=note.sensitivity,
                remaining=note.share if note.remaining is None else note.remaining,
                group=note.group.members,
                reason=None if note.quantizer is not None else "the allocation left it as it is",
                budgeted=True,
                latency_s=None if note.latency_ps is None else note.latency_ps / PS_PER_S,
                latency_before_s=None if note.kept_latency_ps is None else note.kept_latency_ps / PS_PER_S,
            )
        )
    for table in program.tables.values():
        rows.append(
            ReportRow(
                name=table.names[0],
                out_features=table.shape.out_features,
                in_features=table.shape.in_features,
                quantizer=str(table.packed.quantizer),
                bits=table.packed.bits_per_weight,
                weight_bytes=table.packed.nbytes,
                distortion=table.distortion,
                sensitivity=None,
                remaining=None,
                group=(table.names[0],),
                reason=None,
                budgeted=False,
            )
        )
    before = model_bytes(program.module)
    packed = {note.site.weight: note for note in decisions.values() if note.quantizer is not None and note.site is not None}
    saved = sum(program.tensor(weight).nbytes - (note.weight_bytes or 0) for weight, note in packed.items())
    saved += sum(program.tensor(weight).nbytes - table.packed.nbytes for weight, table in program.tables.items())
    timing, allocation = options.timing_within(options.budget), program.allocation
    assert isinstance(allocation, Allocation), "the pass leaves it"
    predicted = sum((note.sensitivity or 0) * _felt(note) for note in packed.values())
    return Report(
        rows=tuple(rows),
        remarks=tuple(str(remark) for remark in program.remarks),
        budget=str(options.budget),
        seed=options.seed,
        effort=str(options.effort),
        calibration=program.calibration,
        model_bytes=before - saved,
        model_bytes_before=before,
        predicted_loss=predicted,
        solver_gap=allocation.gap,
        gpu=None if timing is None else timing.model.title,
        batch=None if timing is None else timing.batch,
        latency_s=None if timing is None else allocation.cost.latency_ps / PS_PER_S,
    )


def _felt(note: Annotation) -> float:
    """The relative squared error of a white error that would do as much harm as that of a quantized weight."""
    if note.remaining is None:
        return (note.distortion or 0.0) * (1.0 if note.share is None else note.share)
    assert note.quantizer is not None
    return note.quantizer.distortion * note.remaining


def model_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a checkpoint of the model holds; tied ones once."""
    distinct: Mapping[int, Tensor] = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in distinct.values())


__all__ = ["QpcError", "build", "compile", "decide", "install", "report_of"]
