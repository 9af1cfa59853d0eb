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


def shown(value: object, limit: int = 60) -> str:
    """Return a value as a message shows it.

    Examples
    --------
    >>> shown([1.5, "a"]), shown(10**5000)
    ("[1.5, 'a']", 'a int')
    """
    try:
        text = repr(value)
    except Exception:  # An integer of too many digits, and whatever else may come.
        text = f"a {type(value).__name__}"
    return plain(text, limit)
