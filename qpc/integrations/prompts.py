"""Prompts as text, and their continuations as text that comes piece by piece."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import nn

from qpc.errors import UsageError
from qpc.integrations.decoder import Stepping
from qpc.integrations.generation import Generated, generate

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the first bytes of a character to."""


class TextStream:
    """Turns the tokens of one sequence into text. A character whose bytes have not all come waits for them.

    tokenizer: of transformers; special tokens are left out. Only the tokens since the last whole character are decoded each time, behind
    those before, since how some tokenizers decode a token depends on its neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context, self._shown = 0, 0

    def add(self, token: int) -> str:
        """The text that a token completes."""
        self._tokens.append(token)
        return self._fresh(whole=True)

    def end(self) -> str:
        """What is left at the end, whole or not."""
        return self._fresh(whole=False)

    def _fresh(self, whole: bool) -> str:
        before = self._decoded(self._context, self._shown)
        after = self._decoded(self._context, len(self._tokens))
        if (whole and after.endswith(UNFINISHED)) or len(after) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]

    def _decoded(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Continued:
    """prompts, texts: each prompt and what follows it. generated: the tokens of that, and its times."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    generated: Generated

    def to_json(self) -> dict[str, Any]:
        """For machines: times in seconds, tokens with their stop tokens; `stepping` and `attention` as `Generated` has them."""
        lengths = self.generated.lengths
        each = [{"prompt": p, "text": t, "tokens": n} for p, t, n in zip(self.prompts, self.texts, lengths, strict=True)]
        times = {
            "prepare_s": round(self.generated.prepare_s, 4),
            "first_token_s": round(self.generated.first_token_s, 4),
            "elapsed_s": round(self.generated.elapsed_s, 4),
        }
        how = {"stepping": str(self.generated.stepping), "attention": self.generated.attention}
        return {"results": each} | times | {"tokens_per_second": round(self.generated.tokens_per_second, 2)} | how

    @property
    def speed(self) -> str:
        """One line for people."""
        found = self.generated
        first = f"{sum(found.lengths)} tokens, the first after {found.first_token_s * 1000:.0f} ms"
        return first + (f", then {found.tokens_per_second:.1f} tokens/s" if found.tokens_per_second else "")


def continue_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stepping: Stepping | None = None,
    on_text: Callable[[int, str], None],
) -> Continued:
    """Continue prompts together, as `generate` does.

    on_text: called with the index of a prompt and a piece of text: the prompt itself at the first token, then what follows it, as soon as
        it is known.
    Raises `UsageError` for a prompt without tokens, and what `generate` raises.
    """
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(tokens):
        raise UsageError("the prompt has no tokens; give at least one character")
    streams = [TextStream(tokenizer) for _ in prompts]
    texts = ["" for _ in prompts]

    def add(row: int, piece: str) -> None:
        if piece:
            texts[row] += piece
            on_text(row, piece)

    def add_tokens(step: int, fresh: list[int | None]) -> None:
        for row, token in enumerate(fresh):
            if step == 0:
                on_text(row, prompts[row])
            if token is not None:
                add(row, streams[row].add(token))

    steps = count()
    result = generate(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stepping=stepping,
        on_tokens=lambda fresh: add_tokens(next(steps), fresh),
    )
    for row, stream in enumerate(streams):
        add(row, stream.end())
    return Continued(tuple(prompts), tuple(texts), result)
