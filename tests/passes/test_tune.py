"""Tune: the loss on held-out samples never grows, codes stay, and what is written is what was judged."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qpc
from qpc.budget import Budget
from qpc.calibration import Samples, SelfSampled, collect
from qpc.capture import capture
from qpc.compiler import Prepared, group, rounding
from qpc.errors import SettingsError
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.options import Options
from qpc.passes.descent import POSITIONS_AT_ONCE, Descent
from qpc.passes.embeddings import Embeddings
from qpc.passes.feedbacks import Known
from qpc.passes.lower import Lower
from qpc.passes.lower_embeddings import LowerEmbeddings
from qpc.passes.quantize import Quantize
from qpc.passes.student import Student
from qpc.passes.tune import Tune, Tuning
from qpc.quant.scalar import ScalarQuantizer
from qpc.sensitivity import Loss, Sensitivities
from qpc.sensitivity.output_loss import reference_of
from tests.compiled import DEVICES, logits
from tests.families import FAMILIES, VOCABULARY, copied, grouped
from tests.passes.test_quantize import Branches

NAMES = ("llama", "llama_tied", "gemma2", "olmo2", "gpt2")
TUNING = Tuning(steps=12, learning_rate=3e-3, anywhere=True)
"""Few steps of a model that is small and knows nothing: enough to see a loss fall."""


def samples(seed: int = 0, held_out: int = 8) -> Samples:
    """Random tokens, in more batches than a step has."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (24 + held_out, 16), generator=draw)
    return Samples(tokens[:24].split(3), (tokens[24:],) if held_out else (), "random")


def allocated(program: Program) -> Program:
    """Every linear at two bits, and one as it is."""
    for number, node in enumerate(program.linears()):
        legal = annotation(node).group
        assert legal is not None
        quantizer = ScalarQuantizer(2) if number != 3 else None
        annotate(node, annotation(node).but(quantizer=quantizer, group=legal.subset((site_of(node).name,))))
    return program


def rounded(name: str, tuning: Tuning | None = None) -> Program:
    return quantized(allocated(grouped(name)), tuning)


def quantized(program: Program, tuning: Tuning | None = None) -> Program:
    Quantize(samples=samples(), tuning=tuning).run(program)
    return program


def outputs_of(program: Program, tokens: Tensor) -> Tensor:
    """The logits of a program, once lowered."""
    lowered = copied(program)
    lowered.packed, lowered.tables = dict(program.packed), dict(program.tables)
    for step in (LowerEmbeddings(), Lower()):
        step.run(lowered)
    output = lowered.run((tokens,))[0]
    assert isinstance(output, Tensor)
    return output


