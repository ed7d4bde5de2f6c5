"""A cluster of two nodes, of which one dies on the way: the bytes are those of a run without any cluster."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import qpc
from qpc.__main__ import main
from qpc.cli.stream import packing_device
from qpc.cluster import conditions, on_ray
from qpc.cluster.on_ray import AHEAD, STORE_SHARE, RayWorkers, parse
from qpc.compiler import captured, decide, finish
from qpc.errors import ClusterError, QuantizerError, SettingsError, UsageError
from qpc.integrations.streamed import Stream
from qpc.options import Options
from qpc.passes.packing import Order, Parcel, excess_kurtosis, pack
from qpc.progress import Progress, silent
from qpc.quant.scalar import ScalarQuantizer
from tests import interrupted
from tests.families import copied, decoder
from tests.test_streaming import again, given, sensitivities

ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python")

BUDGET = interrupted.BUDGET
STORE_BYTES = 100 << 20
CPU = torch.device("cpu")


@dataclass
class Machines:
    """Two nodes of one core each, of which the second may be lost."""

    cluster: Any
    second: Any

    def lose(self) -> None:
        """Kill a node, with all its processes."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def kill_a_worker(self) -> Timer:
        """Halt a process that runs tasks, so that it surely has one, and kill it a little later."""
        processes = psutil.Process().children(recursive=True)
        worker = next(process for process in processes if " ".join(process.cmdline()).startswith(("ray::IDLE", "ray::_evaluate")))
        worker.suspend()
        kill = Timer(1, worker.kill)
        kill.start()
        return kill


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decoder("Llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def directory(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with sensitivities."""
    path = tmp_path_factory.mktemp("ray") / "model"
    model.save_pretrained(path, max_shard_size="100KB")
    (path / "sensitivities.json").write_text(sensitivities(model).to_json())
    return path


def at(task: str, done: int, event: Any) -> Progress:
    """A progress at which something happens."""

    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (task, done):
            event()

    return progress


def interrupt() -> None:
    raise KeyboardInterrupt


def test_without_a_cluster_the_command_says_how_to_start_one(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    for address in ("auto", "127.0.0.1:9"):
        with pytest.raises(SystemExit) as caught:
            main(["compile", str(tiny_directory), "-o", str(tmp_path / "out"), "--bits", "3", "--ray", address])
        assert caught.value.code == 2
        assert "nothing answers at 127.0.0.1:9" in (told := capsys.readouterr().err) and "ray start --head" in told


@pytest.mark.parametrize("address", ["", 5, "nowhere"])
def test_what_is_no_address_is_refused(address: object) -> None:
    with pytest.raises(SettingsError, match="ray"):
        parse(address)


def test_without_ray_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install 'qpc\[ray\]'"):
        qpc.compile(nn.Linear(64, 64), 3, ray="auto")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    found = Machines(cluster, cluster.add_node(**node))
    handler = signal.getsignal(signal.SIGTERM)
    parse(cluster.address)
    assert signal.getsignal(signal.SIGTERM) == handler, "how a command ends stays as it was"
    yield found
    ray.shutdown()
    cluster.shutdown()


def test_a_worker_that_is_killed_changes_no_byte(machines: Machines, model: nn.Module, tmp_path: Path) -> None:
    """Calibrated, in memory, with feedback between rows and packed embeddings."""
    given: dict[str, Any] = {"effort": "fast", "embeddings": 3, "calibration": torch.arange(400).reshape(20, 20) % 60, "row_feedback": "on"}
    local, spread = (Options.of(BUDGET, **given, ray=address) for address in (None, machines.cluster.address))
    program = captured(model, local)
    killed: list[Timer] = []
    kill = at("quantize", 1, lambda: killed.append(machines.kill_a_worker()))
    for options, name, progress in ((local, "local", silent), (spread, "spread", kill)):
        made = decide(copied(program), options, sensitivities=sensitivities(model), progress=progress)
        qpc.save(finish(made, options), tmp_path / name)
    killed[0].join()
    assert interrupted.equal(tmp_path / "local", tmp_path / "spread")


@pytest.mark.parametrize(
    ("count", "shape", "most"), [(30, (64, 64), AHEAD * 2), (8, (1200, 4000), int(STORE_SHARE * STORE_BYTES) // 19_200_000)]
)
def test_items_wait_until_there_is_room(count: int, shape: tuple[int, ...], most: int, machines: Machines) -> None:
    """No more tasks are under way than workers can soon begin, and their tensors leave half of the object store free."""
    sent, ahead, keys = 0, [], []

    def items() -> Iterator[tuple[int, torch.Tensor]]:
        nonlocal sent
        for number in range(count):
            sent += 1
            ahead.append(sent - len(keys))
            yield number, torch.randn(shape)

    for key, kurtosis in RayWorkers().on(CPU)(excess_kurtosis, items()):
        assert abs(kurtosis) < 1
        keys.append(key)
    assert sorted(keys) == list(range(count))
    assert max(ahead) == most + 1, "one more is made, and waits here"


def test_workers_end_with_what_is_left_under_way(machines: Machines, tmp_path: Path) -> None:
    """Interrupted in the midst of an import, they would go on with half a module."""
    left = RayWorkers().on(CPU)(nap, [(0, tmp_path), (1, None)])
    assert next(left) == (1, None)
    for _ in range(600):
        if list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    (note,) = tmp_path.iterdir()
    worker = psutil.Process(int(note.name))
    left.close()  # type: ignore[attr-defined]
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert not alive


def nap(directory: Path | None) -> None:
    """What takes long, and leaves the number of its process, if it is given a place to note that."""
    if directory is not None:
        (directory / str(os.getpid())).touch()
        time.sleep(600)


def test_errors_of_a_task_are_those_of_the_function(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = RayWorkers().on(CPU)
    order = Order(ScalarQuantizer(4), (Parcel(torch.full((64, 64), torch.nan), False, None),))
    with pytest.raises(QuantizerError, match="NaN or infinity"):
        list(workers(pack, [("a", order)]))
    monkeypatch.setattr(on_ray, "RETRIES", 0)
    with pytest.raises(ClusterError, match="lost its worker, at attempt 1 too"):
        list(workers(os._exit, [("a", 1)]))


def test_workers_without_the_device_or_with_other_versions_are_refused(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options.of(BUDGET, ray=machines.cluster.address)
    assert packing_device(None, options) == CPU and packing_device("cuda:1", options).type == "cuda"
    with pytest.raises(UsageError, match="--device abacus cannot be used"):
        packing_device("abacus", options)
    for device, reason in (("cuda", "has a GPU"), ("meta", "over CPUs or GPUs")):
        with pytest.raises(SettingsError, match=reason):
            options.on(torch.device(device))
    monkeypatch.setattr(conditions, "_versions", lambda kind: (("torch", "1.0"),))
    with pytest.raises(SettingsError, match=r"a worker on .* has torch 2\.\S+ instead of 1\.0; install the same"):
        RayWorkers().on(CPU)


def test_streaming_goes_on_after_an_interruption_and_the_loss_of_a_node(machines: Machines, directory: Path, tmp_path: Path) -> None:
    """With error feedback, whose moments are taken here, and factored there."""
    tokens = torch.arange(1024).reshape(32, 32) % 60
    local, spread = (Options.of(BUDGET, effort="fast", calibration=tokens, ray=address) for address in (None, machines.cluster.address))
    plan = Stream.of(directory, local, given(directory))
    over_cluster = replace(plan, decisions=replace(plan.decisions, options=spread.on(CPU)))
    again(plan).carry_out(tmp_path / "local", shard_bytes=interrupted.SHARD_BYTES)
    with pytest.raises(KeyboardInterrupt):
        again(over_cluster).carry_out(tmp_path / "spread", shard_bytes=interrupted.SHARD_BYTES, progress=at("quantize", 2, interrupt))
    again(over_cluster).carry_out(tmp_path / "spread", shard_bytes=interrupted.SHARD_BYTES, progress=at("quantize", 3, machines.lose))
    assert interrupted.equal(tmp_path / "local", tmp_path / "spread")
    assert qpc.verify(tmp_path / "spread").intact
