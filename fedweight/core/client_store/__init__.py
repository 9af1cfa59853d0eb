"""What simulated clients keep from round to round: rows, by the client's number.

It is read and written for many clients at once, as arrays ``[C, ...]``. Rows are only
ever appended; an index says which is a client's newest. The newest rows are in memory,
and once those are many, or a checkpoint wants them, they go to the end of a file. So a
checkpoint holds lengths, and costs what was written since the last one.
"""

from .store import MEMORY, ClientStore, is_file_name
from .table import ClientRows

__all__ = ["MEMORY", "ClientRows", "ClientStore", "is_file_name"]
