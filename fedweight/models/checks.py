"""What several models ask of their options and of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.errors import ConfigurationError
from ..core.texts import shown
from ..data.examples import channels_last

# More layers one after another are refused.
MOST_LAYERS = 1000


def check_widths(name: str, widths: Sequence[Any]) -> None:
    """Raise if a model's widths are not whole numbers from 1, or too many."""
    if not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ConfigurationError(
            f"{name} must be whole numbers from 1, got {shown(list(widths))}."
        )
    if len(widths) > MOST_LAYERS:
        raise ConfigurationError(
            f"{name} must be at most {MOST_LAYERS} numbers, got {len(widths)}."
        )


def image_shape(
    model: str, input_shape: tuple[int, ...], least: int
) -> tuple[int, int, int]:
    """Return channels, height and width, or raise if it is no such image."""
    if channels_last(input_shape):
        raise ConfigurationError(
            f"model '{model}' takes images of shape (c, h, w), but the data have shape "
            f"{tuple(input_shape)}, which looks like (h, w, c). Transpose them first: "
            "x.transpose(0, 3, 1, 2)."
        )
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ConfigurationError(
            f"model '{model}' takes images of shape (c, h, w) with h and w of {least} "
            f"or more, but the data have shape {tuple(input_shape)}. Take another "
            "model, such as 'mlp'."
        )
    channels, height, width = input_shape
    return channels, height, width
