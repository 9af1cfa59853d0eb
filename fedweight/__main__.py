"""``python -m fedweight`` is the command line."""

from .cli import console

console()
