"""Tasks of the Language Model Evaluation Harness (`lm_eval`), measured on a compiled model as on its original."""

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from qpc.errors import EvaluationError, UsageError
from qpc.evaluate import fingerprint
from qpc.integrations.transformers import one_line
from qpc.journal import Journal, is_measurement
from qpc.progress import Progress, silent

EXAMPLES = "examples"
"""Stands for the number of examples where else a metric has its name."""


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks.

    metric: as lm_eval calls it, with its filter if that is not "none": "acc_norm", "exact_match,strict-match". stderr: of the value, if
    lm_eval gives one. examples: that it is the mean of.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None


@dataclass(frozen=True)
class Tasks:
    """Tasks to measure.

    names: of tasks, groups or tags. path: a directory of task files (YAML) that are known beside those of lm_eval. limit: examples of
    each task at most. shots: examples in each prompt, where the task does not fix it at 0. batch: sequences at once.
    """

    names: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None
    shots: int | None = None
    batch: int = 8

    @staticmethod
    def parse(text: str, **options: Any) -> "Tasks":
        """From names with commas between them. Raises `UsageError` if there is none, or the path is no directory."""
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        if not names:
            raise UsageError("--tasks names no task; give some, such as arc_easy,piqa")
        tasks = Tasks(names, **options)
        if tasks.path is not None and not tasks.path.is_dir():
            raise UsageError(f"--task-path {tasks.path} is no directory; give one with task files (*.yaml)")
        return tasks

    def load(self) -> dict[str, Any]:
        """Each task with its data, as lm_eval holds it.

        Raises `UsageError` if lm_eval is missing or does not know a task, `EvaluationError` if its data cannot be read.
        """
        manager = self._manager()
        loaded = {}
        for name in self.names:
            try:
                loaded[name] = manager.load([name])
            except Exception as error:
                raise EvaluationError(
                    f"the data of the task {name} cannot be read: {one_line(error)}; fetch it once with --download, "
                    "or give a task whose data is on this machine with --task-path"
                ) from error
            for task in loaded[name]["tasks"].values():
                fixed = task.get_config("num_fewshot")
                if fixed is None or (self.shots is not None and fixed != 0):
                    task.set_config(key="num_fewshot", value=self.shots or 0)
                task.set_fewshot_seed(seed=1234)  # as lm_eval does by itself
        return loaded

    def _manager(self) -> Any:
        """What knows all tasks. Indexing those of lm_eval takes a while, and is done only if one of them is asked for."""
        check_installed()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        path = None if self.path is None else str(self.path)
        if path is not None:
            local = TaskManager(include_path=path, include_defaults=False)
            if set(self.names) <= set(local.all_tasks):
                return local
        manager = TaskManager(include_path=path)
        check_known(self.names, manager.all_tasks)
        return manager


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UsageError` for the first name that is not known, with those that it may stand for."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those it has"
            raise UsageError(f"lm_eval {version('lm_eval')} knows no task {name!r}; {hint}")


def check_installed() -> None:
    """Raise `UsageError` if lm_eval, or what it needs to run a model of transformers, is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--tasks needs lm_eval ({error}): pip install 'qpc[eval]'") from error


def measure(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks,
    loaded: dict[str, Any],
    label: str = "",
    progress: Progress = silent,
    journal: Journal[dict[str, float]] | None = None,
) -> tuple[Score, ...]:
    """The scores of a causal language model of transformers, compiled or not.

    loaded: by `tasks.load`. label: of the model, for progress. journal: tasks of this model that it holds are not measured again, others
    are added to it. Raises `EvaluationError` for a task that such a model cannot do.
    """
    weights = "" if journal is None else fingerprint(model)
    place = "" if tasks.path is None else str(tasks.path.resolve())
    scores: list[Score] = []
    for name in tasks.names:
        step = ("task", weights, name, place, tasks.limit, tasks.shots, version("lm_eval"))
        found = None if journal is None else journal[step]
        if found is None:
            found = _run(model, tokenizer, tasks, loaded[name], partial(progress, f"{name} {label}".rstrip()))
            if journal is not None:
                journal[step] = found
        scores += _scores(found)
    return tuple(scores)


def _run(model: nn.Module, tokenizer: Any, tasks: Tasks, loaded: Any, report: Callable[[int, int], None]) -> dict[str, float]:
    """Numbers by "TASK METRIC,FILTER", and the examples of each task."""
    from lm_eval import evaluate

    from qpc.integrations.task_model import TaskModel

    seen: Any = TaskModel(model, tokenizer, tasks.batch, report)
    try:
        results = evaluate(lm=seen, task_dict=loaded, limit=tasks.limit, log_samples=False, bootstrap_iters=1000)
    except ValueError as error:
        raise EvaluationError(f"{', '.join(loaded['tasks'])} cannot be run: {one_line(error)}") from error
    rows = results["results"] | results.get("groups", {})
    found = {
        f"{task} {metric}": float(value)
        for task, row in rows.items()
        for metric, value in row.items()
        if "," in metric and is_measurement(value)  # what lm_eval cannot say is "N/A"
    }
    return found | {f"{task} {EXAMPLES}": float(count["effective"]) for task, count in results["n-samples"].items()}


def _scores(found: dict[str, float]) -> Sequence[Score]:
    """The numbers in order, each beside its standard error."""
    scores = []
    for name, value in found.items():
        task, _, metric = name.partition(" ")
        kind, _, chosen = metric.partition(",")
        if metric == EXAMPLES or kind.endswith("_stderr"):
            continue
        count = found.get(f"{task} {EXAMPLES}")
        label = kind if chosen == "none" else metric
        scores.append(Score(task, label, value, found.get(f"{task} {kind}_stderr,{chosen}"), None if count is None else int(count)))
    return scores
