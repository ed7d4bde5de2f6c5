"""Layout: places for the boxes of a sketch and ways for its arrows, in layers from top to bottom (Sugiyama, Tagawa and Toda, 1981).

A box stands one layer below the lowest that it reads. Arrows over several layers, such as residuals, go round the right side on lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import networkx as nx  # type: ignore[import-untyped]

from qpc.ir.sketch import Box, Role, Sketch

HEIGHTS = {Role.INPUT: 22.0, Role.OUTPUT: 22.0, Role.LINEAR: 44.0, Role.TRANSFORM: 24.0, Role.OTHER: 28.0}
"""Pixels."""
LETTER, PADDING = 6.9, 22.0
LINEAR_WIDTH, LEAST_WIDTH = 104.0, 56.0
ROW_GAP, COLUMN_GAP, LANE_GAP, MARGIN = 26.0, 18.0, 14.0, 14.0
GROUP_PADDING, CORNER, PORT_GAP = 7.0, 8.0, 16.0
DIRECT_SPAN = 2
"""An arrow over at most so many layers goes straight."""


@dataclass(frozen=True)
class Placed:
    """A box, its number in the sketch, and its place in pixels: x and y of its centre."""

    box: Box
    number: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Frame:
    """Round the linears that one kernel runs: left, top, width and height."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Picture:
    """A sketch in pixels. arrows: paths of SVG."""

    width: float
    height: float
    boxes: tuple[Placed, ...]
    frames: tuple[Frame, ...]
    arrows: tuple[str, ...]


def layout(sketch: Sketch, framed: bool = True) -> Picture:
    """Place a sketch. framed: with frames round the linears that one kernel runs."""
    layers = _layers(sketch)
    placed = _place(sketch, layers)
    rank = {number: index for index, layer in enumerate(layers) for number in layer}
    shown = _frames(sketch, placed) if framed else {}
    arrows, right = _arrows(sketch, placed, rank, shown)
    boxes = tuple(placed[number] for number in sorted(placed))
    edges = [(box.x - box.width / 2, box.x + box.width / 2) for box in boxes] or [(0.0, 0.0)]
    shift = MARGIN + GROUP_PADDING - min(left for left, _ in edges)
    right = max(right, *(end for _, end in edges)) + shift + MARGIN + GROUP_PADDING
    bottom = max((box.y + box.height / 2 for box in boxes), default=0.0) + MARGIN
    return Picture(
        width=right,
        height=bottom,
        boxes=tuple(Placed(box.box, box.number, box.x + shift, box.y, box.width, box.height) for box in boxes),
        frames=tuple(Frame(frame.left + shift, frame.top, frame.width, frame.height) for frame in dict.fromkeys(shown.values())),
        arrows=tuple(path.shifted(shift) for path in arrows),
    )


def width(box: Box) -> float:
    """Of a box with its label."""
    return max(LINEAR_WIDTH if box.role is Role.LINEAR else LEAST_WIDTH, len(box.label) * LETTER + PADDING)


