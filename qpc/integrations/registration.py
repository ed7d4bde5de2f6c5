"""`import qpc` makes the quantization method `qpalette` known to transformers, without importing it.

transformers looks quantization methods up in tables that other packages may add to (`transformers.quantizers.auto`); it has no entry
point that would find them by itself. Where these tables are there, the method is added at once; otherwise as soon as anything imports them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = "transformers.quantizers.auto"
QUANTIZER = "qpc.integrations.hf_quantizer"
"""Adds itself to the tables when it is imported."""


def register() -> None:
    """Add the method now if the tables have been imported, else once they are."""
    if TABLES in sys.modules:
        import_module(QUANTIZER)
    elif not any(isinstance(finder, AfterTables) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterTables())


class AfterTables(MetaPathFinder):
    """Finds the module of the tables as the other finders do, and has the method added behind it."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for all modules but this one."""
        if fullname != TABLES:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if not isinstance(finder, AfterTables))
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = Adding(spec.loader)
        return spec


class Adding(Loader):
    """Loads the tables with their own loader, then adds the method."""

    def __init__(self, loader: Loader) -> None:
        """loader: that of the module."""
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader of the module does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which has its own loader again, and import what adds to it."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module(QUANTIZER)