def shaken(student: Student, size: float) -> None:
    """Move everything at random."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for change in (change for kind in student.changes() for change in kind):
            change.copy_(size * torch.randn(change.shape, generator=draw))


def with_packed_table() -> Program:
    """Embedding and output head are one packed table."""
    program = capture(FAMILIES["llama_tied"]())
    group(program, Options(Budget.of(3), embeddings=Fraction(4)))
    Embeddings(ScalarQuantizer(4)).run(program)
    assert program.tables
    return allocated(program)


def in_bfloat16() -> Program:
    """Rounded, of a model whose vectors have few digits."""
    program = capture(FAMILIES["gpt2"]().bfloat16())
    group(program, Options(Budget.of(3)))
    return quantized(allocated(program))


@pytest.mark.parametrize("build", [*(partial(rounded, name) for name in NAMES), lambda: quantized(with_packed_table()), in_bfloat16])
def test_a_student_computes_what_it_writes(build: Callable[[], Program]) -> None:
    program, tokens = build(), samples().held_out[0]
    student = Student(program)
    with torch.no_grad():
        untouched = student.outputs((tokens,))[0]
        shaken(student, 0.1)
        moved = student.outputs((tokens,))[0]
    before = outputs_of(program, tokens)
    written = student.write()
    after = outputs_of(program, tokens)
    tolerance = (1e-4 if before.dtype == torch.float32 else 0.1) * (after - before).norm()
    assert (untouched - before).norm() <= tolerance and (moved - after).norm() <= tolerance
    assert set(written) == {*program.packed, *student.vectors} and set(student.vectors) == set(program.tuned)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_on_held_out_samples_falls_and_codes_stay(name: str) -> None:
    program = rounded(name)
    packed, kept = dict(program.packed), samples()
    live = {name: value.clone() for name, value in program.module.named_parameters()}
    before = Descent(Student(program), kept).held_out_loss()
    (remark,) = Tune(TUNING, kept).run(program).remarks
    after = Descent(Student(program), kept).held_out_loss()
    assert after < before and f"{before:.4g} before, {after:.4g} after" in str(remark)
    for site, weight in program.packed.items():
        assert all(torch.equal(new, old) for new, old in zip(weight.codes, packed[site].codes, strict=True))
        assert not torch.equal(weight.scales, packed[site].scales)
    assert all(torch.equal(value, live[name]) for name, value in program.module.named_parameters())


def test_a_rate_that_does_harm_changes_nothing() -> None:
    program = rounded("llama")
    packed = dict(program.packed)
    result = Tune(Tuning(steps=6, learning_rate=5.0, anywhere=True), samples()).run(program)
    assert result.changed == () and program.packed == packed and not program.tuned
    assert "after 0 of 6 steps" in str(result.remarks[0])


def test_the_same_seed_gives_the_same() -> None:
    made = []
    for seed in (1, 1, 2):
        program = rounded("llama")
        Tune(TUNING, samples(), seed).run(program)
        made.append(outputs_of(program, samples().held_out[0]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_more_text_is_sampled_to_learn_from() -> None:
    options = Options(Budget.of(3), calibration=SelfSampled(tokens=1024, length=32), tune=replace(TUNING, reads=16.6))
    program = grouped("llama")
    given, _ = collect(options.calibration, program, 0)
    assert given is not None
    _, tune = rounding(program, options, Prepared(Sensitivities({}, Loss.KL, 0.0, 0, 0), given, Known()))
    assert isinstance(tune, Tune) and all(one is other for one, other in zip(tune.samples.held_out, given.held_out, strict=True))
    own, more = tune.samples.batches[: len(given.batches)], torch.cat(tune.samples.batches[len(given.batches) :])
    assert all(one is other for one, other in zip(own, given.batches, strict=True))
    read = TUNING.steps * TUNING.last.passes * POSITIONS_AT_ONCE
    assert sum(batch.numel() for batch in tune.samples.batches) == pytest.approx(read / 16.6, abs=32), "each token is read so often"
    assert more.shape[1] == 32 and not any(torch.equal(row, other) for row in more for other in torch.cat(own))


def test_no_more_text_than_is_read() -> None:
    assert replace(TUNING, reads=1000.0).more_tokens(samples()) == 0


@pytest.mark.parametrize(("given", "held_out", "reason"), [(Tuning(), 8, "on a CPU"), (TUNING, 0, "held out")])
def test_declines_with_a_reason(given: Tuning, held_out: int, reason: str) -> None:
    program = rounded("llama")
    result = Tune(given, samples(held_out=held_out)).run(program)
    assert result.changed == () and reason in str(result.remarks[0])


def test_weights_that_are_left_make_up_for_those_that_are_rounded() -> None:
    apart, together = rounded("llama"), rounded("llama", replace(TUNING, rounds=3, round_steps=12, matrix_rate=1e-3))
    kept = samples()
    assert Descent(Student(together), kept).held_out_loss() < Descent(Student(apart), kept).held_out_loss()
    first, *_, last = apart.packed
    assert torch.equal(apart.packed[first].codes[0], together.packed[first].codes[0])
    assert not torch.equal(apart.packed[last].codes[0], together.packed[last].codes[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounds", [1, 2])
def test_what_is_tuned_is_saved_and_goes_through_both_doors(rounds: int, device: str, tmp_path: Path) -> None:
    tuning = replace(TUNING, rounds=rounds)
    given = {
        "calibration": torch.randint(VOCABULARY, (160, 16), generator=torch.Generator().manual_seed(0)),
        "effort": "fast",
        "tune": tuning,
    }
    model = FAMILIES["llama"]().to(device)
    before = {name: value.clone() for name, value in model.named_parameters()}
    compiled = qpc.compile(model, 2, **given)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not torch.equal(compiled.model.norm.weight, model.model.norm.weight)
    qpc.save(compiled, tmp_path / "out")
    assert torch.equal(logits(qpc.load(tmp_path / "out", device=device)), logits(compiled))
    torch.compiler.reset()
    other = torch.compile(model, backend="qpalette", options={"budget": 2, "inner": "eager", **given})
    assert (logits(other) - logits(compiled)).norm() <= 1e-5 * logits(compiled).norm()


def test_a_plain_module_is_tuned_by_the_error_of_its_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 32))
    given = {"effort": "fast", "calibration": torch.randn(4096, 64), "example_inputs": (torch.randn(4, 64),)}
    compiled, untuned = (qpc.compile(model, 2, tune=tune, **given) for tune in (replace(TUNING, steps=40), "off"))
    x = torch.randn(512, 64)
    with torch.no_grad():
        assert (compiled(x) - model(x)).norm() < (untuned(x) - model(x)).norm()


@pytest.mark.parametrize("logits_shape", [(3, 7, VOCABULARY), (5, 4)])
def test_the_loss_to_descend_is_the_loss_that_is_measured(logits_shape: tuple[int, ...]) -> None:
    program = grouped("llama")
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(logits_shape, generator=draw) for _ in range(2))
    reference = reference_of(program, [one])
    assert reference.kind is (Loss.KL if logits_shape[-1] == VOCABULARY else Loss.RELATIVE_ERROR)
    assert float(reference.distance([other])) == pytest.approx(reference.loss([other]), rel=1e-5)


@pytest.mark.parametrize("value", ["auto", "off", None, 40, "40", TUNING])
def test_an_option_means_a_tuning(value: object) -> None:
    expected = {"auto": Tuning(), "off": None, None: None, 40: Tuning(40, anywhere=True), "40": Tuning(40, anywhere=True), TUNING: TUNING}
    assert Tuning.parse(value) == expected[value]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "much", "0", [], Fraction(3)])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="tun"):
        Tuning.parse(value)


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"rounds": 0}, {"round_steps": 0}, {"learning_rate": 0.0}, {"matrix_rate": -1.0}, {"reads": 0.0}]
)
def test_fields_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(change))):
        replace(TUNING, **change)


def test_a_weight_that_is_applied_twice_stays_one() -> None:
    torch.manual_seed(0)
    program = capture(Branches(), example_inputs=(torch.randn(4, 64),))
    group(program, Options(Budget.of(3)))
    given = Samples(torch.randn(512, 64).split(64), (torch.randn(128, 64),), "random")
    tuning = replace(TUNING, rounds=2, round_steps=8)
    Quantize(samples=given, tuning=tuning).run(allocated(program))
    Tune(tuning, given).run(program)
    assert program.packed["b"] is program.packed["c"]
    x = given.held_out[0]
    with torch.no_grad():
        expected = Student(program).outputs((x,))[0]
    Lower().run(program)
    assert torch.allclose(program.run((x,))[0], expected, atol=1e-5)
