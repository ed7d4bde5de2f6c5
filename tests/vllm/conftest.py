"""The option that names a real model."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smollm2", type=Path, help="directory of SmolLM2-135M-Instruct, as `make demo` unpacks it")
