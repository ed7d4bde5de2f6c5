"""The processes that share a model: how many there are, on which device each is, and that all of them succeed or none does."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qpc.errors import CheckpointError, SettingsError

T = TypeVar("T")

AUTO = "auto"
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process by environment variables."""


def join(tp: int | str | DeviceMesh, device: torch.device | str) -> tuple[DeviceMesh, torch.device] | None:
    """The processes that are to share a model, and the device of this one; None if it has the model for itself.

    tp: how many there are, "auto" for as many as were started, or a mesh of one axis. Without a mesh the process group is made as
    torchrun's environment says, unless there is one. device: "cuda" is the GPU of this process.
    Raises `SettingsError` if these processes were not started, or lack devices.
    """
    device = torch.device(device)
    if isinstance(tp, DeviceMesh):
        return _of_mesh(tp, device)
    if isinstance(tp, str) and tp != AUTO:
        raise SettingsError(f"unknown {tp=}; give the number of processes, {AUTO!r}, or a DeviceMesh")
    if not isinstance(tp, str) and (isinstance(tp, bool) or not isinstance(tp, int) or tp < 1):
        raise SettingsError(f"{tp=} must be at least 1 process, {AUTO!r}, or a DeviceMesh")
    started = _started()
    wanted = started if isinstance(tp, str) else tp
    if wanted == 1:
        return None
    if started == 1:
        raise SettingsError(f"{tp=} needs {wanted} processes, this is one; start them with torchrun --nproc-per-node {wanted}")
    if wanted != started:
        raise SettingsError(
            f"{tp=} is not the number of processes, which is {started}; say {AUTO!r}, or give a DeviceMesh of those that share"
        )
    device = _own(device)
    return init_device_mesh(device.type, (wanted,), mesh_dim_names=("tp",)), device


def all_or_none(mesh: DeviceMesh, device: torch.device, work: Callable[[], tuple[T, int]]) -> T:
    """Do some work in every process of a mesh, and fail in all of them if it fails in one: nobody is left waiting for the others.

    work: returns a result, and a number below 2^63 that must be the same everywhere.
    Raises what `work` raises, and `CheckpointError` in the other processes, or if the numbers differ.
    """
    result: T | None = None
    problem: Exception | None = None
    number = 0
    try:
        result, number = work()
    except Exception as error:
        problem = error
    state = torch.tensor([problem is not None, number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(state, dist.ReduceOp.MAX, group=mesh.get_group())
    failed, most, least = state.tolist()
    if problem is not None:
        raise problem
    if failed:
        raise CheckpointError("another process could not load its part of the model; its own message says why")
    if most != -least:
        raise CheckpointError("the processes read different checkpoints; give all of them the same one")
    assert result is not None
    return result


def _started() -> int:
    """Processes of the process group, or of that which the environment describes."""
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in RENDEZVOUS) else 1


def _of_mesh(mesh: DeviceMesh, device: torch.device) -> tuple[DeviceMesh, torch.device] | None:
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names or ()
        raise SettingsError(f"the mesh has {mesh.ndim} axes {names}, required one; give that of tensor parallelism, as in mesh['tp']")
    if mesh.device_type != device.type:
        raise SettingsError(f"the mesh is of {mesh.device_type!r} and the device {device.type!r}; load with device={mesh.device_type!r}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return (mesh, device) if mesh.size() > 1 else None


def _own(device: torch.device) -> torch.device:
    """The device of this process."""
    if device.type != "cuda":
        return device
    if device.index is None:
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise SettingsError(f"{here} processes of this machine need a GPU each, it has {gpus}; start as many as it has")
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % gpus)))
    torch.cuda.set_device(device)
    return device
