"""A stand-in for torchvision where it does not load.

Some peers import torchvision for data sets and models that are not used here. Its
usual build does not load beside a PyTorch without CUDA; then empty classes take the
place of everything in it.
"""

import sys
from types import ModuleType
from typing import Any, ClassVar

MODULES = ("", ".datasets", ".datasets.utils", ".models", ".transforms")


class _Empty(ModuleType):
    __path__: ClassVar[list[str]] = []  # As a package has it.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def ensure_torchvision() -> None:
    """Import torchvision, or put the stand-in in its place."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in MODULES:
            sys.modules["torchvision" + name] = _Empty("torchvision" + name)
        for name in MODULES[1:]:
            parent, _, child = ("torchvision" + name).rpartition(".")
            setattr(sys.modules[parent], child, sys.modules["torchvision" + name])
