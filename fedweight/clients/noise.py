"""Random numbers inside a model, as a function of client, step and place.

Dropout as PyTorch draws it depends on which client ran before in the same process,
and cannot be the same for one client alone and in a batch of clients. In training the
functions below therefore draw from a counter: the noise of an element is a hash of the
client's seed, the step, the layer's turn and the element's index.

They are ``F.dropout`` and ``F.dropout1d`` to ``F.dropout3d``, and so the layers of
these names. Whatever else draws does so from a stream that the whole process shares:
PyTorch's (recurrent layers and attention with dropout, alpha dropout, ``torch.rand``),
NumPy's or Python's. Such a model trains one client at a time, with these streams
seeded for each client (:func:`own_streams`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.threads import SharedLock

T = TypeVar("T")

# The process's random streams, and what else PyTorch keeps for all threads, such as
# the choice of kernels. Who trains shares them, who changes them has them alone.
STREAMS = SharedLock()


def watched(work: Callable[[], T], device: torch.device) -> tuple[T, bool]:
    """Do work as others do theirs; tell whether it drew from PyTorch's streams.

    Parameters
    ----------
    work : Callable
        It computes on ``device``. If it has drawn, the streams are put back, and what
        it returned counts for nothing: others may have drawn meanwhile.
    """
    with STREAMS.shared():
        before = _torch_streams(device)
        result = work()
        if all(map(torch.equal, before, _torch_streams(device))):
            return result, False
    with STREAMS.alone():
        _set_torch_streams(before, device)
    return result, True


@contextmanager
def own_streams(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the process's random streams for one client, and put them back afterwards.

    No other thread trains meanwhile.

    Parameters
    ----------
    seed : int
        Below 2**63.
    device : torch.device
        Where the client trains. Others are not looked at, which would prepare them.
    """
    with STREAMS.alone(), seeded(seed, device):
        yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the process's random streams begin with a seed, in a ``with`` block.

    The arguments are those of :func:`own_streams`; other threads meet them, too.
    """
    before = Streams(device)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        before.put_back()


class Streams:
    """The process's random streams at one moment.

    As a context it begins with them, and leaves those that there were.

    Parameters
    ----------
    device : torch.device
        Others are not looked at, which would prepare them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._of_torch = _torch_streams(device)
        self._of_numpy = np.random.get_state()  # noqa: NPY002
        self._of_python = random.getstate()

    def put_back(self) -> None:
        """Let the streams be what they were at that moment."""
        _set_torch_streams(self._of_torch, self.device)
        np.random.set_state(self._of_numpy)  # noqa: NPY002
        random.setstate(self._of_python)

    def __enter__(self) -> None:
        """Put them back for a while."""
        self._now = Streams(self.device)
        self.put_back()

    def __exit__(self, *error: object) -> None:
        """Go on with those that there were."""
        self._now.put_back()


