"""Progress never reaches stdout, and a log is not flooded."""

import ctypes

import pytest

from qpc import terminal
from qpc.progress import track
from qpc.terminal import ProgressBars, silent_stdout


def test_short_work_is_silent_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as progress:
        assert list(track(range(5), "count", 5, progress)) == [0, 1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")


def test_long_work_leaves_lines_on_stderr(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", 0.0)
    with ProgressBars() as progress:
        progress("count", 3, 8)
    assert capfd.readouterr() == ("", "count 3/8\n")


def test_bars_are_drawn_on_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBars() as progress:
        for task in ("first", "second", "first"):
            list(track(range(3), task, 3, progress))
    out, err = capfd.readouterr()
    assert out == ""
    assert "first" in err and "second" in err and "3/3" in err


def test_what_a_library_prints_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    print("before")
    with pytest.raises(KeyboardInterrupt), silent_stdout():
        library.puts(b"noise")
        raise KeyboardInterrupt
    library.puts(b"heard")
    library.fflush(None)
    print("after")
    assert capfd.readouterr() == ("before\nheard\nafter\n", "")
