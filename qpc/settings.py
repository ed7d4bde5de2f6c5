"""The one table of environment variables. Unknown `QPC_*` names and values are errors, not silence."""

import os
from dataclasses import dataclass
from pathlib import Path

from qpc.errors import SettingsError

VARIABLES = {
    "QPC_CACHE": "directory of what can be made again: sampled text, sensitivities (default: qpc in the XDG cache); empty: keep nothing",
    "QPC_DUMP": "directory that receives one text, JSON and DOT dump of the graph after every pass",
    "QPC_THREADS": "number of CPU threads of the encoder (default: all cores)",
}


@dataclass(frozen=True)
class Settings:
    """Values of the environment variables, parsed once per use."""

    dump: Path | None = None
    threads: int = 1
    cache: Path | None = None

    @staticmethod
    def from_environment() -> "Settings":
        """Read and check every `QPC_*` variable.

        Raises `SettingsError` for an unknown name or a malformed value.
        """
        unknown = sorted(name for name in os.environ if name.startswith("QPC_") and name not in VARIABLES)
        if unknown:
            raise SettingsError(f"unknown environment variable {unknown[0]}; known: {', '.join(sorted(VARIABLES))}")
        dump = os.environ.get("QPC_DUMP")
        threads = os.environ.get("QPC_THREADS", str(os.cpu_count() or 1))
        if not threads.isdigit() or int(threads) < 1:
            raise SettingsError(f"QPC_THREADS={threads!r} must be a positive integer")
        cache = os.environ.get("QPC_CACHE", str(_cache_home() / "qpc"))
        return Settings(dump=Path(dump) if dump else None, threads=int(threads), cache=Path(cache) if cache else None)


def _cache_home() -> Path:
    """$XDG_CACHE_HOME if it is absolute, as its specification asks, else ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path("~/.cache").expanduser()
