"""What a local objective is, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...core.errors import ClientError, ConfigurationError
from ...core.options import ByName
from ..noise import GAMMA_UNIFORMS, log_gamma, uniform
from . import OBJECTIVES

Fact = Literal["class-counts", "class-totals", "groups", "round"]

_NOTHING: Mapping[str, Tensor] = {}

# How names of facts begin that a strategy tells.
TOLD = "told "


@dataclass
class Batch:
    """Examples of one client for one step.

    Attributes
    ----------
    x : Tensor
        Inputs, ``[n, ...]``.
    y : Tensor
        Labels: ``[n]``, int64, or as the task has its targets.
    mask : Tensor, optional
        ``[n]``, 1 for an example and 0 for padding; ``None`` where nothing is padded.
    groups : Tensor, optional
        ``[n]``, int64: the code of each example's group, from 0, for an objective that
        wants ``"groups"``.
    state : Mapping[str, Tensor]
        ``[n]`` each: what the objective keeps of these examples, by its names.
    stream : tuple of Tensor, optional
        The client's key of random numbers and the number of the step.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    groups: Tensor | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    stream: tuple[Tensor | int, Tensor | int] | None = None
    _drawn: int = 0

    def begin(self) -> None:
        """Let the next random numbers be the first ones of the step again."""
        self._drawn = 0

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Average a value of each example, ``[n]``, over the real examples.

        Parameters
        ----------
        values : Tensor
            ``[n]``.
        weights : Tensor, optional
            ``[n]``, 0 or more: how much each example counts. They are scaled to a mean
            of 1 over the real examples, so that a step is no longer and no shorter for
            them. Where all are 0 the mean is 0.

        Raises
        ------
        ClientError
            If values or weights are not one for each example, which broadcasting would
            hide.
        """
        if values.shape != self.y.shape[:1]:
            raise ClientError(
                f"an objective must give one loss for each of {len(self.y)} examples, "
                f"shape [{len(self.y)}], got shape {list(values.shape)}. Take "
                "reduction='none', and outputs.squeeze(-1) where a model gives one "
                "number an example."
            )
        if weights is not None:
            if weights.shape != values.shape:
                raise ClientError(
                    f"batch.mean takes one weight for each of {len(self.y)} examples, "
                    f"shape [{len(self.y)}], got shape {list(weights.shape)}."
                )
            if self.mask is not None:
                weights = torch.where(self.mask > 0, weights, 0)
            # Chosen, not multiplied: 0 times infinity is not 0.
            values = torch.where(weights > 0, values, 0)
            total = weights.sum()
            share = weights / torch.where(total > 0, total, 1)
            return (share * values).sum()
        if self.mask is None:
            return values.mean()
        # Chosen, not multiplied: 0 times infinity is not 0.
        real = torch.where(self.mask > 0, values, 0)
        return real.sum() / self.mask.sum().clamp(min=1)

    def uniform(self, *shape: int) -> Tensor:
        """Return random numbers in [0, 1), float32, of a shape that begins with n.

        They depend on the client, the step and how many were drawn in the step before:
        they are the same alone and among other clients, on any engine.
        """
        if self.stream is None:
            raise ConfigurationError(
                "objective: batch.uniform has no stream here; it has one in training."
            )
        key, step = self.stream
        self._drawn += 1
        key = torch.as_tensor(key, device=self.x.device)
        # Layers of the model that draw noise have the numbers from 1.
        return uniform(key, step, -self._drawn, torch.Size(shape))

    def log_gamma(self, shape: Tensor) -> Tensor:
        """Return logarithms of gamma-distributed random numbers, ``[n]``.

        Of small shapes the numbers themselves would be 0. For random shares that sum
        to one (Dirichlet's), take the softmax; see :meth:`uniform`.

        Parameters
        ----------
        shape : Tensor
            ``[n]``: the distributions' shapes, 0 or more; 0 gives ``-inf``.
        """
        return log_gamma(shape, self.uniform(len(shape), GAMMA_UNIFORMS))


class Loss(NamedTuple):
    """What an objective finds on a batch.

    Attributes
    ----------
    value : Tensor
        0-d: what is minimised; autograd can follow it.
    outputs : Tensor
        The model's logits, ``[n, C]``, by which hits are counted.
    carry : Mapping[str, Tensor]
        What the client carries from now on, as :meth:`Objective.begin` names it; what
        is not in it stays as it was.
    state : Mapping[str, Tensor]
        ``[n]`` each: what is kept of these examples from now on.
    """

    value: Tensor
    outputs: Tensor
    carry: Mapping[str, Tensor] = _NOTHING
    state: Mapping[str, Tensor] = _NOTHING


class Model(Protocol):
    """The model in a step, as an objective calls it.

    Every call of a step has the same noise, such as dropout's, and starts from the
    same buffers; the first call's buffers stay.
    """

    def __call__(self, x: Tensor, parameters: Tensor | None = None) -> Tensor:
        """Return the logits of some inputs, ``[n, C]``.

        Parameters
        ----------
        x : Tensor
            ``[n, ...]``.
        parameters : Tensor, optional
            ``[P]``: others than the local model's own, such as ``facts.received``.
        """


class Facts:
    """What an objective may know of its client in a round.

    Parameters
    ----------
    received : Tensor
        ``[P]``: the parameters of the global model that the client received.
    known : Mapping[str, Tensor]
        What the objective ``wants``, by name.
    carry : Mapping[str, Tensor]
        What the client carries from step to step, and from round to round: as
        :meth:`Objective.begin` made it, or the last step left it.
    shared : Mapping[str, Tensor]
        ``[P]`` each: what the objective hears of every parameter.
    """

    def __init__(
        self,
        received: Tensor,
        known: Mapping[str, Tensor] = _NOTHING,
        carry: Mapping[str, Tensor] = _NOTHING,
        shared: Mapping[str, Tensor] = _NOTHING,
    ) -> None:
        self.received = received
        self.carry = carry
        self._known = known
        self._shared = shared

    @property
    def class_counts(self) -> Tensor:
        """How many training examples of each class the client has, ``[C]``, float."""
        return self._wanted("class-counts")

    @property
    def class_totals(self) -> Tensor:
        """How many training examples of each class all clients have, ``[C]``, float."""
        return self._wanted("class-totals")

    @property
    def group_counts(self) -> Tensor:
        """How many training examples of each group the client has, ``[G]``, float."""
        return self._wanted("groups")

    @property
    def round(self) -> Tensor:
        """The number of the round, from 1, 0-d, float."""
        return self._wanted("round")

    def told(self, name: str) -> Tensor:
        """Return what the strategy told by a name that is in ``hears``, float.

        0-d where it is a number, ``[n]`` where it is several, ``[P]`` where it is a
        value of each parameter.
        """
        if name in self._shared:
            return self._shared[name]
        if TOLD + name not in self._known:
            raise ConfigurationError(
                f"objective: what is told as '{name}' is known only to one that hears "
                f"it. Name it: hears = ('{name}',)."
            )
        return self._known[TOLD + name]

    def _wanted(self, name: Fact) -> Tensor:
        if name not in self._known:
            raise ConfigurationError(
                f"objective: '{name}' is known only to one whose 'wants' has it. Add "
                f"it: wants = ('{name}',)."
            )
        return self._known[name]


class Objective:
    """What a client minimises on a batch.

    Most define :meth:`example_losses` alone. An objective is a value: the same object
    serves every client, and what changes with a client is in ``facts.carry`` and
    ``batch.state``. Many clients train at once where what it does can be batched: so
    write ``torch.where`` for a boolean mask, a comparison with ``torch.arange(C)`` for
    ``F.one_hot``, and no ``.item()`` or ``unique``. One that cannot be batched trains
    one client after another, and a warning says why.

    Attributes
    ----------
    wants : collection of str
        What it reads of ``facts`` and ``batch``: ``"class-counts"``,
        ``"class-totals"``, ``"groups"``, ``"round"``.
    hears : tuple of str
        What it reads of what the strategy tells, by each name a number, a list of
        them, or a value of each parameter; a client that is not told fails.
    pools : Mapping[str, int]
        Of what it hears, what is added up over clients, by the name of the probe that
        measures it: a round from which on clients are asked, until some have answered.
        They are told the sums from the next round on; until then it hears what
        ``unheard`` returns.
    group : str
        The attribute of the examples that groups them, where it wants ``"groups"``.
    per_example : Mapping[str, float]
        What is kept of each training example across steps and rounds, by name, and
        what it is at first.
    tasks : tuple of str
        Which tasks it is for, where it names some: another is refused.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[Collection[Fact]] = ()
    hears: ClassVar[tuple[str, ...]] = ()
    pools: Mapping[str, int] = {}
    group: str = ""
    per_example: Mapping[str, float] = {}

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return, for what it ``hears``, something that a strategy might tell.

        A trial of the model, in which there is no server, is made with it; of what it
        ``pools`` that is what it takes before it is told.

        Parameters
        ----------
        x : Tensor
            A few inputs, ``[n, ...]``.
        facts : Facts
            What is known besides; of the received model how many parameters it has.
        """
        return {}

    def begin(self, facts: Facts) -> Mapping[str, Tensor]:
        """Return what the client carries before its first step in its first round."""
        return {}

    def look(
        self, predict: Callable[[], Tensor], labels: Tensor, facts: Facts
    ) -> Mapping[str, Tensor]:
        """Return what changes of what a client carries, before a round's first step.

        Called for one client at a time, on the CPU, so it may ask for values.

        Parameters
        ----------
        predict : Callable[[], Tensor]
            Returns the received model's logits, ``[n, C]``, on all of the client's
            training examples, in evaluation mode. It costs a pass over them.
        labels : Tensor
            Their labels, ``[n]``, int64.
        facts : Facts
            With what is carried from earlier rounds, or what ``begin`` returned.
        """
        return {}

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of each example, ``[n]``, that autograd can follow.

        Parameters
        ----------
        outputs : Tensor
            The model's logits, ``[n, C]``.
        batch : Batch
            The examples; of padding the values do not count.
        facts : Facts
            What is known of the client.
        """
        raise NotImplementedError(
            f"objective {type(self).__name__} must define example_losses, batch_loss "
            "or loss."
        )

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the loss of a batch, 0-d: the mean of the examples' losses.

        One that is no such mean defines this. Average with ``batch.mean``, so that
        padding does not count.
        """
        return batch.mean(self.example_losses(outputs, batch, facts))

    def loss(self, model: Model, batch: Batch, facts: Facts) -> Loss:
        """Return what is minimised on a batch, and what is kept from it.

        One that looks at features, calls the model several times, or changes what is
        carried or kept, defines this.
        """
        outputs = model(batch.x)
        return Loss(self.batch_loss(outputs, batch, facts), outputs)

    def penalty_gradient(self, parameters: Tensor, facts: Facts) -> Tensor | None:
        """Return what a penalty on the parameters adds to the gradient, ``[P]``.

        Parameters
        ----------
        parameters : Tensor
            The local model now, ``[P]``.
        facts : Facts
            With the global model that the client received.
        """
        return None

    def gradient(
        self,
        gradient_at: Callable[[Tensor], Tensor],
        parameters: Tensor,
        facts: Facts,
    ) -> Tensor:
        """Return the gradient that the step uses, ``[P]``.

        One that takes several gradients a step, or masks them, defines this.

        Parameters
        ----------
        gradient_at : Callable[[Tensor], Tensor]
            Returns the gradient of the batch's loss and penalty at some parameters,
            ``[P]``. Loss, hits and what is carried are those of the first call.
        parameters : Tensor
            The local model now, ``[P]``.
        facts : Facts
            What is known of the client.
        """
        return gradient_at(parameters)

    def after_step(self, parameters: Tensor, facts: Facts) -> Tensor:
        """Return the parameters after a step, ``[P]``, such as masked ones."""
        return parameters

    def trains(self, name: str) -> bool:
        """Return whether a parameter of the model is trained; by default all are.

        The optimiser leaves alone what is not, as if no loss depended on it.

        Parameters
        ----------
        name : str
            The parameter's name in the model's state dict.
        """
        return True


# A field that a file gives by name, such as the objective that SAM is around.
NamedObjective = Annotated[Objective, ByName(OBJECTIVES)]


class Around(Objective):
    """An objective that changes something of another one, and leaves all else to it.

    One that changes the examples' losses, or the batch's loss, takes the other one's
    from ``inner.example_losses`` or ``inner.batch_loss``; it is refused around one that
    makes its loss in another way, which would be left out.

    Attributes
    ----------
    inner : Objective
        The other one.
    """

    inner: Objective

    @property
    def wants(self) -> frozenset[Fact]:  # type: ignore[override]
        """What the other one wants."""
        return frozenset(self.inner.wants)

    @property
    def hears(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other one hears."""
        return self.inner.hears

    @property
    def pools(self) -> Mapping[str, int]:  # type: ignore[override]
        """What of that is added up over clients."""
        return self.inner.pools

    @property
    def group(self) -> str:  # type: ignore[override]
        """By what the other one groups examples."""
        return self.inner.group

    @property
    def per_example(self) -> Mapping[str, float]:  # type: ignore[override]
        """What the other one keeps of each example."""
        return self.inner.per_example

    def unheard(self, x: Tensor, facts: Facts) -> Mapping[str, Tensor]:
        """Return what the other one might be told."""
        return self.inner.unheard(x, facts)

    def begin(self, facts: Facts) -> Mapping[str, Tensor]:
        """Return what the other one carries."""
        return self.inner.begin(facts)

    def look(
        self, predict: Callable[[], Tensor], labels: Tensor, facts: Facts
    ) -> Mapping[str, Tensor]:
        """Return what the other one carries from there on."""
        return self.inner.look(predict, labels, facts)

    def example_losses(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the other one's losses."""
        return self.inner.example_losses(outputs, batch, facts)

    def batch_loss(self, outputs: Tensor, batch: Batch, facts: Facts) -> Tensor:
        """Return the other one's loss, or the mean of the examples' own losses."""
        if changes(self, "example_losses"):
            return super().batch_loss(outputs, batch, facts)
        return self.inner.batch_loss(outputs, batch, facts)

    def loss(self, model: Model, batch: Batch, facts: Facts) -> Loss:
        """Return the other one's loss, or its own of a batch."""
        if changes(self, "example_losses") or changes(self, "batch_loss"):
            return super().loss(model, batch, facts)
        return self.inner.loss(model, batch, facts)

    def penalty_gradient(self, parameters: Tensor, facts: Facts) -> Tensor | None:
        """Return the other one's penalty."""
        return self.inner.penalty_gradient(parameters, facts)

    def gradient(
        self,
        gradient_at: Callable[[Tensor], Tensor],
        parameters: Tensor,
        facts: Facts,
    ) -> Tensor:
        """Return the other one's gradient."""
        return self.inner.gradient(gradient_at, parameters, facts)

    def after_step(self, parameters: Tensor, facts: Facts) -> Tensor:
        """Return what the other one makes of them."""
        return self.inner.after_step(parameters, facts)

    def trains(self, name: str) -> bool:
        """Return whether the other one trains it."""
        return self.inner.trains(name)


def of_its_own(objective: Objective) -> Objective:
    """Return what a client minimises for itself, whatever the strategy tells.

    It is what is inside the objectives that hear the strategy: these make a client
    train for the others, such as for the group that the global model serves worst. What
    is added up over clients is heard there, too.
    """
    while isinstance(objective, Around) and {*objective.hears} - {*objective.pools}:
        objective = objective.inner
    return objective


def tracks(objective: Objective) -> bool:
    """Tell whether an objective wants to know, carry or keep anything of a client."""
    keeps = bool(objective.per_example) or defines(objective, "begin")
    return keeps or bool(objective.wants or objective.hears)


def changes(objective: Around, name: str) -> bool:
    """Tell whether one that is around another has a method of its own."""
    return getattr(type(objective), name) is not getattr(Around, name)


def defines(objective: Objective, name: str) -> bool:
    """Tell whether an objective, or one inside it, does something of its own there.

    Parameters
    ----------
    objective : Objective
        Such as SAM around the proximal objective.
    name : str
        A method, such as ``"gradient"``.
    """
    if isinstance(objective, Around) and not changes(objective, name):
        return defines(objective.inner, name)
    return getattr(type(objective), name) is not getattr(Objective, name)
