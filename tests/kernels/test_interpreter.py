"""The Triton kernels against their oracles in Triton's interpreter, in a process of its own, since the mode is fixed at import."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton interprets the kernels")


def test_kernels_match_oracles() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.kernels.interpreted"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
