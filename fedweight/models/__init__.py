"""The models that ship with the library, each built by name.

None of them changes a tensor in place or draws numbers in its forward pass, so each
can be trained for many clients at once (``torch.func``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.lazy import lazy_exports
from ..core.registry import Registry

if TYPE_CHECKING:
    from .building import build

__all__ = ["MODELS", "build", "catalogue"]

__getattr__, __dir__ = lazy_exports(__name__, {"build": ".building"})

MODELS = Registry(
    "model",
    {
        "char-gru": "fedweight.models.text:CharGRU",
        "char-transformer": "fedweight.models.text:CharTransformer",
        "cnn": "fedweight.models.vision:CNN",
        "mlp": "fedweight.models.tabular:MLP",
        "resnet18-gn": "fedweight.models.vision:ResNet18GN",
        "softmax": "fedweight.models.tabular:Softmax",
        "unet": "fedweight.models.segmentation:UNet",
    },
)


def catalogue() -> dict[str, str]:
    """Return each model's name with a line that describes it."""
    return MODELS.descriptions()
