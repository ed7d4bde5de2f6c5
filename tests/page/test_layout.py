"""Boxes do not touch, arrows lead down from box to box, and all of it is in the picture."""

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from qpc.ir.sketch import Box, Role, Sketch
from qpc.page.layout import Picture, layout
from tests.page.checkpoints import source


@st.composite
def sketches(draw: st.DrawFn) -> Sketch:
    """Random ones in which every box but the first reads an earlier one; some linears are in groups."""
    count = draw(st.integers(1, 14))
    arrows = {(draw(st.integers(0, target - 1)), target) for target in range(1, count)}
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] < pair[1])
    if count > 1:
        arrows |= draw(st.sets(pairs, max_size=8))
    groups = draw(st.lists(st.sampled_from([(), ("a", "b"), ("c", "d", "e")]), min_size=count, max_size=count))
    labels = draw(st.lists(st.text("abc_", min_size=1, max_size=30), min_size=count, max_size=count))
    boxes = [Box(Role.LINEAR if group else Role.OTHER, label, label, group) for label, group in zip(labels, groups, strict=True)]
    return Sketch(tuple(boxes), tuple(sorted(arrows)))


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def check(sketch: Sketch, picture: Picture) -> None:
    assert [box.box for box in picture.boxes] == list(sketch.boxes)
    for a, b in pairwise(sorted(picture.boxes, key=lambda box: (box.y, box.x))):
        assert a.y + a.height / 2 < b.y - b.height / 2 or a.y == b.y or a.x + a.width / 2 <= b.x - b.width / 2
        assert a.y != b.y or a.x + a.width / 2 < b.x - b.width / 2
    for source_, target in sketch.arrows:
        assert picture.boxes[source_].y < picture.boxes[target].y
    for box in picture.boxes:
        assert box.width / 2 <= box.x <= picture.width - box.width / 2
        assert box.height / 2 <= box.y <= picture.height - box.height / 2
    for path in picture.arrows:
        assert all(0 <= x <= picture.width and 0 <= y <= picture.height for x, y in points(path))
    assert len(picture.arrows) <= len(sketch.arrows)


@given(sketches())
def test_any_sketch_has_a_picture(sketch: Sketch) -> None:
    check(sketch, layout(sketch))
    assert not layout(sketch, framed=False).frames


def test_frames_hold_their_linears() -> None:
    block = source("llama").report.block
    assert block is not None
    picture = layout(block.after)
    check(block.after, picture)
    groups = {box.group for box in block.after.boxes if len(box.group) > 1}
    assert len(picture.frames) == len(groups) > 0
    for group in groups:
        members = [box for box in picture.boxes if box.box.group == group]
        assert len(members) == len(group)
        assert any(
            all(
                frame.left < box.x - box.width / 2
                and box.x + box.width / 2 < frame.left + frame.width
                and frame.top < box.y < frame.top + frame.height
                for box in members
            )
            for frame in picture.frames
        )


def test_a_residual_goes_round() -> None:
    chain = Sketch(tuple(Box(Role.OTHER, str(number), str(number)) for number in range(6)), (*((n, n + 1) for n in range(5)), (0, 5)))
    picture = layout(chain)
    longest = max(picture.arrows, key=len)
    assert max(x for x, _ in points(longest)) > max(box.x + box.width / 2 for box in picture.boxes)
