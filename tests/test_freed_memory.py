"""Memory that the C library keeps is given back when asked for, and only what is free."""

import platform

import pytest

from qpc.freed_memory import give_back
from tests.memory import memory_bytes

BLOCK_BYTES, BLOCKS = 100_000, 500
"""Too small to be mapped one by one."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_what_is_free_goes_back_and_what_is_held_stays() -> None:
    blocks = [bytearray(b"q") * BLOCK_BYTES for _ in range(BLOCKS)]
    held = blocks[::50]  # between which glibc keeps what is freed
    del blocks
    before = memory_bytes("VmRSS")
    give_back()
    assert before - memory_bytes("VmRSS") > 0.8 * BLOCK_BYTES * BLOCKS
    assert all(block == b"q" * BLOCK_BYTES for block in held)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpc.freed_memory._trim", lambda: None)
    give_back()
