"""Runs of `qpc.stream` that are ended at many moments and begun again: `python -m tests.interrupted MODEL DIRECTORY` tells how they end.

This process plans once, and once more with error feedback, and makes the tables of the encoder; each run is a fork of it, which starts
within milliseconds. It has one thread, so that forking is safe. MODEL holds sensitivities.json too. The last line is JSON: a list of
`Trial`.
"""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from qpc.errors import CheckpointError
from qpc.integrations.streamed import Stream
from qpc.ir.annotation import annotation, site_of
from qpc.options import Options
from qpc.sensitivity import Sensitivities
from tests.families import copied, tokens

BUDGET = "2.3bit"
SHARD_BYTES = 40_000
KILLS, LAST_KILLS, FULL_DISKS = 20, 3, 5
CALIBRATED_KILLS, CALIBRATED_LAST_KILLS = 4, 1
DISK_FULL = 3
"""Exit code of a run that found the disk full."""

Event = Callable[[int], None]
"""Called with the number of a step, before the next one begins."""


@dataclass(frozen=True)
class Trial:
    """A run that was ended and one that went on. finished: lines of the journal in between. code: how the first ended; negative: signal.

    repeated: steps that both of them did. same: whether the result is, byte for byte, that of a run that nothing disturbed.
    """

    kind: str
    finished: int
    code: int
    told: str
    repeated: int
    same: bool


class Runs:
    """All runs of one plan in one directory."""

    def __init__(self, model: Path, home: Path, calibrated: bool = False) -> None:
        torch.set_num_threads(1)
        self.kills, self.last_kills = (CALIBRATED_KILLS, CALIBRATED_LAST_KILLS) if calibrated else (KILLS, LAST_KILLS)
        self.home, self.draw = home, random.Random(0)
        home.mkdir(exist_ok=True)
        sensitivities = Sensitivities.from_json((model / "sensitivities.json").read_text(encoding="utf-8"))
        text = tokens(20, 24) if calibrated else None
        self.plan = Stream.of(model, Options.of(BUDGET, effort="fast", calibration=text), sensitivities)
        for node in self.plan.program.linears():  # its table is then there for all runs
            quantizer, shape = annotation(node).quantizer, site_of(node).shape
            if quantizer is not None:
                quantizer.quantize(torch.randn(shape.out_features, shape.in_features))
        gc.collect()
        gc.freeze()  # a fork then need not look through, and so copy, all that this process has
        self.undisturbed = home / "undisturbed"
        self.steps = 0

        def count(step: int) -> None:
            (home / "steps").write_text(str(step))

        if calibrated:  # in this process, for what is allocated, and so the tables of the encoder, is not known before
            self.carry_out(replace(self.plan, program=copied(self.plan.program)), self.undisturbed, count)
        else:
            assert self.wait(self.begin(self.undisturbed, count)) == 0
        self.steps = int((home / "steps").read_text())
        shutil.copyfile(home / "all_steps", home / "all_lines")

    def begin(self, output: Path, event: Event | None = None) -> int:
        """A run in a process of its own, by its id."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            self.carry_out(self.plan, output, event)
            code = 0
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (self.home / "told").write_text(str(error))
            code = DISK_FULL
        finally:
            os._exit(code)

    def carry_out(self, plan: Stream, output: Path, event: Event | None) -> None:
        """A run in this process."""
        step = 0

        def progress(task: str, done: int, total: int) -> None:
            nonlocal step
            step += task in ("calibrate", "copy", "quantize")
            if event is not None:
                event(step)
            if (task, done) == ("quantize", total):
                shutil.copyfile(journal(output), self.home / "all_steps")

        plan.carry_out(output, shard_bytes=SHARD_BYTES, progress=progress)

    def wait(self, process: int) -> int:
        """The exit code of a run; negative is a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def go_on(self, kind: str, output: Path, code: int) -> Trial:
        """Begin again after a run that ended with `code`, and compare."""
        finished = len(lines(journal(output)))
        told = (self.home / "told").read_text() if code == DISK_FULL else ""
        (self.home / "all_steps").unlink(missing_ok=True)
        ended = not finished and output.exists()
        again = 0 if ended else self.wait(self.begin(output))
        steps = [json.loads(line).get("step") for line in lines(self.home / "all_steps")]
        left = [path for path in (journal(output), output.with_name(f"{output.name}.partial")) if path.exists()]
        return Trial(kind, finished, code, told, len(steps) - len(set(steps)), again == 0 and not left and equal(output, self.undisturbed))

    def killed(self, number: int) -> Trial:
        """SIGKILL at a moment after a part of the steps that grows with the number; the last while the result gets its name."""
        output, last = self.home / f"killed-{number}", len(lines(self.home / "all_lines")) + 1
        wanted = min(last, round(number * last / (self.kills - self.last_kills)))
        process = self.begin(output)
        while len(lines(journal(output))) < wanted and os.waitpid(process, os.WNOHANG) == (0, 0):
            time.sleep(0 if wanted == last else 0.002)
        time.sleep(0 if wanted == last else self.draw.uniform(0, 0.004))
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        try:
            code = self.wait(process)
        except ChildProcessError:  # it had ended before
            code = 0
        return self.go_on("killed with samples" if self.plan.decisions.samples else "killed", output, code)

    def starved(self, number: int) -> Trial:
        """From some step on the system refuses every write, by a limit of the size of files."""
        output, moment = self.home / f"starved-{number}", 1 + number * (self.steps - 1) // FULL_DISKS

        def refuse(step: int) -> None:
            if step == moment:
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

        return self.go_on("starved", output, self.wait(self.begin(output, refuse)))

    def full(self, disk: Path, number: int) -> Trial:
        """A file system that something else fills up meanwhile, where one can be mounted."""
        output, moment, other = disk / f"full-{number}", 1 + number * (self.steps - 1) // FULL_DISKS, disk / "other"

        def fill(step: int) -> None:
            if step == moment:
                with suppress(OSError), other.open("wb", buffering=0) as file:
                    while file.write(bytes(1 << 12)):
                        pass

        code = self.wait(self.begin(output, fill))
        other.unlink()
        trial = self.go_on("full", output, code)
        shutil.rmtree(output)
        return trial

    def too_small(self, disk: Path) -> Trial:
        """A disk that has no room for the result from the beginning; then it has."""
        output, other = disk / "small", disk / "other"
        other.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - (64 << 10)))
        code = self.wait(self.begin(output))
        other.unlink()
        return self.go_on("too small", output, code)

    def damaged(self, kind: str, damage: Callable[[Path], None], moment: float = 0.5) -> Trial:
        """A run that is killed on its way, half-way if not told otherwise, and a disk that then lacks something that was written."""
        output = self.home / kind

        def die(step: int) -> None:
            if step == int(self.steps * moment):
                os.kill(os.getpid(), signal.SIGKILL)

        code = self.wait(self.begin(output, die))
        damage(output)
        return self.go_on(kind, output, code)


