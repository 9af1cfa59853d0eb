"""Shakespeare's plays: predict the next character; each role is a natural client."""

from __future__ import annotations

import re
import string
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from ..core.errors import DataError
from ..core.options import validated
from .examples import DataSet, Examples
from .fetch import find_folder

# Token 0 stands for whatever is not in the vocabulary, and fills up short beginnings.
VOCABULARY = "\n !\"&'()*,-./0123456789:;?@" + string.ascii_letters + "[]_{}"
OTHER = 0
NUM_TOKENS = 1 + len(VOCABULARY)

SPEAKER = re.compile(r"[A-Z][^\[\]]{0,40}\.")
HEADING = re.compile(r"(act|scene)\b|[ivxlc]+\.$", re.IGNORECASE)

TEST_SHARE = 0.2

# Longer sequences are refused: each example holds as many numbers.
MOST_CHARACTERS = 10_000
Length = Annotated[int, Ge(1), Le(MOST_CHARACTERS)]

Tokens = npt.NDArray[np.int64]


@validated
def load(
    path: Path | None = None,
    *,
    sequence_length: Length = 20,
    stride: Length | None = None,
) -> DataSet:
    """Shakespeare's plays, next character after 20; about 1,080 roles are the clients.

    A role, that is a speaker of a play, with two speeches or more is a natural client,
    called by the play's file and its name.
    Its last fifth of speeches (one at least) is test data, all before is training
    data, so testing is always on what was said later.

    Parameters
    ----------
    path : Path, optional
        A folder with a text file (``*.txt``, Latin-1) a play. A speech is a block of
        lines between blank lines whose first line is the speaker's name, which begins
        with a capital and ends in a full stop. Texts without any are passed over.
    sequence_length : int
        T, how many characters the model sees; 1 or more. The literature often takes
        80, which is four times the work.
    stride : int, optional
        How many characters lie between one example and the next, 1 or more; by default
        ``sequence_length``, so that inputs do not overlap.

    References
    ----------
    H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS, 2017, who made clients of roles first.
    """
    stride = sequence_length if stride is None else stride
    folder = find_folder("shakespeare", path)
    roles = {
        f"{play}: {speaker.removesuffix('.')}": speeches
        for play, text in _plays(folder).items()
        for speaker, speeches in read_roles(text).items()
    }
    if not roles:
        raise DataError(
            f"{folder} holds no text (*.txt) with a role of two speeches or more. A "
            "speaker's name stands on a line of its own after a blank line and ends "
            "in a full stop."
        )
    train, test = [], []
    for speeches in roles.values():
        later = max(1, round(TEST_SHARE * len(speeches)))
        train.append(_windows(speeches[:-later], sequence_length, stride))
        test.append(_windows(speeches[-later:], sequence_length, stride))
    return DataSet(
        name="shakespeare",
        train=_join(train),
        test=_join(test),
        num_classes=NUM_TOKENS,
        natural_clients=np.repeat(np.arange(len(roles)), [len(y) for _, y in train]),
        class_names=("other", *VOCABULARY),
        natural_names=tuple(roles),
        task="next-token",
    )


def _plays(folder: Path) -> dict[str, str]:
    """Return the text of each play, by the name of its file."""
    plays = {}
    for path in sorted(folder.glob("*.txt")):
        try:
            plays[path.stem] = path.read_text(encoding="latin-1")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return plays


def read_roles(play: str) -> dict[str, list[str]]:
    r"""Return the speeches of each role that has two or more, in order of appearance.

    Examples
    --------
    >>> read_roles("ACT I.\n\nBer.\nWho's there?\n\nFran.\nNay.\n\nBer.\nHe.\nYes.\n")
    {'Ber.': ["Who's there?", 'He.\nYes.']}
    """
    speeches = defaultdict(list)
    for block in re.split(r"\n[ \t\r]*\n\s*", play.replace("\r\n", "\n")):
        first, _, speech = block.partition("\n")
        speaker = first.strip()
        named = SPEAKER.fullmatch(speaker) and not HEADING.match(speaker)
        if named and speech.strip():
            speeches[speaker].append(speech.strip())
    return {role: said for role, said in speeches.items() if len(said) >= 2}


def encode(text: str) -> Tokens:
    """Return the token of each character.

    Examples
    --------
    >>> encode("a \u00e9") - 1  # one less is the place in VOCABULARY, -1 is "other"
    array([27,  1, -1])
    """
    codes = np.frombuffer(text.encode("latin-1", "replace"), np.uint8)
    return _TOKEN_OF_CODE[codes]


def _token_table() -> Tokens:
    table = np.full(256, OTHER, np.int64)
    table[[ord(character) for character in VOCABULARY]] = np.arange(1, NUM_TOKENS)
    return table


_TOKEN_OF_CODE = _token_table()


def _windows(speeches: list[str], length: int, stride: int) -> tuple[Tokens, Tokens]:
    """Return inputs ``[n, length]`` and the character after each.

    The text is filled up in front, so that its first character can be predicted too.
    """
    tokens = encode("\n".join(speeches))
    padded = np.concatenate([np.full(length, OTHER, np.int64), tokens])
    windows = np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::stride]
    return windows[:, :-1], windows[:, -1]


def _join(parts: list[tuple[Tokens, Tokens]]) -> Examples:
    return Examples(
        np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    )
