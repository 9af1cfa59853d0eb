"""Fashion-MNIST, read from its four IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from ..core.errors import DataError
from .examples import DataSet, Examples
from .fetch import find_folder

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")

# Mean and standard deviation of the training pixels, scaled to [0, 1].
MEAN, STD = 0.2860, 0.3530

CLASS_NAMES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

IDX_UNSIGNED_BYTE = 8


def load(
    path: Path | None = None,
    *,
    examples: Annotated[int, Ge(1), Le(60_000)] = 60_000,
) -> DataSet:
    """Fashion-MNIST, 28x28 grey images of clothes, 10 classes, 60,000 + 10,000.

    Parameters
    ----------
    path : Path, optional
        A folder with the four files, packed (``.gz``) or not. By default the data
        folder of this library, then where Debian's package keeps them.
    examples : int
        How many of the training images there are, from 1 to 60,000: the first ones,
        which are in no order. The test images are always all.

    References
    ----------
    H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
    Benchmarking Machine Learning Algorithms", arXiv:1708.07747, 2017.
    """
    folder = find_folder("fashion-mnist", path, SYSTEM_FOLDER)
    return DataSet(
        name="fashion-mnist",
        train=_read_part(folder, "train").take(slice(examples)),
        test=_read_part(folder, "t10k"),
        num_classes=10,
        class_names=CLASS_NAMES,
    )


def _read_part(folder: Path, part: str) -> Examples:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), dimensions=1)
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{folder}: images of '{part}' are {images.shape[1:]}, expected (28, 28). "
            "Is this another data set?"
        )
    x = images[:, None].astype(np.float32)
    x /= 255
    x -= MEAN
    x /= STD
    return Examples(x, labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} has no '{name}' or '{name}.gz'. "
        "'fedweight data fashion-mnist' fetches the four files."
    )


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, unpacked if its name ends in ``.gz``.

    The header is two zero bytes, the type, the number of dimensions, and then each
    dimension as a big-endian 32-bit number.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Fetch the file again."
        ) from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, IDX_UNSIGNED_BYTE, dimensions]):
        raise DataError(
            f"{path} is not an IDX file of bytes with {dimensions} dimension(s). "
            "Fetch the file again."
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} holds {len(content) - start} values, its header says "
            f"{math.prod(shape)}. Fetch the file again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
