"""A pass of tuning is what a graph can hold: it never waits for the device, and replayed it gives what it gives kernel by kernel."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qpc.budget import Budget
from qpc.calibration import Samples
from qpc.capture import capture
from qpc.compiler import group
from qpc.errors import ModelError
from qpc.ir.program import Program
from qpc.options import Options
from qpc.passes import replay
from qpc.passes.descent import Course, Descent, Outcome, kept_gradients
from qpc.passes.quantize import Quantize
from qpc.passes.replay import Replay
from qpc.passes.student import Student
from tests.families import FAMILIES, copied, grouped
from tests.passes.test_quantize import Branches
from tests.passes.test_tune import allocated, rounded, samples, with_packed_table

META = torch.device("meta")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OneDevice(TorchDispatchMode):
    """Fails where a tensor is on another device: a graph cannot hold the copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor) and value.device != META]
        assert not elsewhere, f"{func} has {elsewhere}"
        return result


def on_meta(program: Program) -> Program:
    """The program on a device where whatever looks at a value raises."""
    moved = copied(program)
    for node in moved.graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), lambda each: META if isinstance(each, torch.device) else each)
    moved.graph_module.recompile()
    moved.module = copy.deepcopy(program.module).to(META)
    moved.packed = {name: packed.to(META) for name, packed in program.packed.items()}
    moved.tables = {name: replace(table, packed=table.packed.to(META)) for name, table in program.tables.items()}
    return moved


def plain() -> Program:
    """Judged by the error of its output."""
    torch.manual_seed(0)
    program = capture(Branches(), example_inputs=(torch.randn(4, 64),))
    group(program, Options(Budget.of(3)))
    Quantize().run(allocated(program))
    return program


@pytest.mark.parametrize(
    "build",
    [
        *(partial(rounded, name) for name in ("llama", "gemma2", "gemma3", "gpt2")),
        lambda: allocated(grouped("llama")),
        with_packed_table,
        plain,
    ],
)
def test_a_pass_waits_for_nothing_and_stays_on_its_device(build: Callable[[], Program]) -> None:
    program = build()
    given = samples() if program.inputs == ("input_ids",) else Samples((torch.randn(8, 64),), (torch.randn(8, 64),), "random")
    descent = Descent(Student(on_meta(program)), given)
    batch, held_out = given.batches[0].to(META), given.held_out[0].to(META)
    with OneDevice():
        descent._add_gradients(batch)
        descent._add_loss(held_out)
    gradients = [change.grad for kind in descent.student.changes() for change in kind]
    assert gradients and all(gradient is not None for gradient in gradients)


def test_gradients_add_up_where_they_are() -> None:
    """As a graph that is replayed adds to them."""
    descent = Descent(Student(rounded("llama")), samples())
    moving = [change for kind in descent.student.changes() for change in kind]
    with kept_gradients(descent.student):
        places = [change.grad.data_ptr() for change in moving if change.grad is not None]
        descent._add_gradients(samples().batches[0])
        once = [change.grad.clone() for change in moving if change.grad is not None]
        descent._add_gradients(samples().batches[0])
        for change, place, gradient in zip(moving, places, once, strict=True):
            assert change.grad is not None and change.grad.data_ptr() == place and bool((gradient != 0).any())
            torch.testing.assert_close(change.grad, 2 * gradient, rtol=1e-6, atol=0)
    assert all(change.grad is None for change in moving)


def test_a_model_without_usable_outputs_is_refused() -> None:
    program = rounded("llama")
    program.module = copy.deepcopy(program.module)
    descent = Descent(Student(program), samples())
    descent.held_out_loss()
    with torch.no_grad():
        program.module.get_parameter("lm_head.weight").fill_(torch.nan)
    for judged in (descent.held_out_loss, lambda: descent.run(Course(2, 1e-3, 1e-3))):
        with pytest.raises(ModelError, match="not finite"):
            judged()


def test_on_a_cpu_work_is_done_as_it_comes() -> None:
    seen: list[Tensor] = []
    with Replay(torch.device("cpu")) as run:
        for number in range(5):
            run(seen.append, torch.full((2,), number))
    assert torch.stack(seen).tolist() == [[number] * 2 for number in range(5)] and run.obstacle is None


def descended(program: Program) -> tuple[Outcome, Tensor, float]:
    """What comes of a descent, where it ends, and its seconds."""
    student = Student(program)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outcome = Descent(student, samples()).run(Course(steps=100, learning_rate=3e-3, matrix_rate=1e-3))
    torch.cuda.synchronize()
    return outcome, torch.cat([change.flatten() for change in student.state()]), time.perf_counter() - begin


@gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_replayed_descent_is_an_eager_one_in_less_time(name: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight in so many is rounded; the matrices of others move."""
    program = capture(FAMILIES[name]().cuda())
    group(program, Options(Budget.of(3)))
    Quantize().run(allocated(program))
    program.packed = dict(list(program.packed.items())[::every])
    with monkeypatch.context() as patch:
        patch.setattr(replay, "WARM_UPS", 1 << 30)
        descended(program)
        expected, there, eager_s = descended(program)
    found, here, replayed_s = descended(program)
    assert found.obstacle is None and found.after < found.before
    assert (found.before, found.after) == pytest.approx((expected.before, expected.after), rel=1e-5)
    assert found.steps == expected.steps and (here - there).norm() <= 1e-2 * there.norm()
    assert replayed_s < eager_s, f"{replayed_s=}, {eager_s=}"


class Sum:
    """Adds up batches; `waiting` and `copying` do it as no graph can."""

    def __init__(self) -> None:
        self.total = torch.zeros((), device="cuda")

    def plain(self, batch: Tensor) -> None:
        self.total += batch.sum()

    def waiting(self, batch: Tensor) -> None:
        self.total += float(batch.sum())

    def copying(self, batch: Tensor) -> None:
        self.total += batch.sum() * torch.ones(1).to(batch.device)[0]


@gpu
def test_every_batch_counts_once_whatever_its_shape_and_place() -> None:
    found = Sum()
    batches = [torch.full((number % 3 + 1,), float(number)) for number in range(24)]
    with Replay(found.total.device) as run:
        for number, batch in enumerate(batches):
            run(found.plain, batch if number % 2 else batch.cuda())
        assert run.obstacle is None
    assert float(found.total) == sum(float(batch.sum()) for batch in batches)


@gpu
@pytest.mark.parametrize("name", ["waiting", "copying"])
def test_what_no_graph_can_hold_goes_on_kernel_by_kernel(name: str) -> None:
    found, stream = Sum(), torch.cuda.current_stream()
    for work in (getattr(found, name), found.plain):
        found.total.zero_()
        with Replay(found.total.device) as run:
            for number in range(6):
                run(work, torch.full((4,), float(number)))
            assert (run.obstacle is None) == (work == found.plain), run.obstacle
        assert float(found.total) == 4 * sum(range(6))
        assert torch.cuda.current_stream() == stream and torch.cuda.get_sync_debug_mode() == 0
        torch.cuda.empty_cache()  # raises if a capture was broken
