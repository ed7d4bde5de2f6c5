"""The pipeline: passes in order, with the verifier and the printer between them."""

from dataclasses import dataclass
from pathlib import Path

from qpc.errors import SettingsError, VerifierError
from qpc.ir.printer import to_dot, to_json, to_text
from qpc.ir.program import Program
from qpc.ir.verifier import verify
from qpc.passes.base import Pass, PassResult
from qpc.settings import Settings

_PRINTERS = {"txt": to_text, "json": to_json, "dot": to_dot}


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other on one program."""

    passes: tuple[Pass, ...]

    def run(self, program: Program, *, dump: Path | None = None) -> dict[str, PassResult]:
        """Run every pass on `program` in place: what each did, by its name.

        The verifier runs before the first pass and after each. Remarks are collected in `program.remarks`.

        dump: directory that receives `00_<stage>` and `NN_after_<pass>` as .txt, .json and .dot; by default that of QPC_DUMP. The count
        goes on where an earlier pipeline left the program.

        Raises `VerifierError` if a pass does not fit the stage of the program or breaks a contract, `SettingsError` if a dump cannot be
        written.
        """
        dump = dump or Settings.from_environment().dump
        self._check_order(program)
        _verified(program, "before the first pass")
        if not program.history:
            _write(program, dump, f"00_{program.stage.name.lower()}")
        results: dict[str, PassResult] = {}
        for step in self.passes:
            try:
                result = step.run(program)
            except Exception as error:
                error.add_note(f"in pass {step.name!r}; {_already(program)}")
                raise
            program.stage = step.ensures
            program.remarks += result.remarks
            _verified(program, f"after pass {step.name!r}")
            program.history.append(step.name)
            results[step.name] = result
            _write(program, dump, f"{len(program.history):02d}_after_{step.name}")
        return results

    def _check_order(self, program: Program) -> None:
        stage, before = program.stage, "the program"
        for step in self.passes:
            if step.requires is not stage:
                raise VerifierError(f"pass {step.name!r} requires stage {step.requires.name}, but {before} leaves {stage.name}")
            stage, before = step.ensures, f"pass {step.name!r}"


def _already(program: Program) -> str:
    return f"passes already run: {', '.join(program.history) or 'none'}"


def _verified(program: Program, when: str) -> None:
    try:
        verify(program)
    except VerifierError as error:
        raise VerifierError(f"{when} ({_already(program)}): {error}") from error


def _write(program: Program, directory: Path | None, name: str) -> None:
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, printer in _PRINTERS.items():
            (directory / f"{name}.{suffix}").write_text(printer(program), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write the dump to {directory}: {error.strerror}; QPC_DUMP must name a writable directory") from error
