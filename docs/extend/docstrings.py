"""Shows the docstrings of qpc as pages: what is told of an argument ("budget: …") becomes an item of a list."""

import re

import griffe

ARGUMENT = re.compile(r"(?:[a-z]\w*, )*[a-z]\w*: ")
"""How a line begins that tells of an argument, or of several."""


class Arguments(griffe.Extension):
    """Makes lists of Markdown out of the lines that tell of arguments."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The text, in which lines of arguments, and of what a function raises or returns, stand on their own."""
    lines: list[str] = []
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        if found is not None:
            before = lines and not lines[-1].startswith(("- ", "    "))
            lines += [""] * bool(before) + [f"- **{found[0].removesuffix(': ')}**: {line[found.end() :]}"]
        elif line.startswith(("Raises ", "Returns ")):
            lines += ["", line]
        else:
            lines.append(line)
    return "\n".join(lines)