def _layers(sketch: Sketch) -> list[list[int]]:
    """Numbers of the boxes of each layer, the members of a group side by side."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(sketch.boxes)))
    graph.add_edges_from(sketch.arrows)
    first = {name: number for number, box in reversed(list(enumerate(sketch.boxes))) for name in box.group[:1]}
    return [
        sorted(layer, key=lambda number: (first.get(next(iter(sketch.boxes[number].group), ""), number), number))
        for layer in nx.topological_generations(graph)
    ]


def _place(sketch: Sketch, layers: Sequence[Sequence[int]]) -> dict[int, Placed]:
    """Each box below the middle of what it reads, as far as its neighbours leave room, and each layer as a whole as well."""
    read: dict[int, list[int]] = {}
    for source, target in sketch.arrows:
        read.setdefault(target, []).append(source)
    placed: dict[int, Placed] = {}
    top = MARGIN
    for layer in layers:
        wanted = {number: _mean([placed[source].x for source in read.get(number, [])]) for number in layer}
        order = sorted(layer, key=lambda number: wanted[number])
        height = max(HEIGHTS[sketch.boxes[number].role] for number in layer)
        at: list[float] = []
        for number in order:
            left = (
                at[-1] + (width(sketch.boxes[order[len(at) - 1]]) + width(sketch.boxes[number])) / 2 + COLUMN_GAP if at else wanted[number]
            )
            at.append(max(left, wanted[number]))
        drift = _mean([x - wanted[number] for x, number in zip(at, order, strict=True)])
        for x, number in zip(at, order, strict=True):
            box = sketch.boxes[number]
            placed[number] = Placed(box, number, x - drift, top + height / 2, width(box), HEIGHTS[box.role])
        top += height + ROW_GAP
    return placed


def _frames(sketch: Sketch, placed: dict[int, Placed]) -> dict[int, Frame]:
    """The frame of each box that has company in its layer, by number."""
    found: dict[int, Frame] = {}
    members = sorted((box for box in placed.values() if len(box.box.group) > 1), key=lambda box: (box.box.group, box.y, box.x))
    for _, run in groupby(members, key=lambda box: (box.box.group, box.y)):
        boxes = list(run)
        left = min(box.x - box.width / 2 for box in boxes) - GROUP_PADDING
        right = max(box.x + box.width / 2 for box in boxes) + GROUP_PADDING
        top, height = boxes[0].y - boxes[0].height / 2 - GROUP_PADDING, boxes[0].height + 2 * GROUP_PADDING
        found |= {box.number: Frame(left, top, right - left, height) for box in boxes}
    return found


@dataclass(frozen=True)
class _Path:
    """Commands of SVG with their x coordinates apart, so that they can be moved."""

    steps: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    def shifted(self, by: float) -> str:
        return " ".join(letter + " ".join(f"{x + by:.1f},{y:.1f}" for x, y in points) for letter, points in self.steps)


def _arrows(sketch: Sketch, placed: dict[int, Placed], rank: dict[int, int], frames: dict[int, Frame]) -> tuple[list[_Path], float]:
    """The ways of all arrows, and how far right they go."""
    far = [arrow for arrow in sketch.arrows if rank[arrow[1]] - rank[arrow[0]] > DIRECT_SPAN]
    near = [arrow for arrow in sketch.arrows if arrow not in far]
    paths: dict[_Path, None] = {}
    for target in dict.fromkeys(target for _, target in near):
        sources = sorted((source for source, other in near if other == target), key=lambda source: placed[source].x)
        for index, source in enumerate(sources):
            port = (index - (len(sources) - 1) / 2) * min(PORT_GAP, placed[target].width / (len(sources) + 1))
            paths[_straight(placed[source], placed[target], frames.get(target), port)] = None
    lanes: list[int] = []
    right = max((box.x + box.width / 2 for box in placed.values()), default=0.0)
    for source, target in far:
        lane = next((index for index, until in enumerate(lanes) if until <= rank[source]), len(lanes))
        lanes[lane : lane + 1] = [rank[target]]
        paths[_round(placed[source], placed[target], right + GROUP_PADDING + (lane + 1) * LANE_GAP)] = None
    return list(paths), right + GROUP_PADDING + len(lanes) * LANE_GAP


def _straight(source: Placed, target: Placed, frame: Frame | None, port: float) -> _Path:
    """Down from the source, then over to the target or its frame within the last gap."""
    x, y = (target.x + port, target.y - target.height / 2) if frame is None else (frame.left + frame.width / 2, frame.top)
    start = source.y + source.height / 2
    bend = max(start, target.y - target.height / 2 - ROW_GAP)
    middle = (bend + y) / 2
    return _Path((("M", ((source.x, start),)), ("L", ((source.x, bend),)), ("C", ((source.x, middle), (x, middle), (x, y)))))


def _round(source: Placed, target: Placed, lane: float) -> _Path:
    """Out of the right side of the source, down a lane, and into the right side of the target."""
    start, end = (source.x + source.width / 2, source.y), (target.x + target.width / 2, target.y)
    return _Path(
        (
            ("M", (start,)),
            ("L", ((lane - CORNER, start[1]),)),
            ("Q", ((lane, start[1]), (lane, start[1] + CORNER))),
            ("L", ((lane, end[1] - CORNER),)),
            ("Q", ((lane, end[1]), (lane - CORNER, end[1]))),
            ("L", (end,)),
        )
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
