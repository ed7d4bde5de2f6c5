"""A few cases of every target, and all that once failed. The whole: `python -m tests.fuzz --cases 100000`."""

import json
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.__main__ import attempt
from tests.fuzz.damage import damage_value, places
from tests.fuzz.targets import TARGETS

CORPUS = json.loads((Path(__file__).parent / "corpus.json").read_text())
SOME = {"budget": 300, "document": 60, "loader": 60, "plan": 20, "pack": 15}
"""Cases of each target, of a seed that the whole run does not have."""


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_input_ends_well_or_by_an_error_of_ours(target: str) -> None:
    outcomes = [attempt(target, case, seed=1) for case in range(SOME[target])]
    assert not [each for each in outcomes if "\n" in each], next(each for each in outcomes if "\n" in each)
    assert 0 < sum(each == "ok" for each in outcomes) < len(outcomes), "some are harmless, some are not"


@pytest.mark.parametrize("known", CORPUS, ids=lambda known: f"{known['target']} {known['case']}")
def test_what_once_failed_does_so_no_more(known: dict[str, str | int]) -> None:
    result = attempt(str(known["target"]), int(known["case"]), int(known["seed"]))
    assert "\n" not in result, result


def test_a_number_says_which_damage() -> None:
    value = {"a": [1, 2.5, "x", None], "b": {"c": [[]]}}
    assert repr(damage_value(Random("1"), value)) == repr(damage_value(Random("1"), value))
    assert len(list(places(value))) == 8
    assert any(repr(damage_value(Random(str(seed)), value)) != repr(value) for seed in range(5))
