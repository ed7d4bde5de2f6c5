"""Memory in which programs of one kernel leave sums for each other. Free places hold NaNs with all bits set, before a kernel and after it.

Each stream of a device has a workspace of its own, since kernels of one stream run one after the other. CUDA graphs that were captured on
one stream share its workspace: they must not be replayed at the same time.
"""

import torch
from torch import Tensor

_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, Tensor] = {}
"""For a stream that begins with a capture, in which nothing can be filled beforehand; made by the calls before it."""
_captured: list[Tensor] = []
"""What graphs hold on to, though larger ones took its place."""


def take(size: int, device: torch.device) -> Tensor:
    """At least `size` free places, float32, for the next kernel of the current stream, which leaves them free."""
    capturing = torch.cuda.is_current_stream_capturing()
    key = device, torch.cuda.current_stream(device).cuda_stream
    found = _of_stream.get(key)
    if found is None or found.numel() < size:
        spare = _spare.get(device)
        if not capturing:
            found = _free(size, device)
        elif spare is not None and spare.numel() >= size:
            found = _spare.pop(device)
        else:
            return _free(size, device)  # the filling becomes a part of the graph
        _of_stream[key] = found
    if capturing:
        if not any(found is each for each in _captured):
            _captured.append(found)
    elif device not in _spare or _spare[device].numel() < found.numel():
        _spare[device] = _free(found.numel(), device)
    return found


def _free(size: int, device: torch.device) -> Tensor:
    """So many free places, or the next power of two."""
    with torch.inference_mode(False):
        return torch.full((1 << (size - 1).bit_length(),), -1, dtype=torch.int32, device=device).view(torch.float32)
