"""Compile a Triton kernel for a GPU that need not be there, and read what it uses."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Usage:
    """Registers of a thread, bytes of its stack (spills), bytes of shared memory of a program."""

    registers: int
    stack: int
    shared: int


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int = 4, sixteens: tuple[str, ...] = ()
) -> Any:
    """The compiled kernel; arguments in neither `types` nor `constants` are int32. Pointers are taken to be aligned to 16 bytes.

    sixteens: integers that are taken to be divisible by 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*") or name in sixteens}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def usage(compiled: Any) -> Usage:
    """What the machine code uses, as the object dump of the toolkit that Triton carries reports it."""
    text = _dump(compiled, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found, text
    registers, stack, shared, local = map(int, found.groups())
    return Usage(registers, stack + local, shared + compiled.metadata.shared)


def instructions(compiled: Any) -> list[str]:
    """The machine instructions, one per line."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", _dump(compiled, "-sass"))


def _dump(compiled: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
