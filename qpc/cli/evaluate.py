"""The command `qpc eval`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qpc.cli.arguments import AsJson, Compiled, Device
from qpc.cli.inputs import load_any, read_text, required
from qpc.cli.output import print_json
from qpc.errors import UsageError
from qpc.terminal import ProgressBars

if TYPE_CHECKING:
    from qpc.evaluate import Evaluation
    from qpc.integrations.lm_eval import Score
    from qpc.journal import Journal

EXAMPLES = (
    "qpc eval OUT --baseline MODEL --text FILE",
    "qpc eval OUT --baseline MODEL --tasks arc_easy,piqa --download",
    "qpc eval OUT --tasks mine --task-path DIR --results done.jsonl --json",
)


def evaluate_model(
    model: Compiled,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file; its first tokens are read as they are.", show_default=False)] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", "--reference", metavar="MODEL", help="The original model, to compare with.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read.")] = 20480,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 1024,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES", help="Tasks of lm_eval: arc_easy,piqa.", show_default=False)] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory with further task files (*.yaml).", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most.", show_default="all")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in each prompt of a task.", show_default="as it says, or 0")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a task at once.")] = 8,
    download: Annotated[bool, typer.Option("--download", help="Let lm_eval fetch the data of tasks from the Hugging Face hub.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is finished here; what it has is not measured again.", show_default=False),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and divergence on a text, and the scores of tasks, beside the original.

    An evaluation with --results that was interrupted goes on where it was. Several models may share a file.
    """
    if text is None and tasks is None:
        raise UsageError("nothing to measure: give --text FILE, --tasks NAMES or both")
    if download:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "0"
    from qpc.evaluate import bos_of, evaluate, first_tokens
    from qpc.integrations.lm_eval import Tasks, measure

    asked = None if tasks is None else Tasks.parse(tasks, path=task_path, limit=limit, shots=shots, batch=batch)
    with Console(stderr=True).status("reading tasks"):
        data = None if asked is None else asked.load()
    content = None if text is None else read_text(text)
    journal = None if results is None else open_journal(results)
    network, found = load_any(model, device)
    tokenizer = required(found, model)
    ids = None if content is None else first_tokens(tokenizer, content, tokens)
    original, of_original = (None, None) if baseline is None else load_any(baseline, device)
    evaluation: Evaluation | None = None
    scores: tuple[Score, ...] = ()
    others: tuple[Score, ...] = ()
    with ProgressBars() as progress:
        if ids is not None:
            evaluation = evaluate(network, original, ids, window, progress, journal, bos_of(tokenizer, ids))
        if asked is not None and data is not None:
            scores = measure(network, tokenizer, asked, data, "", progress, journal)
            if original is not None and baseline is not None:
                others = measure(original, required(of_original, baseline), asked, data, "(baseline)", progress, journal)
    if as_json:
        texts = {} if evaluation is None else asdict(evaluation)
        print_json(texts if asked is None else texts | {"tasks": rows(scores, others)})
        return
    if evaluation is not None:
        show_evaluation(evaluation)
    if asked is not None:
        Console(highlight=False).print(scores_table(scores, others))


def open_journal(path: Path) -> "Journal[dict[str, float]]":
    """The journal of a file. Raises `UsageError` if it cannot be written, or holds something else."""
    from qpc.journal import Journal

    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--results {path} cannot be written; give a file in a directory that can")
    journal: Journal[dict[str, float]] = Journal.open(path)
    if journal.empty and path.exists() and path.stat().st_size:
        raise UsageError(f"--results {path} holds no results of qpc eval; give another file")
    return journal


def rows(scores: "tuple[Score, ...]", baseline: "tuple[Score, ...]") -> list[dict[str, Any]]:
    """Scores for machines, each beside that of the baseline, None where there is none."""
    others = {(score.task, score.metric): score for score in baseline}
    found = []
    for score in scores:
        other = others.get((score.task, score.metric))
        value, stderr = (None, None) if other is None else (other.value, other.stderr)
        found.append(asdict(score) | {"baseline": value, "baseline_stderr": stderr})
    return found


def show_evaluation(found: "Evaluation") -> None:
    """Print what was measured on a text for people."""
    print(f"perplexity       {found.perplexity:.3f}")
    if found.kl is not None and found.top1_agreement is not None:
        print(f"of the baseline  {found.reference_perplexity:.3f}")
        print(f"mean KL          {found.kl:.4f} nats per token")
        print(f"same first token {found.top1_agreement:.1%}")
    print(f"tokens           {found.tokens} in windows of {found.window}")


def scores_table(scores: "tuple[Score, ...]", baseline: "tuple[Score, ...]") -> Table:
    """Scores for people, with one standard error."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in ("compiled", "baseline", "difference") if baseline else ("score",):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("examples", justify="right", no_wrap=True)
    for row in rows(scores, baseline):
        cells = [with_error(row["value"], row["stderr"])]
        if baseline:
            other = row["baseline"]
            cells += ["–", "–"] if other is None else [with_error(other, row["baseline_stderr"]), f"{row['value'] - other:+.4f}"]
        table.add_row(row["task"], row["metric"], *cells, "–" if row["examples"] is None else str(row["examples"]))
    return table


def with_error(value: float, error: float | None) -> str:
    """A value and one standard error."""
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
