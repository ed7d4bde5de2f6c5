"""Settings: what the environment says, and what it must not say."""

from pathlib import Path

import pytest

from qpc.errors import SettingsError
from qpc.settings import VARIABLES, Settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/home/me"}, Path("/home/me/.cache/qpc")),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "not/absolute"}, Path("/home/me/.cache/qpc")),
        ({"XDG_CACHE_HOME": "/var/cache"}, Path("/var/cache/qpc")),
        ({"XDG_CACHE_HOME": "/var/cache", "QPC_CACHE": "/mine"}, Path("/mine")),
        ({"QPC_CACHE": ""}, None),
    ],
)
def test_the_cache_follows_xdg_and_can_be_turned_off(
    environment: dict[str, str], expected: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Settings.from_environment().cache == expected


@pytest.mark.parametrize(("name", "value"), [("QPC_TYPO", "1"), ("QPC_THREADS", "0"), ("QPC_THREADS", "many")])
def test_what_is_unknown_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        Settings.from_environment()
