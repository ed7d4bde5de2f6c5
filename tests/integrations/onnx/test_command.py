"""`qpc export` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import qpc
from qpc.__main__ import main
from tests.compiled import compiled_pair
from tests.integrations.onnx.runtime import session


def code_of(*arguments: str | Path) -> object:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qpc.save(compiled_pair("llama_tied")[1], tmp_path / "out")
    path = tmp_path / "model.onnx"
    command = ("export", tmp_path / "out", "--onnx", path, "--no-cache")
    assert code_of(*command, "--json") == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["files"], result["bytes"], result["cache"], err) == ([str(path)], path.stat().st_size, False, "")
    assert [value.name for value in session(path).get_inputs()] == ["input_ids", "attention_mask"]

    assert code_of(*command) == 2, "the file is there already"
    out, err = capfd.readouterr()
    assert out == "" and err == f"error: {path} exists; choose another file or allow overwriting\n"


def test_a_plain_model_is_refused(tiny_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert code_of("export", tiny_directory, "--onnx", tmp_path / "model.onnx") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and "not a checkpoint of qpc" in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_onnx_is_imported_only_when_it_is_used() -> None:
    check = "import sys, qpc, qpc.__main__, qpc.integrations.onnx; print(sorted({'onnx', 'onnx_ir', 'onnxscript'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
