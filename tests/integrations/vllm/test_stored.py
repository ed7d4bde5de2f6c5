"""Which linears of a checkpoint vLLM may run as one, without vLLM."""

from typing import Any

import pytest

from qpc.errors import CheckpointError, QuantizerError
from qpc.integrations.vllm.stored import StoredWeight, linears_of, members, table_of, tables_of

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
LAYER = "model.layers.0.self_attn.qkv_proj"


def manifest(**changes: Any) -> dict[str, Any]:
    """Of a checkpoint of three linears; a change replaces fields of the entry of that name, None takes it away."""
    entries: dict[str, dict[str, Any]] = {}
    for leaf in FUSED["qkv_proj"]:
        known = {"out_features": 64, "in_features": 64, "block": 64, "quantizer": {"kind": "scalar", "bits": 4}}
        if changes.get(leaf, ...) is not None:
            entries[f"model.layers.0.self_attn.{leaf}"] = known | changes.get(leaf, {})
    return {"linears": entries, "embeddings": {}, "experts": {}, "gains": {}}


def test_what_has_no_place_is_refused() -> None:
    for section, message in (("gains", "without --fold"), ("experts", r"stack of experts, .* --exclude '\*experts\*'")):
        with pytest.raises(CheckpointError, match=message):
            linears_of(manifest() | {section: {"model.layers.0.mlp": {}}})


def test_members_come_in_the_order_of_the_layer() -> None:
    linears = linears_of(manifest())
    assert [linear.leaf for linear in members(LAYER, linears, FUSED)] == ["q_proj", "k_proj", "v_proj"]
    assert [linear.leaf for linear in members("model.layers.0.self_attn.k_proj", linears, FUSED)] == ["k_proj"]
    assert members("model.layers.1.self_attn.qkv_proj", linears, FUSED) == () == members("lm_head", linears, FUSED)


def test_a_layer_that_is_fused_in_the_checkpoint_is_its_only_member() -> None:
    linears = {LAYER: linears_of(manifest())["model.layers.0.self_attn.q_proj"]}
    assert members(LAYER, linears, FUSED) == (linears[LAYER],)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k_proj": {"quantizer": {"kind": "scalar", "bits": 5}}},
            r"qkv_proj as one weight, .* different quantizers: q_proj scalar 4, k_proj scalar 5, v_proj scalar 4; .*--same-in-group",
        ),
        ({"v_proj": None}, r"different quantizers: q_proj scalar 4, k_proj scalar 4, v_proj none; .*exclude all of them or none"),
        ({"q_proj": {"block": 32}}, r"rotate differently: q_proj 64 inputs in blocks of 32, k_proj 64 inputs in blocks of 64, .*--exclude"),
    ],
)
def test_members_that_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        members(LAYER, linears_of(manifest(**changes)), FUSED)


def test_gains_between_rotations_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"norm has a gain between two rotations, .*without --fold"):
        linears_of(manifest() | {"gains": {"model.norm": {}}})


def test_a_table_is_found_by_name_or_by_its_rows() -> None:
    entry = {"num_embeddings": 96, "embedding_dim": 64, "block": 64, "quantizer": {"kind": "scalar", "bits": 4}}
    tables = tables_of({"embeddings": {"wte": entry, "wpe": entry | {"num_embeddings": 32}}})
    assert table_of("wpe", 96, tables) is tables["wpe"] and table_of("", 96, tables) is tables["wte"]
    assert table_of("lm_head", 96, tables) is None and table_of("", 95, tables) is None
    with pytest.raises(CheckpointError, match=r"vLLM does not say which of wte, other an embedding of 96 rows is; .*without --embeddings"):
        table_of("", 96, tables | {"other": StoredWeight.of("other", entry, "num_embeddings", "embedding_dim")})


@pytest.mark.parametrize("entry", [{"block": -1}, {"out_features": "64"}, {"in_features": True}])
def test_a_damaged_entry_is_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="k_proj has no valid out_features, in_features and block"):
        linears_of(manifest(k_proj=entry))
    with pytest.raises(QuantizerError):
        linears_of(manifest(k_proj={"quantizer": None}))
