"""PyTorch, where a Flower app that has no use for it comes by, too.

It is imported when something of it is asked for: that takes a second in every process.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from .extras import Imported

if TYPE_CHECKING:
    import torch as torch
else:
    torch = Imported("torch")


def is_imported() -> bool:
    """Tell whether this process has imported PyTorch."""
    return "torch" in sys.modules
