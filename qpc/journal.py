"""What has been measured so far, kept on disk so that work that was interrupted goes on where it was."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TextIO, TypeVar

from qpc.plain_files import parse_json

Step = tuple[object, ...]
"""What names a measurement: strings, numbers and None."""

V = TypeVar("V", float, dict[str, float])
"""A measurement: one number, or several by name."""


@dataclass
class Journal(Generic[V]):
    """Measurements by their names; of a file, one a line, if there is one.

    A line that was cut off is forgotten. What cannot be written is kept in memory alone: the journal only saves time.
    """

    path: Path | None = None
    _known: dict[str, V] = field(default_factory=dict)
    _file: TextIO | None = None

    @staticmethod
    def open(path: Path) -> "Journal[V]":
        """The journal of this file, with what it holds."""
        journal: Journal[V] = Journal(path)
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                journal._read(line)
        except (OSError, UnicodeDecodeError):
            pass
        return journal

    @property
    def empty(self) -> bool:
        """Whether nothing has been measured."""
        return not self._known

    def __getitem__(self, step: Step) -> V | None:
        """The measurement of this name, if it was taken."""
        return self._known.get(json.dumps(step))

    def __setitem__(self, step: Step, value: V) -> None:
        name = json.dumps(step)
        if self.path is None or self._known.get(name) == value:
            self._known[name] = value
            return
        self._known[name] = value
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
                self._file.write("\n")  # ends a line that was cut off
            self._file.write(json.dumps([name, value]) + "\n")
            self._file.flush()
        except OSError:
            self.path = None

    def close(self) -> None:
        """Leave the file for the next time."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Remove the file: the result is kept elsewhere."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, line: str) -> None:
        try:
            name, value = parse_json(line)
            numbers = value.values() if isinstance(value, dict) else (value,)
            if isinstance(name, str) and all(map(is_measurement, numbers)):
                self._known[name] = value
        except (ValueError, TypeError):
            pass


def is_measurement(value: object) -> bool:
    """Whether a value of JSON is a number that was measured."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
