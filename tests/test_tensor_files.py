"""Files of tensors: the same bytes as safetensors writes, cut where they should be, read piece by piece as a whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpc import tensor_files
from qpc.errors import CheckpointError

NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(tensor_files.DTYPES)), SHAPES), min_size=1, max_size=8)


@settings(max_examples=60)
@given(TENSORS)
def test_headers_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in described.items():
        size = torch.empty(shape, dtype=dtype).nbytes
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=draw, dtype=torch.uint8)
        tensors[name] = bits.view(dtype).reshape(shape)
    save_file(tensors, path, metadata=tensor_files.METADATA)
    head, places = tensor_files.outline(path, {name: tensor.to("meta") for name, tensor in tensors.items()})
    content = path.read_bytes()
    assert content[: len(head)] == head
    assert tensor_files.header(path) == places
    for name, tensor in tensors.items():
        assert content[places[name].start : places[name].stop] == bytes(tensor_files.raw(tensor))
        assert places[name].checksum() == tensor_files.checksum(tensor)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_shards_hold_everything_once_and_no_more_than_they_may(sizes: list[int], most: int) -> None:
    tensors = {f"t{number}": torch.empty(size, dtype=torch.uint8, device="meta") for number, size in enumerate(sizes)}
    cut = tensor_files.shards(tensors, most)
    assert [name for shard in cut.values() for name in shard] == list(tensors)
    totals = [sum(tensor.nbytes for tensor in shard.values()) for shard in cut.values()]
    assert all(total <= most or len(shard) == 1 for total, shard in zip(totals, cut.values(), strict=True))
    for total, following in zip(totals, list(cut.values())[1:], strict=False):
        assert total + next(iter(following.values())).nbytes > most, "a file ends only where the next tensor has no room"
    assert list(cut) == ([tensor_files.TENSORS] if len(cut) == 1 else sorted(cut))


def test_a_checksum_tells_shape_and_dtype_apart() -> None:
    zeros = torch.zeros(2, 4, dtype=torch.int32)
    others = [zeros, zeros.reshape(4, 2), zeros.view(torch.float32), zeros + 1]
    assert len({tensor_files.checksum(other) for other in others}) == 4
    assert tensor_files.checksum(zeros.t().contiguous().t()) == tensor_files.checksum(zeros)


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    stored = tensor_files.headers(tmp_path)["a"]
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 999)
    assert [len(piece) for piece in stored.pieces()] == [999] * 8 + [8]
    assert stored.checksum() == tensor_files.checksum(tensor)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{}x"])
def test_what_is_no_file_of_tensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        tensor_files.headers(tmp_path)


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    tensors = {name: torch.full((10,), number) for number, name in enumerate("abc")}
    cut = tensor_files.shards(tensors, 160)
    for file, shard in cut.items():
        save_file(shard, tmp_path / file)
    tensor_files.write_index(tmp_path, cut)
    found = tensor_files.read(tmp_path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert {path.name for path in tensor_files.files(tmp_path)} == set(cut) and len(cut) == 2
    assert load_file(tmp_path / next(iter(cut))).keys() == {"a", "b"}


def test_parts_are_read_without_the_rest(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    codes, scales = torch.randint(99, (6, 5, 4), generator=draw, dtype=torch.int32), torch.rand(64, generator=draw).bfloat16()
    tensors = {"codes": codes, "scales": scales, "signs": torch.empty(0, dtype=torch.uint8), "other": torch.zeros(3)}
    cut = tensor_files.shards(tensors, 128)
    for file, shard in cut.items():
        save_file(shard, tmp_path / file)
    tensor_files.write_index(tmp_path, cut)
    places = {"codes": (slice(2, 4), slice(1, 3)), "scales": (slice(16, 32),), "signs": (slice(None),)}
    found = tensor_files.read_parts(tmp_path, places)
    assert len(cut) > 1 and found.keys() == places.keys()
    for name, place in places.items():
        assert torch.equal(found[name], tensors[name][place])
        assert found[name].untyped_storage().nbytes() == found[name].nbytes, "the rest is not kept in memory"
    assert torch.equal(tensor_files.read_parts(tmp_path, {"codes": ()})["codes"], codes)
    with pytest.raises(CheckpointError, match="lacks the tensor weight"):
        tensor_files.read_parts(tmp_path, {"weight": (slice(1),)})


def test_an_outline_has_the_shape_and_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / tensor_files.TENSORS)
    (stored,) = tensor_files.headers(tmp_path).values()
    outline = stored.outline()
    assert (outline.shape, outline.dtype, outline.device.type) == ((2, 3), torch.bfloat16, "meta")
    for damaged in (replace(stored, dtype="F4"), replace(stored, shape=(-1, 3)), replace(stored, shape=(1 << 62, 1 << 62))):
        with pytest.raises(CheckpointError, match=r"holds a \w+ tensor of shape .*; the checkpoint is damaged"):
            damaged.outline()
