"""Where the public data sets are kept, and how they get there."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import DataError, closest
from ..core.paths import clean_path
from ..core.writing import written_aside

TIMEOUT_SECONDS = 60
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where a data set is published, and what its files must hold.

    Attributes
    ----------
    url : str
        The folder of the files.
    files : Mapping[str, str]
        File name to the SHA-256 of its content. For ``.gz`` files it is the content
        once unpacked: the same data are published with different gzip headers.
    """

    url: str
    files: Mapping[str, str]


SOURCES: dict[str, Source] = {
    "fashion-mnist": Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte.gz": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte.gz": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
    "adult": Source(
        "https://archive.ics.uci.edu/ml/machine-learning-databases/adult",
        {
            "adult.data": (
                "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"
            ),
            "adult.test": (
                "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"
            ),
        },
    ),
}

# Data sets of this library that have no fixed public address, and what to do then.
BY_HAND = {
    "shakespeare": (
        "the plays have no fixed public address. Make a folder with one text file "
        "(*.txt, Latin-1) a play, in which a speaker's name stands on a line of its "
        "own after a blank line and ends in a full stop (Project Gutenberg has such "
        "texts), and give it as path."
    ),
    "digits": "it comes with scikit-learn; there is nothing to fetch.",
}


def default_folder(name: str) -> Path:
    """Return where a data set is looked for: ``~/.cache/fedweight/<name>``.

    The environment variable ``FEDWEIGHT_DATA`` replaces ``~/.cache/fedweight``.
    """
    base = os.environ.get("FEDWEIGHT_DATA")
    return (Path(base) if base else Path.home() / ".cache" / "fedweight") / name


def find_folder(name: str, path: Path | None, *others: Path) -> Path:
    """Return the folder of a data set: the user's, the default, or another known one.

    Raises
    ------
    DataError
        If the user's folder, or every known one, is missing.
    """
    folders = [path] if path is not None else [default_folder(name), *others]
    for folder in folders:
        if clean_path(f"the folder of data '{name}'", folder).is_dir():
            return folder
    if name in SOURCES:
        remedy = f"'fedweight data {name}' fetches it; or give the folder as path."
    else:
        remedy = BY_HAND[name]
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(f"data '{name}': there is no folder {looked}. To do: {remedy}")


def fetch(
    name: str, folder: str | Path | None = None, base_url: str | None = None
) -> Path:
    """Download a public data set and check it; what is there already is kept.

    Parameters
    ----------
    name : str
        ``"fashion-mnist"`` or ``"adult"``.
    folder : str or Path, optional
        Where the files go; by default :func:`default_folder`.
    base_url : str, optional
        Another place that has the same files, such as a mirror.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DataError
        If the data set cannot be fetched, or a file is not what it should be; such a
        file is removed.
    """
    if name in BY_HAND:
        raise DataError(f"data '{name}' cannot be fetched: {BY_HAND[name]}")
    if name not in SOURCES:
        raise DataError(
            f"data '{name}' cannot be fetched; {', '.join(SOURCES)} can."
            f"{closest(name, SOURCES)}"
        )
    source = SOURCES[name]
    url = (source.url if base_url is None else base_url).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise DataError(f"base_url must start with http:// or https://, got '{url}'.")
    target = default_folder(name) if folder is None else Path(folder)
    target = clean_path("the folder", target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder '{target}' cannot be made: {error}. Choose another with "
            "--folder."
        ) from None
    for file, sha256 in source.files.items():
        if not _is_right(target / file, sha256, file.endswith(".gz")):
            _download(f"{url}/{file}", target / file, sha256)
    return target


def _download(url: str, path: Path, sha256: str) -> None:
    try:
        with (
            urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response,
            written_aside(path, shared=True) as file,
        ):
            shutil.copyfileobj(response, file, CHUNK)
            file.flush()
            if not _is_right(Path(file.name), sha256, path.suffix == ".gz"):
                raise DataError(
                    f"{url} is not the file that was expected (its SHA-256 differs); "
                    "it was removed. Try again, or give another place as base_url."
                )
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} could not be fetched to {path}: {error}. Check the connection and "
            "the folder, or give another place as base_url."
        ) from error


def _is_right(path: Path, sha256: str, packed: bool) -> bool:
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False
    return digest.hexdigest() == sha256
