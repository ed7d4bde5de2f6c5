"""A model as lm_eval runs it, with the progress of qpc. Importing this module imports lm_eval."""

from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn


class TaskModel(HFLM):  # type: ignore[misc]
    """lm_eval's own model of transformers; it reports how many of its requests are done.

    Requests that share a sequence run as one, so that the last report of a kind of request may come early.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch: int, report: Callable[[int, int], None]) -> None:
        """report: called with the requests done, and their number."""
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self.report = report
        self.done = self.total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As lm_eval does."""
        return self._counted(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As lm_eval does."""
        return self._counted(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """As lm_eval does."""
        return self._counted(super().generate_until, requests)

    def _counted(self, run: Callable[..., Any], requests: list[Any]) -> Any:
        self.done, self.total = 0, len(requests)
        self.report(0, self.total)
        answers = run(requests, disable_tqdm=True)
        self.report(self.total, self.total)
        return answers

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return made

    def _advance(self, count: int) -> None:
        self.done = min(self.done + count, self.total - 1)
        self.report(self.done, self.total)
