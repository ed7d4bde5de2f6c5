"""`Spread` over the workers of a Ray cluster.

A task is one item. So many are under way that every worker has one more waiting, and their tensors never take more than a share of the
object store. Ray repeats what was lost with its worker. Functions are pure, so a result is the same wherever and however often it is made.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from qpc.cluster.conditions import Conditions
from qpc.cluster.transport import Bundle, bundled, unbundled
from qpc.errors import ClusterError, QpcError, SettingsError
from qpc.safetensors_source import OnDisk
from qpc.spread import HERE, Spread

K = TypeVar("K")
A = TypeVar("A")
R = TypeVar("R")

RETRIES = 3
"""A task may lose its worker so many times; another time, and something is wrong with the task."""

AHEAD = 2
"""Tasks under way for each that can run."""

STORE_SHARE = 0.5
"""Share of the object store of this machine that the tensors of tasks under way may take."""

GPU_TOGETHER = 1 << 30
"""Bytes of weights, and of what they need, that are packed at once on a GPU: many rows keep it busy."""

REACH_S = 5.0
"""A machine that does not answer within this time is not there."""

CPU = torch.device("cpu")


def parse(address: object) -> Spread:
    """The workers that an option means: None is this process; else an address as `ray.init` takes it, such as "auto" or "10.0.0.1:6379".

    Raises `SettingsError` if Ray is not installed, or no cluster is there.
    """
    if address is None:
        return HERE
    if not isinstance(address, str) or not address:
        raise SettingsError(
            f"ray={address!r} must be the address of a cluster: 'auto' for that of this machine, 'local' for a new one, or HOST:PORT"
        )
    ray = _ray()
    if not ray.is_initialized():
        _connect(ray, address)
    return RayWorkers()


class RayWorkers:
    """The workers of the cluster that this process is connected to: each on a GPU, or on as many cores as this process has threads."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._device = device
        self._conditions = Conditions.here(device)
        self._directories: dict[Path, bool] = {}

    @property
    def together(self) -> int:
        return 0 if self._device.type == "cpu" else GPU_TOGETHER

    def on(self, device: torch.device) -> "RayWorkers":
        """Checks every node that is there now; one that comes later is checked by its first task."""
        if device.type not in ("cpu", "cuda"):
            raise SettingsError(f"work is spread over CPUs or GPUs (cuda), not over devices of type {device.type!r}")
        if not _nodes(device):
            advice = "" if device.type == "cpu" else ", or compile on a CPU (--device cpu)"
            raise SettingsError(f"no node of the Ray cluster has a {_resource(device)}, on which weights are to be packed; add one{advice}")
        workers = RayWorkers(torch.device(device.type))
        workers._ask_nodes(_adopt, workers._conditions, workers._device)
        return workers

    def usual(self) -> torch.device:
        return torch.device("cuda" if _nodes(torch.device("cuda")) else "cpu")

    def reads_to(self, device: torch.device) -> torch.device:
        return CPU

    def __call__(self, function: Callable[[A], R], items: Iterable[tuple[K, A]]) -> Iterator[tuple[K, R]]:
        tasks: _Tasks[K] = _Tasks(self._device, self._conditions)
        try:
            for key, item in items:
                bundle = bundled(item, self._sees)
                while tasks.full(bundle.nbytes):
                    yield tasks.finished()
                tasks.begin(key, function, bundle)
                while tasks.any_finished():
                    yield tasks.finished()
            while tasks.running:
                yield tasks.finished()
        finally:
            tasks.cancel()

    def _sees(self, path: Path) -> bool:
        """Whether every node sees the files of a directory as this process does."""
        directory = path.parent
        if directory not in self._directories:
            here = _looks(directory)
            self._directories[directory] = all(there == here for there in self._ask_nodes(_looks, directory))
        return self._directories[directory]

    def _ask_nodes(self, function: Callable[..., R], *arguments: object) -> list[R]:
        """What a function says on each node that has room for tasks. Raises what it raises, and `SettingsError` for a node without qpc."""
        ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked, answers = [], []
        for node in _nodes(self._device):
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(function).options(num_cpus=0, max_retries=RETRIES, scheduling_strategy=place)
            asked.append((node["NodeManagerAddress"], task.remote(*arguments)))
        for address, answer in asked:
            try:
                answers.append(ray.get(answer))
            except ray.exceptions.RayTaskError as error:
                _raise_own(error)
                raise SettingsError(f"the Ray node {address} cannot run qpc: {_last_line(error)}; install the same qpc there") from error
            except ray.exceptions.RayError as error:
                if any(node["NodeManagerAddress"] == address for node in _nodes(self._device)):
                    raise SettingsError(f"the Ray node {address} cannot run qpc: {_last_line(error)}") from error
        return answers


