"""Work that is repeated on batches of one shape: the same kernels again, by one launch.

A pass forward and back through a small model is thousands of kernels of microseconds each, and a GPU waits for most of them to be
launched. A CUDA graph holds all launches of a pass, so that later ones compute the same in the time of the kernels alone.

What is captured runs only when the graph is replayed, always on the same memory. So the work returns nothing, but adds to tensors that
were made before; and it never waits for the device, nor decides by what is there.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import torch
from torch import Tensor

WARM_UPS = 2
"""Batches of a shape before one is captured: the first compiles kernels and makes workspaces, the second finds them."""

MOST_GRAPHS = 8
"""Shapes that are captured; each graph takes some megabytes, while activations share one pool."""

Work = Callable[[Tensor], None]
"""What is done with a batch that is on the device."""


class Replay:
    """`replay(work, batch)` does the work, from the third batch of a shape on by a graph. Graphs are freed where the context ends.

    device: of the work; on a CPU nothing is captured. obstacle: why nothing more is captured on a GPU; None: it is.
    """

    def __init__(self, device: torch.device, obstacle: str | None = None) -> None:
        self.device, self.obstacle = device, obstacle
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: Counter[object] = Counter()
        if device.type == "cuda":
            # Warm-up and capture share a stream, for autograd and cuBLAS remember on which one they ran.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            _give_back()

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._graphs:
            self._graphs.clear()
            _give_back()

    def __call__(self, work: Work, batch: Tensor) -> None:
        """Do the work on this batch, wherever that is."""
        key = (work, batch.shape, batch.dtype)
        captures = self.device.type == "cuda" and self.obstacle is None
        if captures and self._seen[key] == WARM_UPS and len(self._graphs) < MOST_GRAPHS:
            self._capture(key, work, batch)
        self._seen[key] += 1
        if key in self._graphs:
            graph, place = self._graphs[key]
            place.copy_(batch if batch.is_cuda else batch.pin_memory(), non_blocking=True)
            graph.replay()
        elif captures:
            here = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                work(batch.to(self.device))
            here.wait_stream(self._stream)
        else:
            work(batch.to(self.device))

    def _capture(self, key: object, work: Work, batch: Tensor) -> None:
        """Make the graph, or say why there is none."""
        try:
            held = torch.cuda.memory_reserved(self.device)
            torch.cuda.empty_cache()
            took, free = held - torch.cuda.memory_reserved(self.device), torch.cuda.mem_get_info(self.device)[0]
            if free < 2 * took:  # batches of other shapes need as much beside the graph
                self.obstacle = f"of {free:,} bytes of free memory a graph would keep {took:,}"
                return
            graph, place = torch.cuda.CUDAGraph(), batch.to(self.device, copy=True)
            # The outer context gives the stream back where that of the graph fails at its end.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool=self._pool, stream=self._stream), _never_waiting():
                work(place)
        except RuntimeError as error:
            self.obstacle = f"no graph could be captured: {str(error.__context__ or error).splitlines()[0]}"
        else:
            self._graphs[key] = (graph, place)


def _give_back() -> None:
    """Give idle memory back to the device. PyTorch 2.11 raises from then on if a capture was broken."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


@contextmanager
def _never_waiting() -> Iterator[None]:
    """Raise `RuntimeError` for what would wait for the device, before it does and breaks the capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype; the work has warned before
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
