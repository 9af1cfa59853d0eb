"""One runner an engine, and what the runners and the programs share.

A runner is started as ``python -m engines.<name> <folder>`` from the folder
``benchmarks``, with the Python of the engine's own environment; ``fedweight`` is
found in the checkout where it is not installed.
"""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]

# At the end, so that an installed package goes first.
sys.path.append(str(BENCHMARKS.parent))
