"""Tasks of lm_eval on compiled models, with a task and data of our own; nothing is fetched."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval.models.huggingface")

import datasets
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import qpc
from qpc import terminal
from qpc.__main__ import main
from qpc.errors import EvaluationError, UsageError
from qpc.integrations import lm_eval
from qpc.integrations.lm_eval import Tasks
from qpc.integrations.task_model import TaskModel
from qpc.integrations.transformers import load_pretrained, load_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: "letters", and "lost", whose data is not there."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n} and", "choices": [" one", " two more", f" {n}"], "answer": n % 3} for n in range(9)]
    (directory / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("letters", "lost"):
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, data=directory / f"{name}.jsonl"))
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of data sets keeps nothing outside of the tests. However slow the machine is, no line of progress is written."""
    monkeypatch.setattr(terminal, "LINE_INTERVAL_S", math.inf)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def compiled(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 2 bits."""
    output = tmp_path_factory.mktemp("compiled") / "out"
    model = load_pretrained(tiny_directory)[0]
    small = qpc.compile(model, 2, effort="fast", calibration=None, sensitivity="random")
    qpc.save(small, output, tokenizer_from=tiny_directory)
    return output


def test_the_scores_are_those_of_lm_eval_itself(compiled: Path, tasks: Path) -> None:
    """The model goes into lm_eval's own model class as it is."""
    model, tokenizer = qpc.load(compiled), load_tokenizer(compiled)
    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(
        model=lm, tasks=["letters"], task_manager=manager, limit=6, num_fewshot=1, log_samples=False, bootstrap_iters=1000
    )
    asked = Tasks.parse("letters", path=tasks, limit=6, shots=1, batch=4)
    seen: list[tuple[str, int, int]] = []
    (score,) = lm_eval.measure(model, tokenizer, asked, asked.load(), "here", lambda *event: seen.append(event))
    assert theirs is not None
    row = theirs["results"]["letters"]
    assert (score.task, score.metric, score.value, score.stderr) == ("letters", "acc", row["acc,none"], row["acc_stderr,none"])
    assert score.examples == 6
    assert (seen[0], seen[-1]) == (("letters here", 0, 18), ("letters here", 18, 18))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_the_command_compares_and_measures_nothing_twice(
    compiled: Path, tiny_directory: Path, tasks: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return (caught.value.code, *capfd.readouterr())

    (tmp_path / "text").write_text("It was a dark and stormy night. " * 8)
    options = ("--baseline", tiny_directory, "--tasks", "letters", "--task-path", tasks, "--results", tmp_path / "done.jsonl")
    options += ("--text", tmp_path / "text", "--tokens", "64", "--window", "32")
    code, out, _ = run("eval", compiled, *options, "--json")  # with bars of tqdm, which is told to draw none too late here
    assert code == 0
    found = json.loads(out)
    (row,) = found["tasks"]
    assert (row["task"], row["metric"], row["examples"]) == ("letters", "acc", 9) and 0 <= row["baseline"] <= 1

    monkeypatch.setattr(TaskModel, "_model_call", lambda *_: pytest.fail("a finished task was run again"))
    code, out, err = run("eval", compiled, *options, "--json")
    assert (code, err, json.loads(out)) == (0, "", found)
    code, out, _ = run("eval", compiled, *options)
    assert f"{row['value']:.4f} ± {row['stderr']:.4f}" in out and f"{row['value'] - row['baseline']:+.4f}" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, err = run("eval", compiled, "--tasks", "lost", "--task-path", tasks)
    assert (code, out, err.count("\n")) == (2, "", 1) and "cannot be read" in err, err


def test_results_are_not_put_into_other_files(compiled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "diary").write_text("mine")
    for path, words in (
        (tmp_path / "diary", "holds no results"),
        (tmp_path, "cannot be written"),
        (tmp_path / "none" / "a", "cannot be written"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["eval", str(compiled), "--text", __file__, "--results", str(tmp_path / path)])
        assert words in capfd.readouterr().err
    assert (tmp_path / "diary").read_text() == "mine"


def test_bad_names(tasks: Path) -> None:
    with pytest.raises(UsageError, match="names no task"):
        Tasks.parse(" , ")
    with pytest.raises(UsageError, match="is no directory"):
        Tasks.parse("letters", path=tasks / "letters.yaml")
    with pytest.raises(UsageError, match="no task 'letterz'; did you mean letters"):
        lm_eval.check_known(("letters", "letterz"), ["letters", "lost"])
    with pytest.raises(UsageError, match="no task 'x'; `lm-eval ls tasks` lists"):
        lm_eval.check_known(("x",), ["letters", "lost"])
    with pytest.raises(EvaluationError, match="the data of the task lost cannot be read"):
        Tasks.parse("letters,lost", path=tasks).load()


def test_what_lm_eval_cannot_say_is_left_out() -> None:
    found = {"a acc,none": 0.5, "a acc_stderr,none": 0.1, "a exact,strict": 1.0, "a examples": 4.0, "all acc,none": 0.25}
    scores = {(score.task, score.metric): (score.value, score.stderr, score.examples) for score in lm_eval._scores(found)}
    assert scores == {("a", "acc"): (0.5, 0.1, 4), ("a", "exact,strict"): (1.0, None, 4), ("all", "acc"): (0.25, None, None)}
