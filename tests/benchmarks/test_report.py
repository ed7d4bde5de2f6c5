"""The report of a GPU, made from rows that are made up."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the weights of the benchmarks come with the kernels")
pytest.importorskip("matplotlib", reason="the report draws")

from benchmarks.report import report
from benchmarks.rows import BenchmarkError, write_rows
from benchmarks.summary import layer_sums, layer_table
from benchmarks.weights import LAYER, SHAPES

GPU = {"gpu": "NVIDIA Test", "capability": "9.0", "processors": 132, "read_gb_s": 3000.0, "copy_gb_s": 2800.0, "launch_us": 1.0}
SUBJECTS = [("trellis", rate) for rate in (2, 2.5, 3, 3.25, 4)] + [("scalar", 3.0), ("vector", 4.0)]


def multiplication(family: str, rate: float, batch: int, out_features: int, in_features: int) -> dict:
    nbytes = int(out_features * in_features * rate / 8)
    us = 2 + 1.4 * nbytes / 3e6 + 0.05 * batch
    return {
        "family": family, "preset": "default" if family == "trellis" else "", "rate": rate, "batch": batch, "out_features": out_features,
        "in_features": in_features, "bytes": nbytes, "us": us, "us_p20": us, "us_p80": us, "bandwidth_share": nbytes / us / 3e6,
        "max_rel_error": 0.004 + rate / 1000, "bf16_us": 3 + out_features * in_features / 1.45e6,
        "int4_us": (4 + out_features * in_features / 4e6) * (1 + batch / 12),
    }  # fmt: skip


@pytest.fixture
def rows() -> list[dict]:
    return [multiplication(*subject, batch, *shape) for subject in SUBJECTS for shape in SHAPES for batch in (1, 2, 4, 8, 16)]


def test_sums_are_of_the_four_linears(rows: list[dict]) -> None:
    sums = layer_sums(rows)
    assert len(sums) == len(SUBJECTS) * 5
    first = sums[0]
    assert (first.family, first.rate, first.batch) == ("trellis", 2, 1)
    alike = [multiplication("trellis", 2, 1, *shape) for shape in LAYER]
    assert first.us == pytest.approx(sum(row["us"] for row in alike))
    assert first.ratio == pytest.approx(sum(row["bf16_us"] for row in alike) / first.us)
    assert first.floor_us(3000.0) == pytest.approx(sum(o * i for o, i in LAYER) / 4 / 3e6)
    assert first.others["int4_us"] == pytest.approx(sum(row["int4_us"] for row in alike))
    assert len(list(layer_table(rows))) == 1 + len(sums)


def test_a_sum_needs_all_four(rows: list[dict]) -> None:
    key = ("trellis", 3, 8, *LAYER[2])
    broken = [r for r in rows if (r["family"], r["rate"], r["batch"], r["out_features"], r["in_features"]) == key]
    broken[0]["error"] = "KernelError: no"
    assert not [each for each in layer_sums(rows) if (each.family, each.rate, each.batch) == key[:3]]
    assert len(layer_sums(rows)) == len(SUBJECTS) * 5 - 1


def test_the_report_shows_what_is_there(tmp_path: Path, rows: list[dict]) -> None:
    rows.append({"family": "vector", "rate": 3.0, "batch": 1, "out_features": 1024, "in_features": 4096, "error": "KernelError: no kernel"})
    write_rows(tmp_path / "kernels.json", "kernels", rows, GPU)
    text = report(tmp_path)
    assert text.startswith("# NVIDIA Test\n")
    alike = [each for each in layer_sums(rows) if (each.family, each.rate) == ("trellis", 3.25)]
    cells = " | ".join(f"{each.us:.1f} ({each.ratio:.2f}x)" for each in alike)
    assert f"| **trellis 3.25 bits** | {cells} | {alike[0].floor_us(3000.0):.1f} |" in text
    assert "Failed: family vector, rate 3.0, batch 1, out_features 1024, in_features 4096, error KernelError: no kernel" in text
    assert f"{max(row['max_rel_error'] for row in rows if 'error' not in row):.4g}" in text
    for name in ("bits", "batch", "roofline"):
        assert f"(kernels-{name}.png)" in text and (tmp_path / f"kernels-{name}.png").stat().st_size > 10_000
    assert "Many tokens" not in text and "GemLite" not in text, "a section or a row for what was not measured"


def test_every_file_has_its_section(tmp_path: Path) -> None:
    linear = {
        "family": "trellis", "preset": "default", "rate": 3.0, "tokens": 2048, "out_features": 4096, "in_features": 4096, "us": 110.0,
        "bf16_us": 100.0, "ratio": 1.1, "dequantize_us": 14.0, "dequantize_gb_s": 2800.0, "copy_share": 0.93, "max_rel_error": 0.01,
    }  # fmt: skip
    write_rows(tmp_path / "prefill.json", "prefill", [linear], GPU)
    turned = [
        {"transform": name, "features": 4096, "block": 4096, "batch": batch, "us": us + batch / 10, "max_rel_error": 0.01}
        for name, us in (("rotate", 2.5), ("rms_norm", 2.0)) for batch in (1, 8)
    ]  # fmt: skip
    write_rows(tmp_path / "transform.json", "transform", turned, GPU)
    write_rows(tmp_path / "profile.json", "profile", [{**linear, "batch": 1}], GPU)
    layer = {"bits": "3/3/3/3", "fused": True, "batch": 8, "us": 60.0, "predicted_us": 61.5, "off": 0.025, "estimates": 0}
    write_rows(tmp_path / "layer.json", "layer", [layer], GPU)
    text = report(tmp_path)
    assert "| 3/3/3/3 | fused | 8 | 60.0 | 61.5 | +2.5% |" in text
    assert "| trellis 3 bits | 4096x4096 | 110 | 100 | 1.10 | 14.0 | 2800 | 93% |" in text
    assert "| `rotate` | 4096 | 2.60 | 3.30 |" in text
    assert "1 times of 1 shapes at 3 bits. One launch takes 1.00 us." in text
    assert "## Multiplication" not in text


def test_a_folder_is_for_one_gpu(tmp_path: Path, rows: list[dict]) -> None:
    with pytest.raises(BenchmarkError, match="holds none of"):
        report(tmp_path)
    write_rows(tmp_path / "kernels.json", "kernels", rows, GPU)
    write_rows(tmp_path / "profile.json", "profile", rows, {**GPU, "gpu": "NVIDIA Other"})
    with pytest.raises(BenchmarkError, match="NVIDIA Other, NVIDIA Test"):
        report(tmp_path)
