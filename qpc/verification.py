"""`qpc.verify`: whether a checkpoint is still what was saved, tensor by tensor, with little memory and without its model."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qpc import tensor_files
from qpc.checkpoint import MANIFEST, checksums_of, manifest_checksum, read_manifest
from qpc.errors import CheckpointError
from qpc.progress import Progress, silent, track
from qpc.tensor_files import Stored


@dataclass(frozen=True)
class Verification:
    """What was found. tensors, tensor_bytes: that were compared. problems: a sentence each; none if all is as it was saved."""

    directory: str
    tensors: int
    tensor_bytes: int
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes."""
        return {"intact": self.intact} | asdict(self)


def verify(directory: str | os.PathLike[str], progress: Progress = silent) -> Verification:
    """Compare all that decides what a compiled model computes, but for config.json, with the checksums that it was saved with.

    These are in qpc.json: of each tensor, in whichever file it is, and of qpc.json itself. No checksum covers what others may write beside
    them: configuration, tokenizer, model card.

    Raises `CheckpointError` if there is no checkpoint, its qpc.json cannot be read, or it was saved without checksums.
    """
    manifest = read_manifest(directory)
    expected = checksums_of(manifest, directory)
    problems = []
    if manifest.get("sha256") != manifest_checksum(manifest):
        problems.append(f"{MANIFEST} was changed after it was saved")
    found: dict[str, Stored] = {}
    for path, wanted in tensor_files.files(directory).items():
        try:
            here = tensor_files.header(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [f"{path.name} lacks the tensor {name} that the index names" for name in sorted(wanted - here.keys())]
        found |= here
    problems += [f"the tensor {name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{found[name].file.name} holds a tensor {name} that was not saved" for name in sorted(found.keys() - expected.keys())]
    known = [name for name in sorted(found) if name in expected]
    for name in track(known, "verify", len(known), progress):
        try:
            if found[name].checksum() != expected[name]:
                problems.append(f"{name} in {found[name].file.name} is not what was saved")
        except OSError as error:
            problems.append(f"{name} in {found[name].file.name} cannot be read: {error.strerror or error}")
    compared = sum(found[name].nbytes for name in known)
    return Verification(str(Path(directory)), len(known), compared, tuple(problems))
