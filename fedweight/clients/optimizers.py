"""Local optimisers: what a client's step does with a gradient.

They are ``torch.optim``'s, to the bit, on plain tensors: one vector of a client, or the
tensors ``[C, ...]`` of many clients at once, who may have learning rates of their own.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..core.errors import ConfigurationError
from ..core.options import check_options, checked_fields, options_of
from ..core.registry import Registry, make
from ..core.texts import shown

if TYPE_CHECKING:
    from .settings import TrainingSettings

OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": f"{__name__}:SGD",
        "adam": f"{__name__}:Adam",
        "adamw": f"{__name__}:AdamW",
        "adagrad": f"{__name__}:Adagrad",
        "rmsprop": f"{__name__}:RMSprop",
    },
)

# Of all clients, or of each, ``[C]``.
Rate = float | Tensor

# What of an optimiser of the user's own the training settings fill in.
FILLED_IN = frozenset({"params", "lr", "weight_decay"})

_Added = Annotated[
    float, Field(gt=0, description="added to the denominator, so that it is not 0")
]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """An optimiser's rule and parameters; what it remembers is kept by its caller.

    Attributes
    ----------
    decouples : bool
        Whether weight decay shrinks the weights, and does not join the gradient.
    adds_up : bool
        Whether what it does is a weighted sum of gradients.
    batches : bool
        Whether it can train many clients at once.
    """

    decouples: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
    batches: ClassVar[bool] = True

    @abstractmethod
    def begin(self, w: Tensor) -> list[Tensor]:
        """Return what it remembers of a tensor before its first step."""

    @abstractmethod
    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Change a tensor and its state in place, in its ``steps``-th step."""

    @property
    def descends(self) -> bool:
        """Whether a step is ``w - rate * gradient``, and nothing is remembered."""
        return False

    @property
    def diverging_curvature(self) -> float:
        """Beyond which curvature, times the learning rate, it leaves a minimum."""
        return math.inf