def lose_tensors(output: Path) -> None:
    """Zeros in the place of all that was written, though the journal says that it is there."""
    for path in output.with_name(f"{output.name}.partial").glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))


def lose_activations(output: Path) -> None:
    """Other values in the place of those that wait for the next part of the model."""
    (path,) = output.with_name(f"{output.name}.partial").glob("activations-quantize-*")
    path.write_bytes(bytes(path.stat().st_size))


def tear_journal(output: Path) -> None:
    """A last line that is cut off."""
    content = journal(output).read_bytes()
    journal(output).write_bytes(content[:-20])


def journal(output: Path) -> Path:
    """Beside the output."""
    return output.with_name(f"{output.name}.journal")


def lines(path: Path) -> list[bytes]:
    """The whole lines of a file; none if there is no file."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def equal(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files."""
    found, expected = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (one, other))
    return found == expected


def main(model: Path, home: Path) -> None:
    """All trials."""
    runs = Runs(model, home)
    trials = [runs.killed(number) for number in range(runs.kills)]
    trials += [runs.starved(number) for number in range(FULL_DISKS)]
    trials += [runs.damaged("lost tensors", lose_tensors), runs.damaged("torn journal", tear_journal)]
    disk = home / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode == 0:
        try:
            trials += [runs.full(disk, number) for number in (0, FULL_DISKS - 1)]
            trials.append(runs.too_small(disk))
        finally:
            subprocess.run(["umount", disk], check=True)
    runs = Runs(model, home / "calibrated", calibrated=True)
    trials += [runs.killed(number) for number in range(runs.kills)]
    trials.append(runs.damaged("lost activations", lose_activations, moment=0.95))
    print(json.dumps([asdict(trial) for trial in trials]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
