"""`qpc.compile`: the compiler, and for models of transformers what their own `save_pretrained` needs."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import nn

from qpc import compiler
from qpc.integrations import transformers as hf

P = ParamSpec("P")


def adopting(function: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """The function, whose results are adopted by transformers if they are models of it."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        return adopted(function(*args, **kwargs))

    return wrapped


def adopted(model: nn.Module) -> nn.Module:
    """A compiled model, which its own `save_pretrained` can save if it is one of transformers."""
    if hf.is_pretrained(model):
        from qpc.integrations.hf_quantizer import adopt

        adopt(model)
    return model


compile = adopting(compiler.compile)
