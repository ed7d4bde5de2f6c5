"""A model card says what was done; it never takes the place of another README, nor says where a model lay on this machine."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch import nn

import qpc
from qpc.integrations.model_card import CARD, model_card
from tests.compiled import compiled_pair


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return compiled_pair("llama_tied")[1]


def front_matter(card: str) -> dict[str, object]:
    """What model hubs read."""
    opening, front, _ = card.split("---\n", 2)
    assert opening == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def test_card_says_what_was_done(model: nn.Module, tmp_path: Path) -> None:
    report = qpc.report_of(model)
    qpc.save(model, tmp_path / "out", measured_kl=0.12345)
    card = (tmp_path / "out" / CARD).read_text()
    assert front_matter(card) == {"library_name": "transformers", "tags": ["qpc", "qpalette"]}
    linears = sum(row.quantizer is not None for row in report.rows)
    for expected in (f"{linears} at {report.bits_per_weight:.3f} bits", report.budget, "0.1235 nats", f"{report.predicted_loss:.4f} nats"):
        assert expected in card
    assert "measured" not in model_card(report)
    assert "predicted" not in model_card(replace(report, predicted_loss=None))


def test_base_model_is_a_name_on_a_hub(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    named = copy.deepcopy(model)
    for name, known in (
        ("owner/name-1.5B", True),
        (str(tmp_path / "models"), False),
        ("models/here", False),
        ("../name", False),
        ("", False),
    ):
        named.config.name_or_path = name
        qpc.save(named, tmp_path / "out", overwrite=True)
        card = (tmp_path / "out" / CARD).read_text()
        (tmp_path / "out" / CARD).unlink()
        assert front_matter(card).get("base_model") == (name if known else None)
        assert (name in card) == known or not name


def test_a_readme_that_is_there_stays(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CARD).write_text("mine")
    qpc.save(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / CARD).read_text() == "mine"
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / CARD).read_text() == "mine"
