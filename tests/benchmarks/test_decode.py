"""The benchmark of whole models: its models, its accounting of a trace, and a whole run on a small model."""

import sys
from fractions import Fraction

import pytest
import torch

pytest.importorskip("triton", reason="the adapters import the Triton kernels")

from benchmarks import __main__ as runner
from benchmarks import decode, llama
from benchmarks.rows import read_head, read_rows
from benchmarks.trace import Event, Purpose, breakdown, events_of, purpose_of
from qpc.kernels.linear import QuantizedLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("fused_kernel", Purpose.LINEARS),
        ("_vector_kernel", Purpose.LINEARS),
        ("transform_kernel", Purpose.TRANSFORMS),
        ("_rotate_kernel", Purpose.TRANSFORMS),
        ("_attention_kernel", Purpose.ATTENTION),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<...>", Purpose.ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", Purpose.ATTENTION),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", Purpose.NORMS),
        ("triton_poi_fused_mul_silu_2", Purpose.OTHER),
        ("void at::native::reduce_kernel<512, 1, ArgMaxOps>", Purpose.SAMPLING),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", Purpose.HEAD),
        ("void gemv2T_kernel_val<...>", Purpose.HEAD),
    ],
)
def test_kernels_by_purpose(name: str, purpose: Purpose) -> None:
    assert purpose_of(name, Purpose.HEAD) is purpose


def test_a_breakdown_is_the_whole_time() -> None:
    """Two steps: a kernel that starts while another runs counts from where that ends; one inside another not at all."""
    step = [Event("fused_kernel", 0, 10), Event("transform_kernel", 8, 13), Event("_attention_kernel", 14, 20), Event("copy", 15, 19)]
    later = [Event(event.name, event.start_us + 24, event.end_us + 24) for event in step]
    found = breakdown([*later, *step], 2)
    parts = {Purpose.LINEARS: 10, Purpose.TRANSFORMS: 3, Purpose.ATTENTION: 6, Purpose.OTHER: 0, Purpose.GAPS: (1 + 1 + 4) / 2}
    assert {purpose: us for purpose, us in found.us.items() if us or purpose in parts} == parts
    assert found.span_us == sum(found.us.values()) == 22
    assert found.launches == {"fused_kernel": 1, "transform_kernel": 1, "_attention_kernel": 1, "copy": 1}


def test_a_trace_is_read() -> None:
    trace = [
        {"ph": "X", "cat": "kernel", "name": "a", "ts": 1.5, "dur": 2, "pid": 0},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": "7", "dur": "1"},
        {"ph": "M", "name": "process_name"},
    ]
    assert events_of(trace) == [Event("a", 1.5, 3.5), Event("Memset", 7.0, 8.0)]


def test_models_have_the_bytes_that_they_should() -> None:
    bits = Fraction(13, 4)
    packed = llama.build(llama.Kind(bits, Fraction(6)), llama.TINY, CPU)
    plain = llama.build(llama.Kind(None), llama.TINY, CPU)
    weights = llama.linear_bytes(plain) // 2
    assert weights == sum(p.numel() for n, p in plain.named_parameters() if "_proj" in n)
    assert float(bits) <= 8 * llama.linear_bytes(packed) / weights < float(bits) + 0.2
    assert isinstance(packed.lm_head, QuantizedLinear)
    groups = {module.group for module in packed.modules() if isinstance(module, QuantizedLinear)} - {None}
    assert len(groups) == 2 * llama.TINY["num_hidden_layers"] and all(group.whole for group in groups)
    assert not any(tensor.is_meta for tensor in (*packed.parameters(), *packed.buffers(), *plain.buffers()))


def test_shared_memory_is_one_matrix() -> None:
    model = llama.build(llama.Kind(None), llama.TINY, CPU, shared=True)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim == 2}) == 1


def test_jobs_have_all_budgets_and_batches_the_main_ones_first() -> None:
    rows = [decode.described(job) for job in decode.jobs_of(decode.BUDGETS, decode.BATCHES)]
    assert [(row["budget"], row["batch"]) for row in rows[:2]] == [(3.25, 1), (3.25, 8)]
    assert {(row["budget"], row["batch"]) for row in rows if row["head_bits"] == 16} >= {(b, n) for b in (2, 3, 3.25, 4) for n in (1, 8)}
    assert len({decode.key(row) for row in rows}) == len(rows)


def test_a_run_writes_rows_and_resumes(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--stepping", "eager", "--bits", "3.25", "--json", str(tmp_path / "decode.json")]
    decode.main([*options, "--batch", "1", "--budget-s", "0"])
    assert not (tmp_path / "decode.json").exists() and "--resume" in capsys.readouterr().out
    decode.main([*options, "--batch", "1"])
    rows = read_rows(tmp_path / "decode.json")
    assert [(row["budget"], row["head_bits"], row["batch"]) for row in rows] == [(3.25, 16, 1), (3.25, 6, 1), (16, 16, 1)]
    for row in rows:
        assert row["ms_p20"] <= row["ms_per_token"] <= row["ms_p80"]
        assert row["speedup"] == pytest.approx(row["bf16_ms_per_token"] / row["ms_per_token"], rel=1e-2)
        assert row["tokens_per_second"] == pytest.approx(1000 / row["ms_per_token"], rel=1e-2)
        assert row["weight_bytes"] <= row["bf16_weight_bytes"]
    assert read_head(tmp_path / "decode.json")["tiny"] is True
    decode.main([*options, "--batch", "1,8", "--resume"])
    more = read_rows(tmp_path / "decode.json")
    assert more[:3] == rows and [row["batch"] for row in more[3:]] == [8]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_whole_model_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "decode"])
    assert runner.main() == 1
    assert capsys.readouterr().err == "decode: this benchmark runs kernels on an NVIDIA GPU; PyTorch finds none here\n"
