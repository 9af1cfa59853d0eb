"""What a model says of a client's examples before they train it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.layout import FlatModel, as_tensor
from ...core.module import FlatModule
from ...data.examples import Examples

# So many examples go through the model at once.
AT_ONCE = 1024


@torch.no_grad()
def predictions(module: FlatModule, model: FlatModel, examples: Examples) -> Tensor:
    """Return a model's logits on some examples, ``[n, C]``, on the CPU.

    Parameters
    ----------
    module : FlatModule
        The architecture; its values are overwritten.
    model : FlatModel
        The model, which evaluates: no dropout, and running statistics as they are.
    examples : Examples
        One or more.
    """
    module.load(model)
    module.train(False)
    x = as_tensor(examples.x)
    device = module.parameters.device
    parts = [
        # A copy: a model may change its inputs.
        module(x[k : k + AT_ONCE].to(device, copy=True)).cpu()
        for k in range(0, len(x), AT_ONCE)
    ]
    module.train()
    return torch.cat(parts)