@checked_fields
@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent, with or without momentum.

    Nesterov's as in Ilya Sutskever, James Martens, George Dahl and Geoffrey Hinton, "On
    the importance of initialization and momentum in deep learning", ICML 2013.

    Parameters
    ----------
    momentum : float
        In [0, 1); what is kept of the sum of the gradients before.
    dampening : float
        In [0, 1); the share of a gradient that does not enter that sum.
    nesterov : bool
        Whether the step looks ahead; needs momentum, and no dampening.
    """

    momentum: Annotated[
        float, Field(ge=0, lt=1, description="what is kept of the gradients before")
    ] = 0.0
    dampening: Annotated[
        float,
        Field(ge=0, lt=1, description="share of a gradient that momentum leaves out"),
    ] = 0.0
    nesterov: Annotated[
        bool, Field(description="look ahead; needs momentum, and no dampening")
    ] = False

    adds_up: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check what goes together."""
        if self.nesterov and (not self.momentum or self.dampening):
            raise ConfigurationError(
                "nesterov needs momentum above 0 and dampening = 0, got momentum = "
                f"{self.momentum:g} and dampening = {self.dampening:g}."
            )

    @property
    def descends(self) -> bool:
        """Whether there is no momentum."""
        return not self.momentum

    def begin(self, w: Tensor) -> list[Tensor]:
        """Return the sum of gradients, if there is momentum."""
        return [torch.zeros_like(w)] if self.momentum else []

    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Go down the gradient, or what momentum makes of it."""
        if state:
            (held,) = state
            if self.dampening and steps == 1:
                held.copy_(g)
            else:
                held.mul_(self.momentum).add_(g, alpha=1 - self.dampening)
            g = g.add(held, alpha=self.momentum) if self.nesterov else held
        _subtract(w, g, rate)

    @property
    def diverging_curvature(self) -> float:
        """The largest at which the distance to a minimum does not grow."""
        if self.nesterov:
            return 2 * (1 + self.momentum) / (1 + 2 * self.momentum)
        return 2 * (1 + self.momentum) / (1 - self.dampening)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam: steps by the running mean of gradients over the root of their squares'.

    Diederik P. Kingma and Jimmy Ba, "Adam: A Method for Stochastic Optimization",
    ICLR 2015.

    Parameters
    ----------
    beta_1 : float
        In [0, 1); what the mean of gradients keeps in a step.
    beta_2 : float
        In [0, 1); what the mean of their squares keeps.
    epsilon : float
        Above 0; added to the root.
    """

    beta_1: Annotated[
        float, Field(ge=0, lt=1, description="what the mean of gradients keeps")
    ] = 0.9
    beta_2: Annotated[
        float, Field(ge=0, lt=1, description="what the mean of their squares keeps")
    ] = 0.999
    epsilon: _Added = 1e-8

    def begin(self, w: Tensor) -> list[Tensor]:
        """Return both means."""
        return [torch.zeros_like(w), torch.zeros_like(w)]

    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Renew the means, and step by their quotient."""
        m, v = state
        rate = rate / (1 - self.beta_1**steps)
        root = (1 - self.beta_2**steps) ** 0.5
        m.lerp_(g, 1 - self.beta_1)
        v.mul_(self.beta_2).addcmul_(g, g, value=1 - self.beta_2)
        _subtract_quotient(w, m, v.sqrt().div_(root).add_(self.epsilon), rate)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam whose weight decay shrinks the weights, and does not join the gradient.

    Ilya Loshchilov and Frank Hutter, "Decoupled Weight Decay Regularization",
    ICLR 2019.
    """

    decouples: ClassVar[bool] = True


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad: steps by the gradient over the root of the sum of all squares.

    John Duchi, Elad Hazan and Yoram Singer, "Adaptive Subgradient Methods for Online
    Learning and Stochastic Optimization", JMLR 2011.

    Parameters
    ----------
    step_decay : float
        0 or more; the rate of the t-th step is divided by ``1 + (t - 1) step_decay``.
    initial_sum : float
        0 or more; what the sum of squares begins with.
    epsilon : float
        Above 0; added to the root.
    """

    step_decay: Annotated[
        float, Field(ge=0, description="how quickly the rate falls with the steps")
    ] = 0.0
    initial_sum: Annotated[
        float, Field(ge=0, description="what the sum of squares begins with")
    ] = 0.0
    epsilon: _Added = 1e-10

    def begin(self, w: Tensor) -> list[Tensor]:
        """Return the sum of squares."""
        return [torch.full_like(w, self.initial_sum)]

    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Add to the sum, and step by the gradient over its root."""
        (total,) = state
        rate = rate / (1 + (steps - 1) * self.step_decay)
        total.addcmul_(g, g, value=1)
        _subtract_quotient(w, g, total.sqrt().add_(self.epsilon), rate)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """RMSprop: steps by the gradient over the root of the running mean of squares.

    Geoffrey Hinton, "Neural Networks for Machine Learning", lecture 6e, Coursera 2012;
    centred as in Alex Graves, "Generating Sequences With Recurrent Neural Networks",
    arXiv 2013.

    Parameters
    ----------
    alpha : float
        In [0, 1); what the mean of squares keeps in a step.
    epsilon : float
        Above 0; added to the root.
    momentum : float
        In [0, 1); what is kept of the steps before.
    centered : bool
        Whether the square of the gradients' mean is taken off: then it is a variance.
    """

    alpha: Annotated[
        float, Field(ge=0, lt=1, description="what the mean of squares keeps")
    ] = 0.99
    epsilon: _Added = 1e-8
    momentum: Annotated[
        float, Field(ge=0, lt=1, description="what is kept of the steps before")
    ] = 0.0
    centered: Annotated[
        bool, Field(description="divide by the gradients' standard deviation")
    ] = False

    def begin(self, w: Tensor) -> list[Tensor]:
        """Return the mean of squares; that of gradients and the last step, if used."""
        return [torch.zeros_like(w) for _ in range(1 + self.centered + self._remembers)]

    @property
    def _remembers(self) -> bool:
        return self.momentum > 0

    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Renew the mean, and step by the gradient over its root."""
        square = state[0]
        square.mul_(self.alpha).addcmul_(g, g, value=1 - self.alpha)
        if self.centered:
            mean = state[1]
            mean.lerp_(g, 1 - self.alpha)
            root = square.addcmul(mean, mean, value=-1).sqrt_()
        else:
            root = square.sqrt()
        root.add_(self.epsilon)
        if self._remembers:
            held = state[-1]
            held.mul_(self.momentum).addcdiv_(g, root)
            _subtract(w, held, rate)
        else:
            _subtract_quotient(w, g, root, rate)


@checked_fields
@dataclass(frozen=True)
class Foreign(Optimizer):
    """Any ``torch.optim.Optimizer``, such as one of the user's own.

    It steps with a model's own parameters; so clients train one after another.

    Parameters
    ----------
    path : str
        ``"module:Class"``.
    options : Mapping[str, Any]
        What the class takes besides parameters, learning rate and weight decay.

    Examples
    --------
    >>> Foreign("torch.optim:NAdam", {"momentum_decay": 0.01}).path
    'torch.optim:NAdam'
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check that it is one, and takes these options."""
        check_options(f"optimizer '{self.path}'", self._class, self.options, FILLED_IN)

    @property
    def _class(self) -> type[torch.optim.Optimizer]:
        found = OPTIMIZERS.resolve(self.path)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise ConfigurationError(
                f"optimizer '{self.path}' is not derived from torch.optim.Optimizer, "
                f"but it is {shown(found)}."
            )
        return found

    def made(
        self, parameters: Iterable[Tensor], rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Make one, for some parameters.

        Raises
        ------
        ConfigurationError
            If there is weight decay that it does not take.
        """
        chosen, what = self._class, f"optimizer '{self.path}'"
        given = dict(self.options)
        if "weight_decay" in options_of(chosen):
            given["weight_decay"] = weight_decay
        elif weight_decay:
            raise ConfigurationError(
                f"{what} takes no weight decay, got {weight_decay:g}. Set it to 0."
            )
        construct: Any = chosen
        return make(what, lambda: construct(list(parameters), lr=rate, **given))  # type: ignore[no-any-return]

    def begin(self, w: Tensor) -> list[Tensor]:
        """Keep nothing here: PyTorch does."""
        return []

    def step(
        self, w: Tensor, g: Tensor, state: Sequence[Tensor], steps: int, rate: Rate
    ) -> None:
        """Refuse: what was :meth:`made` steps itself."""
        raise NotImplementedError


