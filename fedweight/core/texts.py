"""Texts from outside, such as names and reasons, made fit to be shown anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

NAME_LENGTH = 60  # characters of a client's name that are shown
REASON_LENGTH = 300  # and of a reason
SHOWN_LENGTH = 100  # and of a value in a message
TRACEBACK_LENGTH = 20_000  # of a reason with its traceback, which is kept

# Joiners that scripts and emojis need; every other invisible character is written out.
_JOINERS = "\u200c\u200d"

# What begins a formula in a spreadsheet, in either width, unless it is a number.
_FORMULA = tuple("=+-@＝＋－＠")  # noqa: RUF001
_NUMBER = re.compile(r"[+-]?(\d[\d.,]*(e[+-]?\d+)?|inf|nan)", re.IGNORECASE | re.ASCII)


def plain(text: object, limit: int = REASON_LENGTH) -> str:
    r"""Return a text from outside as one harmless line.

    It can be printed on a terminal, written to a CSV file that a spreadsheet opens,
    and drawn. (In HTML it still has to be escaped, as every text has.) What is
    harmless already stays as it is, so it does not matter how often it is done.

    Parameters
    ----------
    text : object
        A name, a reason, a label; anything else as ``str`` gives it.
    limit : int
        The most characters of the result, 2 or more; a longer one ends with ``…``.

    Returns
    -------
    str
        White space has become single spaces. Control characters, marks that change
        the direction of writing and other invisible characters are written out
        (``\x1b``). What a spreadsheet would take for a formula begins with ``'``.

    Examples
    --------
    >>> plain("site A\n\x1b[31mred")
    'site A \\x1b[31mred'
    >>> plain("=HYPERLINK(A1)"), plain("-0.5")
    ("'=HYPERLINK(A1)", '-0.5')
    >>> plain("a" * 5000, limit=5)
    'aaaa…'
    """
    # However long it is, only its beginning is looked at.
    whole = str(text).strip()
    line = _visible(" ".join(whole[: 16 * limit].split()))
    if line.startswith(_FORMULA) and not _NUMBER.fullmatch(line):
        line = f"'{line}"
    if len(line) <= limit and len(whole) <= 16 * limit:
        return line
    return f"{line[: limit - 1]}…"


def shown(value: object, limit: int = SHOWN_LENGTH) -> str:
    """Return a value as a message shows it: on one line, shortened if it is long.

    Examples
    --------
    >>> shown([1.5, "a"]), shown(10**5000)
    ("[1.5, 'a']", 'a value of type int that cannot be shown')
    """
    try:
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            value = value.item()  # type: ignore[attr-defined]  # 3, not np.int64(3)
        text = repr(value)
    except Exception:  # Too many digits, too deep, or somebody's own __repr__.
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return plain(text, limit)


def plain_lines(text: str, limit: int) -> str:
    r"""Return a text of several lines, such as a traceback, harmless on a terminal.

    Examples
    --------
    >>> plain_lines("Traceback:\r\n  File \x07", limit=100)
    'Traceback:\n  File \\x07'
    """
    lines = text.strip("\n")[:limit].expandtabs(4).splitlines()
    return "\n".join(_visible(line.rstrip()) for line in lines)


def _visible(line: str) -> str:
    if line.isprintable():
        return line
    return "".join(
        char
        if char.isprintable() or char in _JOINERS
        else char.encode("unicode_escape").decode("ascii")
        for char in line
    )


def cause(reason: str) -> str:
    r"""Return what went wrong, as one line, without whose fault it was.

    Clients that failed alike have the same cause, whatever their numbers.

    Examples
    --------
    >>> cause("client 3, train: ValueError: no data\nTraceback: ...")
    'train: ValueError: no data'
    """
    return plain(without_client(reason.strip().split("\n", 1)[0]))


def without_numbers(reason: str) -> str:
    """Return a reason that is the same for all that differ in their numbers only.

    Examples
    --------
    >>> without_numbers("its update has norm 5.1, above 2")
    'its update has norm 0, above 0'
    """
    return _NUMBERS.sub("0", reason)


_NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.ASCII)


def one_of(reasons: Sequence[str]) -> str:
    """Return the first of several reasons, and whether others differ from it.

    Examples
    --------
    >>> one_of(["too long: 5.1", "too long: 7"]), one_of(["no power", "no power"])
    ('too long: 5.1 (or similar)', 'no power')
    """
    return reasons[0] if len(set(reasons)) == 1 else f"{reasons[0]} (or similar)"


def without_client(reason: str) -> str:
    """Return a reason without the number of the client that gave it."""
    return _WHOSE.sub(r"\1", reason, count=1)


_WHOSE = re.compile(r"(^|: )client \d+, ", re.ASCII)


def listed(names: Iterable[object], most: int = 3) -> str:
    """Return names as a list in words, a long one shortened.

    Examples
    --------
    >>> listed(["3"]), listed(["3", "7"]), listed(["3", "7", "12", "15"])
    ('3', '3 and 7', '3, 7, 12 and 15')
    >>> listed([str(n) for n in range(12)])
    '0, 1, 2 and 9 others'
    """
    every = [str(name) for name in names]
    if len(every) > most + 1:
        every = [*every[:most], f"{len(every) - most} others"]
    return " and ".join([", ".join(every[:-1]), every[-1]] if every[1:] else every)


def in_bytes(count: float) -> str:
    """Return an amount of data as a reader takes it in.

    Examples
    --------
    >>> in_bytes(512), in_bytes(1_234_567), in_bytes(999_999)
    ('512 B', '1.23 MB', '1 MB')
    """
    count = float(f"{count:.3g}")  # Three digits of 999,999 are a million.
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count) / 3), 5)
    return f"{count / 1000**power:.3g} {'kMGTP'[power - 1]}B"


def rounds_listed(rounds: Iterable[int], most: int = 4) -> str:
    """Return the numbers of rounds in words: those in sequence as one span.

    Examples
    --------
    >>> rounds_listed([4])
    'round 4'
    >>> rounds_listed([9, 1, 2, 3, 5])
    'rounds 1 to 3, 5 and 9'
    """
    numbers = sorted(set(rounds))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    words: list[str] = []
    for span in spans:
        words += [f"{span[0]} to {span[-1]}"] if len(span) > 2 else map(str, span)
    return f"round{'s' if len(numbers) > 1 else ''} {listed(words, most)}"


def own_name(client: int, name: str) -> str:
    """Return a client's name; empty where that is only its number.

    Examples
    --------
    >>> own_name(3, "Bern"), own_name(3, "3")
    ('Bern', '')
    """
    return "" if name == str(client) else name


def clients_called(
    clients: Sequence[int], name_of: Callable[[int], str] = str, most: int = 3
) -> str:
    """Return how a message calls some clients: by number, and by name if they have one.

    Examples
    --------
    >>> clients_called([3]), clients_called([0, 1], ["Bern", "Genf"].__getitem__)
    ('client 3', 'clients 0 (Bern) and 1 (Genf)')
    """
    words = []
    for client in clients:
        name = plain(own_name(client, name_of(client)), NAME_LENGTH)
        words.append(f"{client} ({name})" if name else f"{client}")
    return f"client{'s' * (len(words) > 1)} {listed(words, most)}"
