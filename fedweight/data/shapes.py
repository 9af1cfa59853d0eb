"""Drawn shapes with masks: a segmentation of several sites that needs no download."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from ..core.memory import check_memory
from ..core.options import validated
from ..core.rng import Purpose, generator
from .examples import DataSet, Examples
from .targets import Indices

CLASSES = ("background", "disc", "square", "triangle")
SCANNERS = ("new", "old")

# How bright each class is on average, and how much that differs from shape to shape.
BRIGHTNESS = (0.0, 1.0, 0.8, 0.6)
SPREAD = 0.1

# An image has so many shapes at most, which reach so far from their centre, as shares
# of the image's side; a later shape covers those before.
MOST_SHAPES = 3
REACH = (0.12, 0.25)

# Noise of a new scanner, and by what an old one multiplies noise and contrast.
NOISE = 0.1
OLD_NOISE, OLD_CONTRAST = 2.0, 0.7

# Streams of a site: what its scanners are like, its training and its test images.
SITE, TRAIN, TEST = range(3)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """What one site's images are like.

    Attributes
    ----------
    contrast, noise : float
        What a shape's brightness, and the noise, are multiplied by.
    offset, slope : float
        What is added to all pixels, and from one side of the image to the other.
    old : float
        The share of images that an old scanner made.
    """

    contrast: float
    noise: float
    offset: float
    slope: float
    old: float

    @classmethod
    def drawn(cls, rng: np.random.Generator, heterogeneity: float) -> Site:
        """Return a site; at 0 all are alike."""
        contrast, noise, offset, slope, old = heterogeneity * rng.uniform(-1, 1, 5)
        return cls(
            math.exp(0.7 * contrast),
            math.exp(0.9 * noise),
            0.4 * offset,
            0.4 * slope,
            0.5 + 0.5 * old,
        )


@validated
def load(
    *,
    images: Annotated[int, Ge(1), Le(10**6)] = 600,
    test_images: Annotated[int, Ge(0), Le(10**6)] = 150,
    size: Annotated[int, Ge(8), Le(1024)] = 32,
    sites: Annotated[int, Ge(1), Le(10**5)] = 6,
    size_ratio: Annotated[float, Ge(1), Le(1e6)] = 3.0,
    heterogeneity: Annotated[float, Ge(0), Le(1)] = 0.5,
    draw: Annotated[int, Ge(0), Le(2**63 - 1)] = 0,
) -> DataSet:
    """Drawn discs, squares and triangles with their masks, of sites that differ.

    Grey images ``[1, size, size]`` of one to three shapes that may cover each other,
    and the class of each pixel: background, disc, square or triangle. Shapes are
    turned, and are a little brighter or darker than others of their class. Sites, which
    partition ``natural`` makes clients, differ in how many images they have, in
    contrast, brightness, shading and noise; and in how many images an old scanner made,
    which is the attribute ``scanner``. Test images come from all sites alike.

    Parameters
    ----------
    images : int
        How many there are to train on, over all sites.
    test_images : int
        How many there are to test with.
    size : int
        The height and width in pixels, 8 or more.
    sites : int
        How many sites there are.
    size_ratio : float
        1 or more: how many times as many training images the largest site has as the
        smallest; those between are spaced evenly on a logarithmic scale.
    heterogeneity : float
        In [0, 1]: how much sites differ in what their images are like; at 0 not at all.
    draw : int
        The seed of the images. The run's seed does not change them, so that runs of
        different seeds are tested with the same.

    Notes
    -----
    Six sites are as many as the prostate images of FedCE have (M. Jiang et al., CVPR
    2023), which differ as scanners and protocols do.

    Examples
    --------
    >>> shapes = load(images=60, test_images=12)
    >>> shapes.train.x.shape, shapes.train.y.shape, shapes.natural_names[:2]
    ((60, 1, 32, 32), (60, 32, 32), ('site-0', 'site-1'))
    """
    every = images + test_images
    check_memory(
        f"data 'shapes' with {every:,} images of {size} by {size} pixels",
        12.0 * every * size**2,
        "Take fewer, or smaller ones.",
    )
    steps = np.arange(sites)[::-1] / max(sites - 1, 1)
    parts = {
        TRAIN: _divided(images, size_ratio**steps),
        TEST: _divided(test_images, np.ones(sites)),
    }
    drawn: dict[int, list[Examples]] = {TRAIN: [], TEST: []}
    for number in range(sites):
        site = Site.drawn(generator(draw, Purpose.DATA, SITE, number), heterogeneity)
        for part, counts in parts.items():
            rng = generator(draw, Purpose.DATA, part, number)
            drawn[part].append(_examples(rng, int(counts[number]), size, site))
    train, test = (_joined(drawn[part]) for part in (TRAIN, TEST))
    return DataSet(
        name="shapes",
        train=train,
        test=test,
        num_classes=len(CLASSES),
        natural_clients=np.repeat(np.arange(sites), parts[TRAIN]),
        natural_names=tuple(f"site-{number}" for number in range(sites)),
        class_names=CLASSES,
        attribute_names={"scanner": SCANNERS},
        task="segmentation",
    )


def _divided(number: int, shares: Array) -> Indices:
    """Return whole numbers in proportion to shares, which sum to a number."""
    stops = np.rint(number * np.cumsum(shares) / shares.sum()).astype(np.int64)
    sizes: Indices = np.diff(stops, prepend=0)
    return sizes


def _joined(parts: list[Examples]) -> Examples:
    """Return the images of all sites, one site after another."""
    return Examples(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
        {"scanner": np.concatenate([part.attributes["scanner"] for part in parts])},
    )


def _examples(rng: np.random.Generator, n: int, size: int, site: Site) -> Examples:
    """Draw a site's images and their masks."""
    masks = np.zeros((n, size, size), np.int64)
    light = np.zeros((n, size, size))
    there = rng.integers(1, MOST_SHAPES, n, endpoint=True)
    for k in range(MOST_SHAPES):
        codes = rng.integers(1, len(CLASSES), n)
        inside = _inside(rng, codes, n, size) & (k < there)[:, None, None]
        bright = np.array(BRIGHTNESS)[codes] + SPREAD * rng.uniform(-1, 1, n)
        masks = np.where(inside, codes[:, None, None], masks)
        light = np.where(inside, bright[:, None, None], light)
    old = rng.random(n) < site.old
    contrast = site.contrast * np.where(old, OLD_CONTRAST, 1.0)[:, None, None]
    noise = NOISE * site.noise * np.where(old, OLD_NOISE, 1.0)[:, None, None]
    shading = site.offset + site.slope * (np.arange(size) / size - 0.5)
    x = contrast * light + shading + noise * rng.standard_normal(light.shape)
    return Examples(
        x[:, None].astype(np.float32), masks, {"scanner": old.astype(np.int64)}
    )


def _inside(
    rng: np.random.Generator, codes: Indices, n: int, size: int
) -> npt.NDArray[np.bool_]:
    """Tell which pixels a shape of each image covers, ``[n, size, size]``."""
    reach = rng.uniform(*REACH, n)
    centre = reach + (1 - 2 * reach) * rng.random((2, n))
    angle = rng.uniform(0, 2 * np.pi, n)[:, None, None]
    grid = (np.arange(size) + 0.5) / size
    v, u = grid[:, None] - centre[0, :, None, None], grid - centre[1, :, None, None]
    u, v = (
        (np.cos(angle) * u + np.sin(angle) * v) / reach[:, None, None],
        (np.cos(angle) * v - np.sin(angle) * u) / reach[:, None, None],
    )
    # How far each pixel is, where a shape ends at 1; all three have the same area.
    square = 2 / math.sqrt(math.pi) * np.maximum(np.abs(u), np.abs(v))
    sides = [
        u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
    ]
    triangle = math.sqrt(3 * math.sqrt(3) / math.pi) * np.maximum.reduce(sides)
    far = np.stack([np.hypot(u, v), square, triangle])
    return far[codes - 1, np.arange(n)] <= 1
