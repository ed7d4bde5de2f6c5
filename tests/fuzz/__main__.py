"""Knock at every door with damaged input: `python -m tests.fuzz --cases 100000 --seed 0 --json FILE`.

A case is a target and a number; `python -m tests.fuzz --only loader --case 1234` runs one again. What goes on longer than `MOST_S`
is a failure like any exception that is not a `QpcError`. Failures that were found stay in `corpus.json` and are tried again by the tests; a
number means another input once a target draws otherwise, so each defect has a test of its own besides.
"""

import argparse
import json
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch

from qpc.errors import QpcError
from tests.fuzz.targets import TARGETS

MOST_S = 20
MOST_BYTES = 12 << 30
"""Address space of the process: what asks for more fails."""


class TooLongError(Exception):
    """A case went on for more than `MOST_S`."""


def attempt(target: str, case: int, seed: int = 0) -> str:
    """What became of a case: "ok", the name of a `QpcError`, or the traceback of anything else."""
    run, _ = TARGETS[target]

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {MOST_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(Random(f"{seed} {target} {case}"))
        return "ok"
    except QpcError as error:
        assert str(error), "an error says something"
        return type(error).__name__
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cases(count: int, only: str | None) -> Iterator[tuple[str, int]]:
    """So many cases, each target with its share of them."""
    for target, (_, share) in TARGETS.items():
        if only in (None, target):
            yield from ((target, case) for case in range(round(count * (share if only is None else 1.0))))


def main() -> int:
    """Run, count, print; 1 if anything failed."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(TARGETS))
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    chosen = cases(options.cases, options.only) if options.case is None else [(target, options.case) for target in [options.only or ""]]
    found: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    failures: list[dict[str, Any]] = []
    for target, case in chosen:
        started_s = time.monotonic()
        result = attempt(target, case, options.seed)
        seconds[target] = seconds.get(target, 0.0) + time.monotonic() - started_s
        label = result
        if "\n" in result:
            label = "failed"
            failures.append({"target": target, "case": case, "seed": options.seed, "error": result.strip().splitlines()[-1][:300]})
            print(f"{target} {case}: {result}", file=sys.stderr, flush=True)
        counts = found.setdefault(target, {})
        counts[label] = counts.get(label, 0) + 1
    rows = []
    for target, counts in found.items():
        total = sum(counts.values())
        rows.append({"target": target, "cases": total, "ms": round(1000 * seconds[target] / total, 3), "outcomes": counts})
        print(f"{target:10} {total:7} cases  {rows[-1]['ms']:8.3f} ms each  {counts}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": rows, "failures": failures}, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
