"""What the system says of the memory of this process."""

import gc
from ctypes import CDLL
from pathlib import Path


def settled() -> int:
    """Bytes that are held now; the peak begins anew."""
    gc.collect()
    CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: tensors that are freed go back to the system at once
    CDLL("libc.so.6").malloc_trim(0)  # and what earlier work left would hide as much growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak is then what is held now
    return memory_bytes("VmRSS")


def memory_bytes(what: str) -> int:
    """As the system counts it: VmRSS, that of this process now; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))
