"""What feedback is expected to leave of every error, on disk: known once for a model and a calibration, whatever is planned."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qpc import cache
from qpc.calibration import Samples
from qpc.errors import SettingsError
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.passes.feedbacks import Known
from qpc.sensitivity_cache import digest
from qpc.settings import Settings

FORMAT = 1
"""Version of the files and of the way in which shares are found; part of their names."""


@dataclass(frozen=True)
class Shares:
    """The file of the shares of one model, calibration and seed; nothing is kept without a directory."""

    directory: Path | None
    name: str

    @staticmethod
    def of(program: Program, samples: Samples, settings: Mapping[str, object]) -> "Shares":
        """settings: whatever decides the shares besides the model, its linears and the samples."""
        directory = Settings.from_environment().cache
        if directory is None:
            return Shares(None, "")
        inputs = [digest(samples.batches), digest(samples.held_out)]
        sites = [site_of(node).name for node in program.linears()]
        return Shares(directory, f"shares-{cache.key(program.module, FORMAT, {**settings, 'inputs': inputs, 'sites': sites})}.json")

    def read(self) -> Known:
        """What the file knows; nothing if it is damaged, or there is none."""
        content = None if self.directory is None else cache.read(self.directory, self.name)
        with suppress(ValueError, TypeError):
            if content is not None:
                return Known.from_json(content.decode())
        return Known()

    def write(self, known: Known) -> None:
        """Keep what is expected, if the directory can be written; a directory that cannot is remarked on with the sensitivities."""
        if self.directory is not None:
            with suppress(SettingsError):
                cache.write(self.directory, self.name, known.to_json().encode())
