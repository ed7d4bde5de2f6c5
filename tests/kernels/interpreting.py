"""Triton's interpreter without what it does in vain: more than half of its time."""

from dataclasses import replace
from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter


def without_waste() -> None:
    """Compute no test of overflows, whose outcome only a debugging interpreter reads; patch the language once, not at every call."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