def _torch_streams(device: torch.device) -> list[Tensor]:
    """Return the states of the streams that operations on a device draw from."""
    states = [torch.default_generator.get_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_torch_streams(states: list[Tensor], device: torch.device) -> None:
    torch.default_generator.set_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def uniform(seed: Tensor, step: Tensor | int, layer: int, shape: torch.Size) -> Tensor:
    """Return noise in [0, 1), float32: a hash of seed, step, layer and place.

    Parameters
    ----------
    seed : Tensor
        0-d, int64.
    step : Tensor or int
        0-d, int64.
    layer : int
        The turn of the layer within the step.
    shape : torch.Size
        The shape of the noise.

    References
    ----------
    The mixing function is the finaliser of SplitMix64 (G. Steele et al., "Fast
    Splittable Pseudorandom Number Generators", OOPSLA 2014).
    """
    place = torch.arange(shape.numel(), device=seed.device)
    turn = torch.as_tensor(step, device=seed.device) + 1
    key = _mix(_mix(seed + _signed(0x9E3779B97F4A7C15) * turn) + layer)
    bits = _mix(key + _signed(0x9E3779B97F4A7C15) * (place + 1))
    return (_shift(bits, 40).to(torch.float32) / (1 << 24)).reshape(shape)


# A gamma-distributed number is found in no more tries; all fail less often than once
# in 1e10. Each takes three uniform numbers, and the result one more.
TRIES = 8
GAMMA_UNIFORMS = 3 * TRIES + 1


def log_gamma(shape: Tensor, uniforms: Tensor) -> Tensor:
    """Return logarithms of gamma-distributed numbers, made of uniform ones.

    Always by the same operations, so that it can be batched: all tries are made, and
    the first that holds is taken.

    Parameters
    ----------
    shape : Tensor
        ``[n]``: the distributions' shapes, 0 or more; 0 gives ``-inf``.
    uniforms : Tensor
        ``[n, GAMMA_UNIFORMS]``, in [0, 1).

    References
    ----------
    G. Marsaglia and W. W. Tsang, "A Simple Method for Generating Gamma Variables", ACM
    Transactions on Mathematical Software, 2000, with the power of a uniform number that
    they note for shapes below 1, here for all. Normal numbers by G. E. P. Box and M. E.
    Muller, 1958.
    """
    own = (1 - uniforms).to(shape.dtype)  # Above 0, for the logarithms.
    radius, turn, accept = own[:, 1:].reshape(-1, 3, TRIES).unbind(1)
    normal = (-2 * radius.log()).sqrt() * (2 * math.pi * turn).cos()
    d = (shape + 2 / 3)[:, None]  # The shape is one more than wanted, less a third.
    v = (1 + normal / (9 * d).sqrt()) ** 3
    log_v = v.clamp(min=1e-30).log()
    holds = (v > 0) & (accept.log() < normal**2 / 2 + d - d * v + d * log_v)
    number = torch.arange(TRIES, device=shape.device)
    first = torch.where(holds, number, TRIES).amin(1)
    found = torch.where(number == first[:, None], log_v, 0).sum(1)  # 0 is the mode.
    power = own[:, 0].log() / torch.where(shape > 0, shape, 1)
    return torch.where(shape > 0, d[:, 0].log() + found + power, -torch.inf)


def _signed(value: int) -> int:
    """Return a 64-bit constant as int64 holds it."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(z: Tensor, places: int) -> Tensor:
    """Shift right without the sign: int64 stands for an unsigned number."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


class LocalTraining(TorchFunctionMode):
    """Within this context a model's forward pass is one client's step.

    Dropout draws from the client's counter, and BatchNorm leaves padding out of its
    statistics.

    Parameters
    ----------
    seed : Tensor or int
        0-d, int64: the client's stream.
    step : Tensor or int
        0-d, int64: which step it is.
    mask : Tensor, optional
        ``[n]``: 1 for an example, 0 for padding.
    plain : bool
        Whether BatchNorm is made of operations that say what they change. A GPU's
        library changes running statistics in place and does not say so; of clients
        that are batched it may change a copy.

    Attributes
    ----------
    layers : int
        How many layers have drawn noise.
    least : int
        With fewer real examples than this the model cannot train.
    """

    def __init__(
        self,
        seed: Tensor | int,
        step: Tensor | int,
        mask: Tensor | None = None,
        *,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.step = step
        self.mask = mask
        self.plain = plain
        self.layers = 0
        self.least = 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the calls that need it; pass all others on."""
        kwargs = kwargs or {}
        if func in _WHOLE_CHANNELS or func is F.dropout:
            return self._dropout(func, *args, **kwargs)
        if func is F.batch_norm and (self.plain or self.mask is not None):
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self,
        func: Callable[..., Any],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return input
        self.layers += 1
        shape = input.shape
        if func in _WHOLE_CHANNELS:
            shape = torch.Size([*shape[:2], *(1 for _ in shape[2:])])
        if isinstance(self.seed, int):
            self.seed = torch.tensor(self.seed, device=input.device)
        noise = uniform(self.seed, self.step, self.layers, shape)
        kept = (noise >= p).to(input.dtype)
        return input * kept / (1 - p) if p < 1 else input * 0

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, False, momentum, eps
            )
        dtype = input.dtype
        if dtype in (torch.bfloat16, torch.float16):
            input = input.float()  # As PyTorch's own does: sums need it.
        others = [d for d in range(input.ndim) if d != 1]
        channel = (1, -1, *(1 for _ in others[1:]))
        per_example = input[0, 0].numel()
        if per_example == 1:
            self.least = 2  # A variance of one value: PyTorch refuses it, too.
        if self.mask is None:
            count: Any = len(input) * per_example
            var, mean = torch.var_mean(input, others, correction=0)
            centred = input - mean.reshape(channel)
            correction: Any = count / max(count - 1, 1)
        else:
            # Chosen, not multiplied: 0 times infinity is not 0.
            real = (self.mask > 0).reshape(-1, *(1 for _ in range(input.ndim - 1)))
            count = (self.mask.to(input.dtype).sum() * per_example).clamp(min=1)
            mean = torch.where(real, input, 0).sum(others) / count
            centred = torch.where(real, input - mean.reshape(channel), 0)
            var = centred.square().sum(others) / count
            correction = count / (count - 1).clamp(min=1)
        if running_mean is not None and running_var is not None:
            unbiased = var * correction
            running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
            running_var.mul_(1 - momentum).add_(momentum * unbiased.detach())
        output = centred * torch.rsqrt(var + eps).reshape(channel)
        if weight is not None:
            output = output * weight.reshape(channel)
        if bias is not None:
            output = output + bias.reshape(channel)
        return output.to(dtype)


# Dropout that keeps or drops a whole channel of an example.
_WHOLE_CHANNELS = (F.dropout1d, F.dropout2d, F.dropout3d)