class _Tasks(Generic[K]):
    """Tasks under way. running: the key of each, and the bytes of its tensors."""

    def __init__(self, device: torch.device, conditions: Conditions) -> None:
        self._ray = _ray()
        self.running: dict[Any, tuple[K, int]] = {}
        self._device, self._conditions = device, conditions
        counts = [int(node["Resources"][_resource(device)]) for node in _nodes(device)]
        self._cores = 1 if device.type == "cuda" else min([conditions.threads, *counts])
        self._most = AHEAD * max(1, sum(count // self._cores for count in counts))
        own = self._ray.get_runtime_context().get_node_id()
        stores = [node["Resources"].get("object_store_memory", 0) for node in self._ray.nodes() if node["NodeID"] == own]
        self._room = STORE_SHARE * sum(stores)
        gpus = 1 if device.type == "cuda" else 0
        self._remote = self._ray.remote(_evaluate).options(num_cpus=self._cores, num_gpus=gpus, max_retries=RETRIES)

    def full(self, nbytes: int) -> bool:
        """Whether a task with so many bytes has to wait until another is finished."""
        held = sum(size for _, size in self.running.values())
        return bool(self.running) and (len(self.running) >= self._most or held + nbytes > self._room)

    def begin(self, key: K, function: Callable[..., Any], bundle: Bundle) -> None:
        """Send a task on its way."""
        self.running[self._remote.remote(self._conditions, self._device, self._cores, function, bundle)] = key, bundle.nbytes

    def any_finished(self) -> bool:
        """Whether `finished` would not wait."""
        return bool(self.running) and bool(self._ray.wait(list(self.running), timeout=0)[0])

    def finished(self) -> tuple[K, Any]:
        """Wait for a task: its key and result. Raises what it raised, and `ClusterError` if its workers died."""
        (task,), _ = self._ray.wait(list(self.running))
        key, _ = self.running.pop(task)
        try:
            return key, unbundled(self._ray.get(task), CPU)
        except self._ray.exceptions.RayTaskError as error:
            _raise_own(error)
            raise
        except self._ray.exceptions.RayError as error:
            reason = f"a task lost its worker, at attempt {RETRIES + 1} too: {_last_line(error)}"
            raise ClusterError(f"{reason}; see the logs of Ray, and whether its machines have enough memory") from error

    def cancel(self) -> None:
        """Leave what is under way, unless Ray has ended before. Workers end with it: one that is interrupted within an import goes on with
        half a module, for whoever comes next."""
        for task in self.running if self._ray.is_initialized() else ():
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(task, force=True)


def _evaluate(conditions: Conditions, device: torch.device, cores: int, function: Callable[[Any], Any], bundle: Bundle) -> Bundle:
    """A task, as a worker runs it."""
    conditions.adopt(device, cores)
    missing = next((each.path for each in bundle.tensors if isinstance(each, OnDisk) and not each.path.exists()), None)
    if missing is not None:
        raise ClusterError(f"{missing} is not there on {socket.gethostname()}, a node that came later; let all nodes see it, or none")
    return bundled(function(unbundled(bundle, device)))


def _adopt(conditions: Conditions, device: torch.device) -> None:
    conditions.adopt(device)


def _looks(directory: Path) -> list[tuple[str, int, int]]:
    """What a directory of safetensors looks like from here: names, sizes and times; nothing if it is not there."""
    with suppress(OSError):
        return [(path.name, (known := path.stat()).st_size, known.st_mtime_ns) for path in sorted(directory.glob("*.safetensors"))]
    return []


def _nodes(device: torch.device) -> list[dict[str, Any]]:
    """The nodes that are alive and have such devices."""
    return [node for node in _ray().nodes() if node["Alive"] and node["Resources"].get(_resource(device), 0) >= 1]


def _resource(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else "GPU"


def _ray() -> Any:
    """The package, which is imported at the first use. Raises `SettingsError` if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise SettingsError("spreading work over a cluster needs Ray: pip install 'qpc[ray]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect this process, until it ends or calls `ray.shutdown`. Raises `SettingsError` if there is no cluster."""
    wanted = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    host, _, port = wanted.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=REACH_S).close()
        except OSError as error:
            raise SettingsError(f"nothing answers at {wanted}: {error}; {_START}") from error
    handler = signal.getsignal(signal.SIGTERM)  # Ray takes it over
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, AssertionError, ImportError) as error:
        raise SettingsError(f"no Ray cluster can be used at {address}: {_last_line(error)}; {_START}") from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


_START = "start one by `ray start --head`, on further machines by `ray start --address HOST:6379`"


def _raise_own(error: Any) -> None:
    """Raise the error of qpc that a task ended with, if it is one."""
    if isinstance(error.cause, QpcError):
        raise error.cause from None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