def optimizer_of(name: str, options: Mapping[str, Any]) -> Optimizer:
    """Make an optimiser by name, or the user's own by ``"module:Class"``.

    Examples
    --------
    >>> optimizer_of("sgd", {"momentum": 0.9})
    SGD(momentum=0.9, dampening=0.0, nesterov=False)
    """
    chosen = OPTIMIZERS.resolve(name)
    if not (isinstance(chosen, type) and issubclass(chosen, Optimizer)):
        return Foreign(name, dict(options))
    checked = check_options(f"optimizer '{name}'", chosen, options, ())
    return chosen(**checked)


def _subtract(w: Tensor, g: Tensor, rate: Rate) -> None:
    """``w -= rate * g``."""
    if isinstance(rate, Tensor):
        w.addcmul_(g, _of_each(rate, w), value=-1)
    else:
        w.add_(g, alpha=-rate)


def _subtract_quotient(w: Tensor, a: Tensor, b: Tensor, rate: Rate) -> None:
    """``w -= rate * a / b``."""
    if isinstance(rate, Tensor):
        w.addcmul_(a / b, _of_each(rate, w), value=-1)
    else:
        w.addcdiv_(a, b, value=-rate)


def _of_each(values: Tensor, like: Tensor) -> Tensor:
    """Return a value for each client, ``[C]``, in the dimensions of ``[C, ...]``."""
    return values.view(-1, *[1] * (like.ndim - 1))


class LocalOptimizer:
    """An optimiser as ``torch.optim`` defines it, to the bit, on a few tensors.

    Parameters
    ----------
    settings : TrainingSettings
        Which, and its parameters.
    learning_rate : float or Tensor
        Of the next step; a tensor has one for each client, ``[C]``.
    parameters : Sequence[Tensor]
        What will be optimised: one vector of a client, or tensors of many clients.

    Attributes
    ----------
    remembers : bool
        Whether it moves a tensor whose gradient is 0, by its weight decay or by
        gradients before: then it matters that ``torch.optim`` leaves a tensor alone
        that has no gradient.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        learning_rate: Rate,
        parameters: Sequence[Tensor],
    ) -> None:
        self.rule = settings.rule
        self.weight_decay = settings.weight_decay
        self.learning_rate = learning_rate
        self.states = [self.rule.begin(w) for w in parameters]
        self.num_steps = [0] * len(parameters)
        self.remembers = bool(self.weight_decay or any(self.states))

    def divide(self, places: Sequence[slice]) -> None:
        """Go on with parts of the one vector that it has had so far."""
        (state,) = self.states
        self.states = [[values[place] for values in state] for place in places]
        self.num_steps *= len(places)

    def step(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> None:
        """Change the parameters in place; the gradients stay.

        A parameter whose gradient is ``None`` is left alone.
        """
        rule, rate, decay = self.rule, self.learning_rate, self.weight_decay
        for k, (w, g) in enumerate(zip(parameters, gradients, strict=True)):
            if g is None:
                continue
            self.num_steps[k] += 1
            if decay and rule.decouples:
                kept = 1 - rate * decay
                w.mul_(_of_each(kept, w) if isinstance(kept, Tensor) else kept)
            elif decay:
                # Not in place: two parameters may have one tensor as their gradient.
                g = g.add(w, alpha=decay)
            rule.step(w, g, self.states[k], self.num_steps[k], rate)


def clip_factor(length: Tensor, longest: float) -> Tensor:
    """Return what makes gradients of a length no longer than so much, as PyTorch does.

    Examples
    --------
    >>> clip_factor(torch.tensor([1.0, 4.0]), 2.0)
    tensor([1.0000, 0.5000])
    """
    return (longest / (length + 1e-6)).clamp_(max=1.0)


def clip_each(gradients: Sequence[Tensor], longest: float) -> list[Tensor]:
    """Return many clients' gradients, ``[C, ...]``, none of which is too long.

    The length is that of all of a client's tensors together.
    """
    lengths = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    factors = clip_factor(lengths, longest)
    # Not in place: two parameters may have one tensor as their gradient.
    return [g * _of_each(factors, g) for g in gradients]
