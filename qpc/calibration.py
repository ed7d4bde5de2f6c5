"""The inputs on which a compile takes second moments: sampled from the model itself, given, or none.

Error feedback pays if the moments are those of inputs that the model meets, and of many times more inputs than the widest linear reads.
Text that the model samples from itself needs no data set.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qpc import token_cache
from qpc.errors import ModelError, SettingsError
from qpc.ir.annotation import annotation
from qpc.ir.program import Program, Remark
from qpc.ir.random_inputs import vocabulary
from qpc.progress import Progress, silent
from qpc.quant.moment import Moment
from qpc.sampling import Start, cannot_sample, chat_opening, sample
from qpc.settings import Settings
from qpc.token_file import Origin, TokenFile

MOST_TOKENS = 128 * 256
"""Tokens that are sampled, or read from a text, unless one asks for another number."""

TOKENS_PER_INPUT = 16
"""Self-sampled tokens for each input of the widest linear, as far as `MOST_TOKENS` allows; fewer than a quarter of it earn a remark."""

GPU_TIMES = 4
"""So many times more are sampled by a model on a GPU, where they cost seconds."""

LEAST_SEQUENCES = 32
"""Sequences of different beginnings that are sampled at least; they get shorter first."""

HELD_OUT = 8
"""One sequence in so many is held out."""

EVENLY = 0.5
"""Share of the importance of positions that all have alike. On SmolLM2-135M less error is left on held-out text than with 0, 0.2 or 1."""

BATCH_INPUTS = 4096
"""Positions of one batch, at least one sequence; the activations of so many are in memory at once."""


@dataclass(frozen=True)
class SelfSampled:
    """Text that the model samples from itself, with the seed of the compile; it is kept on disk for the next one.

    tokens: in all; None: `TOKENS_PER_INPUT` for each input of the widest linear, at most `MOST_TOKENS`; `GPU_TIMES` that on a GPU.
    length: tokens of a sequence, as far as the model allows. temperature: of the distribution of the model.
    start: how sequences begin. opening: the tokens with which they begin instead of the BOS token; CHAT needs them, see `parse`.
    """

    tokens: int | None = None
    length: int = 256
    temperature: float = 1.0
    start: Start = Start.BOS
    opening: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        if self.length < 2:
            raise SettingsError(f"calibration: length={self.length} must be at least 2")
        if not self.temperature > 0:
            raise SettingsError(f"calibration: temperature={self.temperature} must be positive")

    def __str__(self) -> str:
        return f"self-sampled from {self.start} at temperature {self.temperature:g}"


@dataclass(frozen=True, eq=False)
class Given:
    """Inputs of the model: of a language model token ids, int64 [sequences, length]; else tensors with a batch as first axis.

    origin: of tokens that a model sampled before.
    """

    batches: tuple[Tensor, ...]
    origin: Origin | None = None

    def __post_init__(self) -> None:
        for batch in self.batches:
            if not isinstance(batch, Tensor) or batch.ndim < 1 or batch.numel() == 0:
                shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
                raise SettingsError(f"calibration: a batch must be a non-empty tensor [sequences, length], got {shape}")
        if not self.batches:
            raise SettingsError("calibration: no batches were given")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Given) or len(other.batches) != len(self.batches) or other.origin != self.origin:
            return False
        return all(one is two or torch.equal(one, two) for one, two in zip(self.batches, other.batches, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(batch.shape for batch in self.batches))

    def __str__(self) -> str:
        return "given" if self.origin is None else self.origin.source


Calibration = SelfSampled | Given


@dataclass(frozen=True)
class Samples:
    """Inputs of a program with one input, in batches along the first axis, and others held out.

    description: where they come from. importance, held_out_importance: how much each position counts in the moments of each linear, if that
    is known: for each batch, by name of the linear node, float32 [positions]. outputs: the second moments of the gradients with respect to
    what linears write, by name of the weight; rows of a weight that is missing are rounded independently of each other.
    """

    batches: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    description: str
    importance: tuple[Mapping[str, Tensor], ...] | None = None
    held_out_importance: tuple[Mapping[str, Tensor], ...] | None = None
    outputs: Mapping[str, Moment] | None = None

    def weighed(self, importance: Sequence[Mapping[str, Tensor]]) -> "Samples":
        """The same with the importance of the positions of `batches` and then `held_out`.

        Held-out positions count by their importance. For the others `EVENLY` of it is spread evenly: weights that differ much leave few
        positions to fit a moment to, and other texts will find other ones important.
        """
        fit = importance[: len(self.batches)]
        means = {name: torch.cat([batch[name] for batch in fit]).mean() for name in (fit[0] if fit else ())}
        spread = tuple({name: torch.lerp(values, means[name], EVENLY) for name, values in batch.items()} for batch in fit)
        return replace(self, importance=spread, held_out_importance=tuple(importance[len(self.batches) :]))


def parse(
    value: object, *, tokenizer: Any | None = None, tokens: int | None = None, start: Start | str | None = None
) -> Calibration | None:
    """The calibration that an option means.

    value: "self"; "none" or None; a `SelfSampled` or `Given`; the path of a UTF-8 text file, or of tokens that `qpc sample` wrote
    (.safetensors); texts (a list of str); a tensor of tokens, or an iterable of them. tokenizer: reads the texts, and knows the opening of
    a chat. tokens: of the text or samples. start: of samples.

    Raises `SettingsError` for anything else, and for a text or a chat without tokenizer.
    """
    _check_tokens(tokens)
    if isinstance(value, SelfSampled) or value == "self":
        found = value if isinstance(value, SelfSampled) else SelfSampled()
        return _with_opening(replace(found, tokens=tokens or found.tokens, start=Start.parse(start or found.start)), tokenizer)
    if start is not None:
        raise SettingsError(f"calibration: a start ({start}) is for text that the model samples from itself")
    if isinstance(value, str | Path) and Path(value).suffix == ".safetensors":
        return _from_samples(Path(value), tokens)
    if isinstance(value, str | Path) and value != "none":
        return _from_texts([_text(Path(value))], tokenizer, tokens)
    if isinstance(value, Sequence) and value and not isinstance(value, str) and all(isinstance(text, str) for text in value):
        return _from_texts(value, tokenizer, tokens)
    if tokens is not None:
        raise SettingsError("calibration: a number of tokens is for a text, or for text that the model samples from itself")
    if value is None or value == "none":
        return None
    if isinstance(value, Given):
        return value
    if isinstance(value, Tensor):
        return Given((value,))
    if isinstance(value, Iterable):
        return Given(tuple(value))
    raise SettingsError(
        f"calibration={value!r} must be 'self', 'none', a text file, a list of texts, or a tensor of tokens [sequences, length]"
    )


def collect(
    calibration: Calibration | None, program: Program, seed: int, progress: Progress = silent
) -> tuple[Samples | None, tuple[Remark, ...]]:
    """The inputs that a calibration means for a program, and what is to be said of them.

    Without inputs (nothing was asked for, or the model cannot sample text) the first is None.
    Raises `SettingsError` for given inputs that the program cannot take.
    """
    match calibration:
        case None:
            return None, ()
        case Given(batches, origin):
            _check_inputs(program, batches)
            remarks = () if origin is None else _of_samples(program, sum(batch.numel() for batch in batches), origin)
            return _split(batches, str(calibration)), remarks
        case SelfSampled():
            reason = _no_text(program) or cannot_sample(program.module)
            if reason is None:
                try:
                    tokens, remarks = self_sampled(calibration, program, seed, progress)
                    return _split((tokens,), str(calibration)), remarks
                except ModelError as error:
                    reason = str(error)
            advice = "weights are rounded without error feedback; give calibration inputs"
            return None, (Remark("calibration", type(program.module).__name__, f"{reason}: {advice}"),)


def _check_tokens(tokens: int | None) -> None:
    if tokens is not None and tokens < 1:
        raise SettingsError(f"calibration: tokens={tokens} must be positive")


def _with_opening(calibration: SelfSampled, tokenizer: Any | None) -> SelfSampled:
    if calibration.start is not Start.CHAT or calibration.opening is not None:
        return calibration
    if tokenizer is None:
        raise SettingsError("calibration: samples that start as a chat need the tokenizer with its chat template")
    return replace(calibration, opening=chat_opening(tokenizer))


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise SettingsError(f"calibration: {str(path)!r} is neither 'self' nor 'none', and cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"calibration: {path} is not UTF-8 text (byte {error.start}); convert it first") from error


def _from_texts(texts: Iterable[str], tokenizer: Any | None, tokens: int | None) -> Given:
    """The first tokens of the texts, one after the other, in windows of the length of samples."""
    if tokenizer is None:
        raise SettingsError("calibration: texts need the tokenizer of the model; give it, or give tokens")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= (tokens or MOST_TOKENS):
            break
    if tokens is not None and len(ids) < tokens:
        raise SettingsError(f"calibration: the text has {len(ids)} tokens, {tokens} were asked for; give a longer text or fewer tokens")
    ids = ids[: tokens or MOST_TOKENS]
    if not ids:
        raise SettingsError("calibration: the text is empty")
    length = min(SelfSampled.length, len(ids))
    return Given((torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length),))


def _from_samples(path: Path, tokens: int | None) -> Given:
    """The tokens of a file, as many sequences as are asked for."""
    found = TokenFile.read(path)
    sequences, length = found.tokens.shape
    if tokens is not None and tokens > sequences * length:
        raise SettingsError(f"calibration: {path} has {sequences * length} tokens, {tokens} were asked for; sample more, or ask for fewer")
    wanted = sequences if tokens is None else -(-tokens // length)
    return Given((found.tokens[:wanted],), found.origin)


def _of_samples(program: Program, tokens: int, origin: Origin) -> tuple[Remark, ...]:
    """What is to be said of samples that come from a file."""
    size, model = vocabulary(program, _input(program)), type(program.module).__name__
    other = f"the tokens were sampled from a vocabulary of {origin.vocabulary}, this model has one of {size}"
    return _few(program, tokens) + ((Remark("calibration", model, other),) if size != origin.vocabulary else ())


def _few(program: Program, tokens: int) -> tuple[Remark, ...]:
    """A remark if so many samples are few for the widest linear."""
    widest = _widest(program)
    if 4 * tokens >= TOKENS_PER_INPUT * widest:
        return ()
    reason = f"{tokens} sampled tokens are few for linears that read {widest} inputs; ask for more calibration tokens"
    return (Remark("calibration", type(program.module).__name__, reason),)


def _widest(program: Program) -> int:
    return max(site.shape.in_features for node in program.linears() if (site := annotation(node).site) is not None)


def _no_text(program: Program) -> str | None:
    """Why the input of a program is not a text; None if it is."""
    if len(program.inputs) != 1:
        return f"the graph has {len(program.inputs)} inputs, not one of token ids"
    table = vocabulary(program, _input(program))
    return None if table is not None else "its input is no text"


def _input(program: Program) -> fx.Node:
    (node,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name in program.inputs)
    assert isinstance(node, fx.Node)
    return node


def _check_inputs(program: Program, batches: Iterable[Tensor]) -> None:
    if len(program.inputs) != 1:
        raise SettingsError(f"calibration: inputs can be given to a model with one input, this one has {', '.join(program.inputs)}")
    size = vocabulary(program, _input(program))
    for batch in batches:
        if size is not None and (batch.dtype != torch.int64 or batch.ndim != 2):
            raise SettingsError(f"calibration: tokens must be int64 [sequences, length], got {batch.dtype} {tuple(batch.shape)}")
        if size is not None and not 0 <= int(batch.min()) <= int(batch.max()) < size:
            raise SettingsError(f"calibration: tokens must lie in 0..{size - 1}, got {int(batch.min())}..{int(batch.max())}")


def self_sampled(calibration: SelfSampled, program: Program, seed: int, progress: Progress = silent) -> tuple[Tensor, tuple[Remark, ...]]:
    """Tokens [sequences, length] of a program that can sample text, from the cache if they are there.

    Raises `ModelError` as `sample` does.
    """
    model = program.module
    widest = _widest(program)
    times = 1 if program.device.type == "cpu" else GPU_TIMES
    tokens = calibration.tokens or times * min(TOKENS_PER_INPUT * widest, MOST_TOKENS)
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or calibration.length
    length = min(calibration.length, longest, max(2, tokens // LEAST_SEQUENCES))
    sequences = -(-tokens // length)
    remarks = _few(program, sequences * length)
    directory = Settings.from_environment().cache
    settings = asdict(calibration) | {"tokens": [sequences, length], "seed": seed}
    name = token_cache.key(model, settings) if directory is not None else ""
    made = token_cache.read(directory, name) if directory is not None else None
    if made is None or made.shape != (sequences, length):
        made = sample(
            model,
            sequences,
            length,
            seed,
            temperature=calibration.temperature,
            opening=calibration.opening,
            random_first=calibration.start is Start.RANDOM,
            progress=progress,
        )
        if directory is not None:
            try:
                token_cache.write(directory, name, made)
            except SettingsError as error:
                remarks += (Remark("calibration", type(model).__name__, str(error)),)
    return made, remarks


def token_file(calibration: SelfSampled, program: Program, seed: int, progress: Progress = silent) -> tuple[TokenFile, tuple[Remark, ...]]:
    """The same as a value to write into a file: a compile that is given it is one that has sampled it itself.

    Raises `ModelError` if the model cannot sample text.
    """
    reason = _no_text(program) or cannot_sample(program.module)
    size = None if reason is not None else vocabulary(program, _input(program))
    if reason is not None or size is None:
        raise ModelError(f"{reason}: it cannot sample text; calibrate on a text file or on other inputs")
    tokens, remarks = self_sampled(calibration, program, seed, progress)
    model = token_cache.key(program.module, asdict(calibration) | {"seed": seed})
    return TokenFile(tokens, Origin(str(calibration), model, size, seed)), remarks


def _split(given: Iterable[Tensor], source: str) -> Samples:
    """Hold out the last sequences of each shape, and cut the others into batches of about `BATCH_INPUTS` positions."""
    alike: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in given:
        alike.setdefault(tuple(batch.shape[1:]), []).append(batch)
    kept: list[Tensor] = []
    held_out: list[Tensor] = []
    sequences = positions = 0
    for batches in alike.values():
        whole = torch.cat(batches)
        each = max(1, math.prod(whole.shape[1:-1] if whole.is_floating_point() else whole.shape[1:]))
        apart, rows = len(whole) // HELD_OUT, max(1, BATCH_INPUTS // each)
        kept += torch.split(whole[: len(whole) - apart], rows)
        held_out += torch.split(whole[len(whole) - apart :], rows) if apart else ()
        sequences, positions = sequences + len(whole), positions + len(whole) * each
    return Samples(tuple(kept), tuple(held_out), f"{source}, {positions} tokens in {sequences} sequences")
