"""`--same-in-group`: linears of one input get the same quantizer, however much more one of them matters than another."""

import json
from pathlib import Path

import pytest

from qpc.__main__ import main
from qpc.sensitivity import Loss, Sensitivities

GROUPS = (("self_attn", "qkv"), ("mlp", ("gate", "up")))


def planned(directory: Path, capfd: pytest.CaptureFixture[str], *options: str | Path) -> dict[str, str | None]:
    """The quantizer of each linear."""
    words = ["plan", directory, "--bits", "3", "--effort", "fast", "--calibration", "none", "--json", *options]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    assert caught.value.code == 0, err
    return {row["name"]: row["quantizer"] for row in json.loads(out)["report"]["rows"]}


def test_members_of_a_group_agree(tiny_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    groups = [[f"model.layers.{layer}.{part}.{leaf}_proj" for leaf in leaves] for layer in range(2) for part, leaves in GROUPS]
    alone = [f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in ("self_attn.o_proj", "mlp.down_proj")]
    values = {name: 4.0**index for group in (*groups, alone) for index, name in enumerate(group)}
    known = tmp_path / "known.json"
    known.write_text(Sensitivities(values, Loss.KL, noise=0, seed=0, tokens=1).to_json(), encoding="utf-8")
    for options, alike in (((), False), (("--same-in-group",), True)):
        found = planned(tiny_directory, capfd, "--sensitivities", known, *options)
        assert all((len({found[name] for name in group}) == 1) == alike for group in groups), found
