"""The texts by which programs leave sums for each other, run instruction by instruction for one thread."""

import re
from collections.abc import Callable

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

from qpc.kernels.fused_ptx import poll, poll_constraints, polled, publish, publish_constraints

FREE = 0xFFFFFFFF
STRIDE = 4096
ADDRESS = 1 << 20


def run(text: str, given: dict[int, int], read: Callable[[int], int], write: Callable[[int, int], None]) -> dict[str, int]:
    """The registers in the end. given: arguments by their number."""
    body = re.sub(r"\.reg [^;]*;", "", text[1:-1])
    steps = [each.strip() for each in body.split(";") if each.strip()]
    values: dict[str, int] = {f"${number}": value for number, value in given.items()}

    def value(operand: str) -> int:
        return values[operand] if operand in values else int(operand, 0)

    at = 0
    for _ in range(10_000):
        if at == len(steps):
            return values
        line = steps[at].removeprefix("AGAIN: ")
        at += 1
        guard, line = re.match(r"(?:@(\w+) )?(.*)", line).groups()  # type: ignore[union-attr]
        if guard and not values[guard]:
            continue
        name, rest = line.split(" ", 1)
        operands = re.findall(r"[$\w]+", rest)
        match name.split("."):
            case ["bra", *_]:
                at = next(index for index, each in enumerate(steps) if each.startswith("AGAIN: "))
            case ["ld", *_, type_]:
                assert type_ == "b32" and value(operands[-1]) % (4 * (len(operands) - 1)) == 0, "vectors are aligned"
                for index, each in enumerate(operands[:-1]):
                    values[each] = read(value(operands[-1]) + 4 * index)
            case ["st", *_]:
                assert value(operands[0]) % (4 * (len(operands) - 1)) == 0, "vectors are aligned"
                for index, each in enumerate(operands[1:]):
                    write(value(operands[0]) + 4 * index, value(each))
            case ["setp", "gt", "and", _]:
                values[operands[0]] = int(value(operands[1]) > value(operands[2]) and value(operands[3]))
            case ["setp", "ne", _]:
                values[operands[0]] = int(value(operands[1]) != value(operands[2]))
            case ["setp", "eq", _]:
                values[operands[0]] = int(value(operands[1]) == value(operands[2]))
            case ["max", _]:
                values[operands[0]] = max(value(operands[1]), value(operands[2]))
            case ["add", _]:
                values[operands[0]] = value(operands[1]) + value(operands[2])
            case ["vote", *_]:
                values[operands[0]] = value(operands[1])
            case ["mov", _]:
                values[operands[0]] = value(operands[1])
            case _:
                raise AssertionError(line)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("elements", [1, 2, 4, 8])
@pytest.mark.parametrize("there", [0, 1, 3, 99])
def test_waits_for_each_value_and_frees_its_place(elements: int, there: int, wide: bool) -> None:
    """The last of them comes late; nothing beyond those that are there is read."""
    count = polled(elements, True)
    used = min(there, count)
    memory = {ADDRESS + each * STRIDE + 4 * element: 100 * each + element for each in range(used) for element in range(elements)}
    expected, late, reads = dict(memory), max(memory, default=0), 0

    def read(address: int) -> int:
        nonlocal reads
        reads += address == late
        return FREE if address == late and reads < 4 else memory[address]

    first = elements * count
    arguments = [ADDRESS + 4 * element for element in range(elements)] + [1] * elements + [there] * elements + [STRIDE] * elements
    given = {first + index: each for index, each in enumerate(arguments)}
    assert len(poll_constraints(elements, count).split(",")) == first + len(arguments)
    found = run(poll(elements, count, votes=True, wide=wide), given, read, memory.__setitem__)
    for each in range(count):
        for element in range(elements):
            assert found[f"${each * elements + element}"] == expected.get(ADDRESS + each * STRIDE + 4 * element, 0)
    assert set(memory.values()) <= {FREE} and memory.keys() == expected.keys() and reads == (4 if used else 0)


@pytest.mark.parametrize("elements", [1, 2, 4, 8])
def test_leaves_every_sum_in_its_place_or_none(elements: int) -> None:
    for there in (0, 1):
        memory: dict[int, int] = {}
        arguments = [ADDRESS + 4 * element for element in range(elements)] + [there] * elements + list(range(7, 7 + elements))
        assert len(publish_constraints(elements).split(",")) == elements + len(arguments)
        given = {elements + index: each for index, each in enumerate(arguments)}
        run(publish(elements), given, memory.__getitem__, memory.__setitem__)
        assert memory == ({ADDRESS + 4 * element: 7 + element for element in range(elements)} if there else {})
