"""The GPU benchmarks: what they are made of runs anywhere, and what needs a GPU says so."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the adapters import the Triton kernels")

from benchmarks import __main__ as runner
from benchmarks import adapters, kernels, layer, plan, prefill, profile, summary, timing, transform, weights
from benchmarks.baselines import BF16, OTHERS, ROUNDING
from benchmarks.plan import options_of, scalar, trellis, vector
from benchmarks.rows import BenchmarkError, read_head, read_rows, write_rows
from benchmarks.timing import Checked, check, relative_error, time_calls, timing_of
from benchmarks.weights import activations, random_weights, weight_bytes
from qpc.ir.annotation import LinearShape
from qpc.kernels import fused, reference
from qpc.kernels.fused import Copies, Finish
from qpc.kernels.warpgroup import Product
from qpc.latency import Roofline
from qpc.quant.layout import row_blocks
from qpc.quant.palette import trellis_at

GPU_BENCHMARKS = {"kernels": kernels, "prefill": prefill, "transform": transform, "profile": profile}
SUBJECTS = (*trellis(Fraction(2), Fraction(13, 4)), *scalar(3), *vector(4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["check", "layer", *GPU_BENCHMARKS])
def test_without_a_gpu_a_benchmark_says_so(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--quick"])
    assert runner.main() == 1
    assert capsys.readouterr().err == f"{name}: this benchmark runs kernels on an NVIDIA GPU; PyTorch finds none here\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GPU_BENCHMARKS)
def test_on_a_gpu_a_benchmark_starts(name: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    GPU_BENCHMARKS[name].main(["--quick", "--budget-s", "0", "--json", str(tmp_path / f"{name}.json")])
    (row,) = read_rows(tmp_path / f"{name}.json")
    assert row["us"] > 0
    assert read_head(tmp_path / f"{name}.json")["read_gb_s"] > 10
    assert "stopped: 0 s are spent" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*GPU_BENCHMARKS, "layer"])
def test_help_tells_the_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        {**GPU_BENCHMARKS, "layer": layer}[name].main(["--help"])
    assert end.value.code == 0
    assert re.search(r"\bus\b", capsys.readouterr().out), "the unit of its times"
    assert name in runner.BENCHMARKS


def test_a_quick_run_has_less_time_unless_it_is_given() -> None:
    make = partial(options_of, "kernels", None, budget_s=285, quick_budget_s=85)
    assert [make(text.split()).budget_s for text in ("", "--quick", "--budget-s 200", "--quick --budget-s 285")] == [285, 85, 200, 285]


def test_a_variant_is_asked_for_and_has_columns_of_its_own() -> None:
    def asked(*arguments: str) -> adapters.Variant:
        return plan.variant_of(plan.options_of("kernels", "", list(arguments), 225, 110, varies=True))

    assert asked() == adapters.DEFAULT and not adapters.DEFAULT.columns
    found = asked("--product", "wgmma", "--finish", "wide-by-four")
    assert found.columns == {"product": "wgmma", "finish": "wide-by-four"}
    cut = fused.plan(64, (256,), (2,), 8, 132)
    assert found.of(cut, 6, 8) == replace(cut, product=Product.WGMMA, finish=Finish.WIDE_BY_FOUR)
    assert adapters.DEFAULT.of(cut, 6, 8) == cut
    pieces = asked("--copies", "pieces").of(cut, 6, 8)
    assert pieces == replace(cut, copies=Copies.PIECES, stages=pieces.stages) and fused.program_bytes(pieces, 6, 8) <= fused.SHARED_BYTES
    assert [batch for batch in range(1, 17) if found.takes(batch)] == list(range(5, 17))
    with pytest.raises(SystemExit):
        asked("--product", "dp4a")


def test_nothing_is_timed_before_it_was_checked() -> None:
    with pytest.raises(TypeError, match="after its result was checked"):
        time_calls([lambda: None], None)  # type: ignore[arg-type]


def test_a_check_sees_every_element() -> None:
    expected = torch.randn(3, 4096, dtype=torch.float64)

    def forgets_one() -> torch.Tensor:
        out = torch.empty(3, 4096)
        out.view(-1)[1:] = expected.view(-1)[1:]
        return out

    for wrong in (forgets_one, lambda: expected + (torch.arange(4096) == 7) * 0.01, lambda: expected * 1.01):
        with pytest.raises(BenchmarkError, match="relative error"):
            check(wrong, expected, 1e-3)
    with pytest.raises(BenchmarkError, match=r"shape \(3, 4095\), required \(3, 4096\)"):
        check(lambda: expected[:, 1:], expected, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_of_the_result_is_no_error(dtype: torch.dtype) -> None:
    values = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))  # float32, which PyTorch goes through on the way to bfloat16
    exact = torch.cat([values, torch.tensor([[0.0, 1.0, 0.5, -0.25] * 1024])]).double()
    assert relative_error(exact.to(dtype), exact) <= 1e-12
    before = exact * (1 + 1e-4)
    assert 0.5e-4 < relative_error(before.to(dtype), exact) < 5e-4, "what came before it still shows"


def test_relative_error_is_of_the_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    assert relative_error(expected + torch.tensor([[0.0, 0.0], [0.1, 0.0]]), expected) == pytest.approx(0.1 / (0.125**0.5))


def test_quantiles_are_times() -> None:
    assert timing_of([3.0]) == timing.Timing(3.0, 3.0, 3.0)
    found = timing_of([float(i) for i in range(15, 0, -1)])
    assert (found.us_p20, found.us, found.us_p80) == (4.0, 8.0, 13.0)


def test_copies_exceed_the_cache() -> None:
    for nbytes in (1 << 10, 3_000_000, 1 << 28, 1 << 30):
        copies = timing.copies_for(nbytes)
        assert copies >= 2 and copies * nbytes >= timing.CACHE_BYTES
        assert copies == 2 or (copies - 1) * nbytes < timing.CACHE_BYTES


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: f"{subject.family}-{subject.rate:g}")
def test_random_weights_are_weights(subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ORACLE_WEIGHTS", 64 * 168)  # the oracle then takes one block row at a time
    shape = (150, 168)
    first, second = random_weights(subject.quantizer, shape, 2, "cpu")
    assert first.nbytes == weight_bytes(subject.quantizer, shape)
    x = activations(3, 168, "cpu")
    expected = reference.linear(x.double(), list(first.codes), first.scales, None, list(first.parts), 150)
    torch.testing.assert_close(first.product(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(first.product(x), second.product(x))
    assert len(first.scales) == 64 * row_blocks(150)


def test_kernels_pass_the_check_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.interpreted_adapters"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr


def test_bf16_passes_its_check() -> None:
    calls, expected = BF16.make((96, 256), 2, activations(4, 256, "cpu"))
    assert len(calls) == 2
    assert check(calls[0], expected, ROUNDING).max_rel_error < ROUNDING
    with pytest.raises(BenchmarkError):
        check(calls[1], expected, ROUNDING)


@pytest.mark.parametrize("features", [96, 100])
def test_transforms_pass_their_checks(features: int) -> None:
    """But those that are Triton kernels and nothing else."""
    names = set()
    for each in transform.transforms(features, 3, torch.device("cpu")):
        if not each.name.startswith("triton"):
            check(lambda each=each: each.values(each.call()), each.expected, each.tolerance)  # type: ignore[misc]
            names.add(each.name)
    assert names >= {"rotate", "rms_norm", "rotate_operand", "norm_operand", "add_norm_operand", "gated_operand"}


def test_columns_of_baselines_have_names_in_the_report() -> None:
    assert set(summary.OTHERS) == {"int4_us"} | {f"{baseline.name}_us" for baseline in OTHERS}


def test_results_read_back(tmp_path) -> None:
    rows = [{"family": "trellis", "us": 1.5}, {"family": "scalar", "error": "KernelError: none"}]
    write_rows(tmp_path / "new" / "kernels.json", "kernels", rows, {"gpu": "NVIDIA Test"})
    assert read_rows(tmp_path / "new" / "kernels.json") == rows
    head = read_head(tmp_path / "new" / "kernels.json")
    assert (head["benchmark"], head["gpu"], head["torch"]) == ("kernels", "NVIDIA Test", torch.__version__)


def test_a_profile_is_named_after_its_gpu() -> None:
    assert profile.file_name("NVIDIA H100 80GB HBM3") == "h100.json"
    assert profile.file_name("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia-geforce-rtx-4090-laptop.json"


@pytest.mark.parametrize("shapes", [profile.SHAPES, profile.QUICK_SHAPES])
def test_a_profile_holds_every_linear_of_a_llama_alone_and_fused(shapes: tuple[weights.Shape, ...]) -> None:
    for group in weights.GROUPS:
        for count in range(1, len(group) + 1):
            assert all(weights.stacked(members) in shapes for members in itertools.combinations(group, count))


def test_a_layer_is_predicted_as_its_groups_are() -> None:
    """Fused, a transform and a launch for each group; alone, for each linear; the same bytes."""
    model = Roofline("toy", read_bytes_per_s=10**12, launch_ps=1_000_000)
    for mixture in layer.MIXTURES:
        fused, alone = (layer.predict(model, layer.linears_of(mixture, each), 1).ps for each in (True, False))
        groups = [
            model.group([LinearShape(*shape) for shape in members], trellis_at(Fraction(rate)), 1).ps
            for rate, members in zip(mixture, weights.GROUPS, strict=True)
        ]
        assert fused == sum(groups)
        assert 0.99 < (alone - fused) / (2 * 3 * model.launch_ps) < 1.1, "three linears more, each with a transform"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_layer_computes_what_it_should() -> None:
    calls, proof = layer.layer(layer.linears_of(layer.MIXTURES[1], fused=True), 8, torch.device("cuda"))
    assert proof.max_rel_error < 1e-3 and len(calls) >= 2
    calls[-1]()
    torch.cuda.synchronize()


def test_a_check_is_what_time_calls_takes() -> None:
    assert isinstance(check(lambda: torch.ones(2), torch.ones(2, dtype=torch.float64), 0.0), Checked)
