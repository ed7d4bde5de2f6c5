"""Files that others wrote: read so that nothing in their place can be waited for, and nothing in them can exhaust the stack."""

import json
from pathlib import Path
from typing import Any


def require_regular(path: Path) -> None:
    """Raise `OSError` if anything but a file is at a path: reading a pipe would wait for its writer."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


def read_json(path: Path) -> Any:
    """The value in a UTF-8 file. Raises `FileNotFoundError`, `OSError` or `ValueError`."""
    require_regular(path)
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, but a value that is nested too deeply is a `ValueError` like any other mistake."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
