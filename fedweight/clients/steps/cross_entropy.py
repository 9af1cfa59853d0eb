"""The cross-entropy of labels as its plain operations.

Where many clients train at once PyTorch takes ``F.cross_entropy`` apart in Python. For
that it imports SymPy, a third of a second at every start, and it searches the labels
for some to ignore, a tenth of a step of a small model. The labels of a client's
examples all name classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SIGNATURE = inspect.signature(F.cross_entropy)


class OfLabels(TorchFunctionMode):
    """Within this context ``F.cross_entropy`` of some labels is :func:`cross_entropy`.

    Of other targets, of labels that have been changed, and with arguments that mean
    something else or that PyTorch refuses, it is PyTorch's.

    Parameters
    ----------
    labels : Tensor
        ``[n]``, int64, each the number of a class.
    """

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.labels = labels
        self._version = labels._version

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the calls that can be; pass all others on."""
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            given = _SIGNATURE.bind(*args, **kwargs)
            given.apply_defaults()
            if self._is_plain(**given.arguments):
                wanted = ("input", "target", "weight", "reduction", "label_smoothing")
                return cross_entropy(*(given.arguments[name] for name in wanted))
        return func(*args, **kwargs)

    def _is_plain(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        size_average: bool | None,
        ignore_index: int,
        reduce: bool | None,
        reduction: str,
        label_smoothing: float,
    ) -> bool:
        return (
            target is self.labels
            and target._version == self._version
            and input.ndim == 2
            and input.shape[0] == target.shape[0]
            and (weight is None or weight.shape == input.shape[1:])
            and (weight is None or weight.dtype == input.dtype)
            and size_average is None
            and ignore_index < 0
            and reduce is None
            and reduction in ("mean", "sum", "none")
            and 0 <= label_smoothing <= 1
        )


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return ``F.cross_entropy`` of labels of which none is to be ignored.

    Parameters
    ----------
    logits : Tensor
        ``[n, C]``.
    labels : Tensor
        ``[n]``, int64, in ``0 .. C - 1``.
    weight : Tensor, optional
        ``[C]``: how much an example of each class counts.
    reduction : {"mean", "sum", "none"}
        ``"none"`` gives each example's value, ``[n]``.
    label_smoothing : float
        In [0, 1]; this share of the target is spread evenly over all classes.

    Examples
    --------
    >>> import torch
    >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    >>> cross_entropy(logits, torch.tensor([0, 1]), reduction="none")
    tensor([0.6931, 2.1269])
    """
    log_p = logits.log_softmax(1)
    own = None if weight is None else weight.gather(0, labels)
    losses = -log_p.gather(1, labels[:, None]).squeeze(1)
    if own is not None:
        losses = losses * own
    if label_smoothing:
        spread = -(log_p if weight is None else log_p * weight).mean(1)
        losses = (1 - label_smoothing) * losses + label_smoothing * spread
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if own is None else losses.sum() / own.sum()
