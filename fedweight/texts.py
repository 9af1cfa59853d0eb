"""Texts from outside, such as a client's error, made fit to be shown."""

from __future__ import annotations


def plain(text: str, limit: int = 500) -> str:
    r"""Return a text without what a terminal would obey, and not longer than a limit.

    Examples
    --------
    >>> plain("no power\x1b[2J")
    'no power?[2J'
    >>> plain("abcdef", limit=4)
    'abc…'
    """
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
