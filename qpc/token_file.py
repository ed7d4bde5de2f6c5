"""Tokens in a file of their own: text that a model made up once, to be calibrated on by any compile, on any machine."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qpc.errors import SettingsError
from qpc.plain_files import require_regular

FORMAT = "qpc tokens 1"
"""What the metadata of such a file says of itself."""


@dataclass(frozen=True)
class Origin:
    """Where tokens come from.

    source: in words, as a report has it. model: a digest of the model, its configuration and how it was asked. vocabulary: rows of its
    embedding. seed: of the draws.
    """

    source: str
    model: str
    vocabulary: int
    seed: int


@dataclass(frozen=True, eq=False)
class TokenFile:
    """What is in such a file. tokens: int64 [sequences, length]."""

    tokens: Tensor
    origin: Origin

    def write(self, path: Path) -> None:
        """Put it there, in the place of what was. Raises `SettingsError` if that cannot be written."""
        metadata = {"format": FORMAT} | {name: str(value) for name, value in asdict(self.origin).items()}
        try:
            path.write_bytes(save({"tokens": self.tokens.int()}, metadata))
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror or error}; give another place") from error

    @staticmethod
    def read(path: Path) -> "TokenFile":
        """The inverse of `write`. Raises `SettingsError` for a file that is missing, damaged or something else."""
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                if metadata.get("format") != FORMAT or names != {"tokens"}:
                    raise ValueError(f"its format is {metadata.get('format')!r} and it holds {', '.join(sorted(names)[:3]) or 'nothing'}")
                tokens = file.get_tensor("tokens")
            origin = Origin(metadata["source"], metadata["model"], int(metadata["vocabulary"]), int(metadata["seed"]))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingsError(f"{path} holds no tokens of `qpc sample` ({reason}); sample them again") from error
        if tokens.dtype != torch.int32 or tokens.ndim != 2 or tokens.numel() == 0:
            raise SettingsError(f"{path}: tokens must be int32 [sequences, length], they are {tokens.dtype} {tuple(tokens.shape)}")
        return TokenFile(tokens.long(), origin)
