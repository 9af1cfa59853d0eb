"""How often a model was right, as training met the examples."""

from __future__ import annotations

import torch
from torch import Tensor


def hits_of(outputs: Tensor, targets: Tensor, ahead: int = 0) -> Tensor:
    """Return which share of each example's decisions is right.

    Parameters
    ----------
    outputs : Tensor
        Logits ``[n, C]`` of a class for each example, or ``[n, C, h, w]`` of one for
        each pixel; ``[n, L]`` of labels; or numbers, which are never right.
    targets : Tensor
        Codes of classes ``[n]`` or ``[n, h, w]``, int64; labels ``[n, L]`` of 0 and 1
        or numbers ``[n]``, floating.
    ahead : int
        How many axes both have before these, such as one for clients.

    Returns
    -------
    Tensor
        ``[n]``: true or false, or a share.

    Examples
    --------
    >>> hits_of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    tensor([ True, False])
    """
    own = targets.ndim - ahead
    if not targets.is_floating_point() and own == 1:
        return outputs.argmax(-1) == targets
    if own == 1:
        return torch.zeros_like(targets)
    if targets.is_floating_point():
        right = (outputs > 0) == (targets > 0)
    else:
        right = outputs.argmax(ahead + 1) == targets
    return right.flatten(ahead + 1).to(outputs.dtype).mean(-1)
