"""Run the comparisons in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.kernels.interpreted`. Prints a line for each failure."""

import os
import sys
from itertools import chain

import torch

from tests.kernels import attention_cases, large_batch_cases
from tests.kernels.cases import SMALL, cases
from tests.kernels.interpreting import without_waste


def main() -> int:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Triton is imported"
    without_waste()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count = failed = 0
    for name, check in chain(cases(SMALL), large_batch_cases.cases(quick=True), attention_cases.cases(quick=True)):
        count += 1
        try:
            check("cpu")
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{count} comparisons, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
