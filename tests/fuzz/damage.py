"""Damage to values, files and directories. All of it is drawn from one `random.Random`, so a number says which."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Value = Any
"""What `json.loads` makes."""

ODD: tuple[Callable[[Random], Value], ...] = (
    lambda draw: None,
    lambda draw: draw.choice([True, False]),
    lambda draw: draw.choice([0, -1, 1, 2, 63, 64, 2**31, 2**63, -(2**63), 10**30]),
    lambda draw: draw.choice([0.5, -0.0, 1e308, -1e-308, 5e-324, float("nan"), float("inf"), float("-inf")]),
    lambda draw: draw.choice(["", "0", "qpc", "\x00", "\ud800", "..", "../../etc/passwd", "/dev/zero", "a" * 5000, "ÿ𝟛"]),
    lambda draw: draw.choice([[], {}, [[]], {"": None}, [0] * 300, [None, "x", 1.5]]),
    lambda draw: nested(draw.choice([5, 100])),
)
"""Values that stand where others belong."""

DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "X")


def nested(depth: int) -> Value:
    """A list in a list in a list."""
    found: Value = []
    for _ in range(depth):
        found = [found]
    return found


def places(value: Value) -> Iterator[tuple[Value, Value]]:
    """Every container inside a value, with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def damage_value(draw: Random, value: Value) -> Value:
    """A copy in which one place, or a few, hold something else, or nothing, or more than one thing."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        found = list(places(copy))
        if not found:
            return draw.choice(ODD)(draw)
        owner, key = draw.choice(found)
        match draw.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[draw.choice(["", "x", str(key) + " ", str(key).upper(), "../" + str(key)])] = owner.pop(key)
            case 2:
                other_owner, other = draw.choice(found)
                if other in other_owner if isinstance(other_owner, dict) else other < len(other_owner):
                    owner[key] = json.loads(json.dumps(other_owner[other]))
            case 3 if isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
                owner[key] = draw.choice([owner[key] + 1, -owner[key], owner[key] * 2, str(owner[key]), float(owner[key])])
            case _:
                owner[key] = draw.choice(ODD)(draw)
    return copy


def text_of(value: Value) -> bytes:
    """As JSON, also where Python's own reader would refuse it."""
    return json.dumps(value).encode()


def damage_bytes(draw: Random, content: bytes) -> bytes:
    """Cut short, with bits flipped, with bytes put in, left out, repeated or made zero."""
    held = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(held) + 1)
        size = draw.choice((1, 2, 8, 64))
        match draw.randrange(6):
            case 0:
                del held[at:]
            case 1 if at < len(held):
                held[at] ^= 1 << draw.randrange(8)
            case 2:
                held[at:at] = draw.randbytes(size)
            case 3:
                del held[at : at + size]
            case 4:
                held[at:at] = held[:size]
            case _:
                held[at : at + size] = bytes(len(held[at : at + size]))
    return bytes(held)


def damage_tensors(draw: Random, content: bytes) -> bytes:
    """A file of safetensors with another header: other names, dtypes, shapes and offsets, another length, or bytes that are no JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    match draw.randrange(6):
        case 0:
            header[draw.choice(names)]["dtype"] = draw.choice(DTYPES)
        case 1:
            shape = header[draw.choice(names)]["shape"]
            shape.insert(draw.randrange(len(shape) + 1), draw.choice([0, 1, 2, 2**40, 2**63 - 1]))
        case 2:
            header[draw.choice(names)]["data_offsets"] = [draw.choice([0, 1, 2**62, len(body)]), draw.choice([0, 7, 2**63, len(body)])]
        case 3:
            one, other = draw.choice(names), draw.choice(names)
            header[one], header[other] = header[other], header[one]
        case 4:
            header = damage_value(draw, header)
        case _:
            return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 10**8 + 1, 2**63 - 1, 2**64 - 1])) + content[8:]
    text = text_of(header)
    return struct.pack("<Q", len(text)) + text + body


def damage_file(draw: Random, path: Path, elsewhere: Path) -> None:
    """Something else in the place of a file: nothing, a directory, a pipe, a link in a circle, to nowhere, or to a file out of the way."""
    path.unlink()
    match draw.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/nowhere/at/all")
        case 4:
            path.symlink_to(elsewhere)
        case _:
            pass
