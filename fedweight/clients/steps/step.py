"""One step of a chunk of clients, batched with ``torch.vmap`` and traced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from ...core.layout import Entry
from ...core.module import FlatModule
from ..noise import LocalTraining
from ..objectives.base import Batch, Facts, Objective, defines
from ..objectives.checks import check_gradient, check_loss
from ._torch.differentiation import grad, plain_attention
from ._torch.recording import Recorder
from ._torch.rewriting import drop_idle, drop_unused, fuse_descent
from ._torch.torchscript import without_python
from .cross_entropy import OfLabels

Step = Callable[..., Any]

# How a step's inputs are batched over clients; others are, along their first axis.
SHARED = ("step",)


class StepInputs(NamedTuple):
    """What a step of C clients reads, and changes in place.

    Attributes
    ----------
    parameters, buffers, counters : list of Tensor
        ``[C, *shape]``: the clients' models so far, tensor by tensor.
    frozen : list of Tensor
        ``[*shape]``: what is the same for all.
    ends : list of Tensor
        The rows ``[C, P]`` that the parameters are views of, and the received
        parameters, ``[P]``.
    sums : list of Tensor
        Losses and hits so far, ``[C]``, and the learning rate, 0-d.
    carry : list of Tensor
        ``[C, ...]``: what clients carry, in the order of their names.
    kept : list of Tensor
        ``[C, N + 1]``: what is kept of each example; the last place is for padding.
    facts : list of Tensor
        ``[C, ...]``: what the objective wants to know of each client.
    batch : list of Tensor
        In the order of :attr:`StepNames.batch`.
    """

    parameters: list[Tensor]
    frozen: list[Tensor]
    buffers: list[Tensor]
    counters: list[Tensor]
    ends: list[Tensor]
    sums: list[Tensor]
    carry: list[Tensor]
    kept: list[Tensor]
    facts: list[Tensor]
    batch: list[Tensor]


class StepNames(NamedTuple):
    """What the tensors of a step's inputs are called.

    Attributes
    ----------
    carry, kept, facts : tuple of str
        As the objective calls them.
    batch : tuple of str
        ``x``, ``y``, ``groups`` where they are wanted, ``seeds``, ``counts`` (real
        examples of each client), ``step``, ``mask`` where a step is not full, and
        ``ids`` (each example's place among the client's) where something is kept.
    """

    carry: tuple[str, ...]
    kept: tuple[str, ...]
    facts: tuple[str, ...]
    batch: tuple[str, ...]


@dataclass
class Found:
    """What a pass over a batch finds out about a model.

    Attributes
    ----------
    with_gradient : list of int
        The parameters that the loss depends on.
    assigned : list of int
        The buffers and counters that the model assigns.
    least : int
        With fewer examples the model cannot train.
    """

    with_gradient: list[int] = field(default_factory=list)
    assigned: list[int] = field(default_factory=list)
    least: int = 1


class Besides(NamedTuple):
    """What a client's pass over its batch gives besides gradients.

    Attributes
    ----------
    loss : Tensor
        0-d.
    outputs : Tensor
        ``[n, C]``.
    assigned : list of Tensor
        The values of what the model assigned.
    carry, kept : dict of Tensor
        What is carried, and kept of each example, from now on.
    """

    loss: Tensor
    outputs: Tensor
    assigned: list[Tensor]
    carry: dict[str, Tensor]
    kept: dict[str, Tensor]


@dataclass(frozen=True)
class TracedStep:
    """A step for inputs of some shapes.

    Attributes
    ----------
    run : Callable
        Takes all tensors of the inputs, counts losses and hits, and changes the
        parameters in place where it descends; else it returns the gradients instead,
        of those parameters that have one.
    moved : list of int
        Which parameters these are.
    least : int
        With fewer examples the model cannot train.
    """

    run: Step
    moved: list[int]
    least: int


class ChunkStep:
    """Makes steps of chunks of clients.

    Parameters
    ----------
    module : FlatModule
        The architecture.
    objective : Objective
        What is minimised on a batch.
    compiled : bool
        Whether a step may leave the interpreter, as TorchScript does.
    """

    def __init__(
        self, module: FlatModule, objective: Objective, *, compiled: bool
    ) -> None:
        self.module = module
        self.objective = objective
        self.compiled = compiled
        entries = module.layout.entries
        self.parameters = list(module.layout.parameters)
        self.frozen = [e for e in entries if e.kind == "frozen"]
        self.buffers = [e for e in entries if e.kind == "buffer"]
        self.counters = [e for e in entries if e.kind == "integer"]
        # Whether a step uses another gradient than that of the loss and the penalty.
        self._own_gradient = defines(objective, "gradient")

    def trace(
        self, inputs: StepInputs, names: StepNames, *, descends: bool
    ) -> TracedStep:
        """Record the step's tensor operations, for inputs of these shapes.

        Parameters
        ----------
        inputs : StepInputs
            Whose shapes and strides the step is made for; they are not changed.
        names : StepNames
            What they are called.
        descends : bool
            Whether the step is ``w - rate * gradient``, with one rate.
        """
        # What it turns out to do while it is recorded.
        moving = set(range(len(self.buffers)))  # The buffers that it changes.
        moved: list[int] = []
        found = Found()

        def step(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            given = StepInputs(*([next(left) for _ in part] for part in inputs))
            losses, correct, rate = given.sums
            batch = dict(zip(names.batch, given.batch, strict=True))
            # vmap's BatchNorm changes running statistics only where they lie together.
            together = [
                buffer.contiguous() if k in moving else buffer
                for k, buffer in enumerate(given.buffers)
            ]
            scale = rate if descends else torch.ones_like(rate)
            gradients, besides = self._of_clients(
                given, together, names, batch, scale, found
            )
            if any(map(recorder.has_changed, given.parameters)):
                raise RuntimeError("the model changes its parameters itself")
            for k, value in zip(found.assigned, besides.assigned, strict=True):
                [*together, *given.counters][k].copy_(value)
            for k in sorted(moving):
                if recorder.has_changed(together[k]):
                    given.buffers[k].copy_(together[k])
                else:
                    moving.remove(k)
            self._count(besides, batch, losses, correct)
            penalties: Sequence[Any] = [None] * len(self.parameters)
            if not self._own_gradient and self._is_penalised(given, names):
                penalties = views(self._penalties(given, names), self.parameters)
            self._carry(given, names, batch, besides)
            of = dict(zip(found.with_gradient, gradients, strict=True))
            if not descends:
                sums = [_sum(of.get(k), p) for k, p in enumerate(penalties)]
                moved[:] = [k for k, g in enumerate(sums) if g is not None]
                return [g for g in sums if g is not None]
            for parameter, penalty in zip(given.parameters, penalties, strict=True):
                if penalty is not None:
                    parameter.sub_(penalty * rate)
            for k, gradient in of.items():
                given.parameters[k].sub_(gradient)
            return [losses]

        # Tracing runs the step, which changes tensors in place: on a copy, with the
        # same strides, as the trace depends on them, and views of the same rows.
        self.module.train()
        asked = -1
        while len(moving) != asked:  # Again without copies of buffers that stay.
            asked = len(moving)
            copies, recorder = copy.deepcopy(inputs), Recorder()
            with plain_attention():
                traced: Any = recorder.trace(step, [*chain(*copies)])
        drop_unused(traced.graph)
        drop_idle(traced.graph)
        fuse_descent(traced.graph)
        traced.recompile()
        run = traced.forward
        if self.compiled:
            run = without_python(traced, [*chain(*copies)])
        return TracedStep(run, moved, found.least)

    def change_after(self, given: StepInputs, names: StepNames) -> None:
        """Change the parameters after a step, as the objective says."""

        def of_client(row: Tensor, *others: Any) -> Tensor:
            return self.objective.after_step(row, _facts(names, *others))

        rows, received = given.ends
        of_clients: Callable[..., Any] = vmap(of_client, in_dims=(0, None, 0, 0))
        rows.copy_(of_clients(rows, received, given.facts, given.carry))

    # Parts of a step.

    def _of_clients(
        self,
        given: StepInputs,
        together: list[Tensor],
        names: StepNames,
        batch: Mapping[str, Tensor],
        scale: Tensor,
        found: Found,
    ) -> tuple[list[Tensor], Besides]:
        """Return every client's gradients, and the rest, ``[C, ...]`` each.

        Parameters
        ----------
        together : list of Tensor
            The buffers; changed in place.
        scale : Tensor
            0-d: what the gradients are multiplied by.
        """
        own = {name: batch[name] for name in batch if name not in ("counts", "ids")}
        client = {
            "facts": dict(zip(names.facts, given.facts, strict=True)),
            "carry": dict(zip(names.carry, given.carry, strict=True)),
            "kept": {
                name: values.gather(1, batch["ids"])
                for name, values in zip(names.kept, given.kept, strict=True)
            },
        }
        rows, received = given.ends
        along = {name: None if name in SHARED else 0 for name in own}
        of_client = self._of_gradient if self._own_gradient else self._of_loss
        batched: Callable[..., Any] = vmap(
            partial(of_client, found),
            in_dims=(0, 0, None, 0, 0, None, None, along, 0),
        )
        return batched(  # type: ignore[no-any-return]
            given.parameters,
            rows,
            given.frozen,
            together,
            given.counters,
            received,
            scale,
            own,
            client,
        )

    def _of_loss(
        self, found: Found, parameters: list[Tensor], row: Tensor, *others: Any
    ) -> tuple[list[Tensor], Besides]:
        """Return one client's gradients of the loss, and the rest."""
        of_loss = grad(partial(self._loss, found), found.with_gradient)
        return of_loss(parameters, *others)

    def _of_gradient(
        self,
        found: Found,
        parameters: list[Tensor],
        row: Tensor,
        frozen: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        received: Tensor,
        scale: Tensor,
        batch: Mapping[str, Tensor],
        client: Mapping[str, dict[str, Tensor]],
    ) -> tuple[list[Tensor], Besides]:
        """Return the gradients that the objective makes of some, and the rest."""
        facts = Facts(received, client["facts"], client["carry"])
        first: list[Besides] = []
        moved: set[int] = set()
        spare = [[t.clone() for t in some] for some in (buffers, counters)]

        def gradient_at(parameters: Tensor) -> Tensor:
            state, told = (buffers, counters), found
            if first:  # Its buffers stay.
                state = ([t.clone() for t in spare[0]], [t.clone() for t in spare[1]])
                told = Found()
            of_loss = grad(partial(self._loss, told), told.with_gradient)
            one = torch.ones_like(scale)
            gradients, besides = of_loss(
                _split(parameters, self.parameters),
                frozen,
                *state,
                received,
                one,
                batch,
                client,
            )
            first.append(besides)
            moved.update(told.with_gradient)
            of = dict(zip(told.with_gradient, gradients, strict=True))
            whole = [
                of[k].reshape(-1) if k in of else row.new_zeros(e.stop - e.start)
                for k, e in enumerate(self.parameters)
            ]
            penalty = self.objective.penalty_gradient(parameters, facts)
            if penalty is None:
                return torch.cat(whole)
            moved.update(range(len(self.parameters)))
            return torch.cat(whole) + penalty

        gradient = self.objective.gradient(gradient_at, row, facts)
        check_gradient(self.objective, gradient, row, len(first))
        parts = _split(gradient * scale, self.parameters)
        found.with_gradient[:] = sorted(moved)
        return [parts[k] for k in found.with_gradient], first[0]

    def _loss(
        self,
        found: Found,
        parameters: list[Tensor],
        frozen: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        received: Tensor,
        scale: Tensor,
        batch: Mapping[str, Tensor],
        client: Mapping[str, dict[str, Tensor]],
    ) -> tuple[Tensor, Besides]:
        """Return one client's loss on a batch, scaled, and the rest."""
        x, y, mask = batch["x"], batch["y"], batch.get("mask")
        stream = batch["seeds"], batch["step"]
        model = _Model(self, found, parameters, frozen, buffers, counters, stream, mask)
        facts = Facts(received, client["facts"], client["carry"])
        with OfLabels(y):
            loss = self.objective.loss(
                model,
                Batch(x, y, mask, batch.get("groups"), client["kept"], stream),
                facts,
            )
        check_loss(self.objective, loss, client["carry"], client["kept"])
        besides = Besides(
            loss.value.detach(),
            loss.outputs.detach(),
            model.assigned,
            {name: value.detach() for name, value in loss.carry.items()},
            {name: value.detach() for name, value in loss.state.items()},
        )
        return loss.value * scale, besides

    def _is_penalised(self, given: StepInputs, names: StepNames) -> bool:
        """Tell whether there is a penalty on the parameters."""
        received = given.ends[1]
        of_first = ([t[0] for t in values] for values in (given.facts, given.carry))
        facts = _facts(names, received, *of_first)
        return self.objective.penalty_gradient(received, facts) is not None

    def _penalties(self, given: StepInputs, names: StepNames) -> Tensor:
        """Return the penalty's gradient for each client, ``[C, P]``."""

        def of_client(row: Tensor, *others: Any) -> Tensor | None:
            return self.objective.penalty_gradient(row, _facts(names, *others))

        of_clients: Callable[..., Any] = vmap(of_client, in_dims=(0, None, 0, 0))
        return of_clients(*given.ends, given.facts, given.carry)  # type: ignore[no-any-return]

    def _count(
        self,
        besides: Besides,
        batch: Mapping[str, Tensor],
        losses: Tensor,
        correct: Tensor,
    ) -> None:
        """Add the clients' losses and hits to what they were so far."""
        loss, counts = besides.loss, batch["counts"]
        hits = besides.outputs.argmax(-1) == batch["y"]
        if "mask" in batch:
            hits = hits * batch["mask"]
            # A client that has ended counts no more, whatever its loss is now.
            loss = torch.where(counts > 0, loss, 0)
        correct.add_(hits.sum(1))
        losses.addcmul_(loss.to(losses.dtype), counts)

    def _carry(
        self,
        given: StepInputs,
        names: StepNames,
        batch: Mapping[str, Tensor],
        besides: Besides,
    ) -> None:
        """Take over what clients carry, and what is kept of their examples."""
        for name, values in zip(names.carry, given.carry, strict=True):
            if name in besides.carry:
                values.copy_(besides.carry[name])
        for name, values in zip(names.kept, given.kept, strict=True):
            if name in besides.kept:
                places = batch["ids"]
                if "mask" in batch:  # Padding shows the client's first example.
                    last = values.shape[1] - 1
                    places = torch.where(batch["mask"] > 0, places, last)
                values.scatter_(1, places, besides.kept[name].to(values.dtype))


class _Model:
    """The model of one client in one step, as an objective calls it."""

    def __init__(
        self,
        step: ChunkStep,
        found: Found,
        parameters: list[Tensor],
        frozen: list[Tensor],
        buffers: list[Tensor],
        counters: list[Tensor],
        stream: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> None:
        self.step = step
        self.found = found
        self.parameters = parameters
        self.frozen = frozen
        self.kept = [*buffers, *counters]
        self.entries = [*step.buffers, *step.counters]
        self.stream = stream
        self.mask = mask
        # Before the first call, which changes them.
        self.spare = [value.clone() for value in self.kept]
        self.assigned: list[Tensor] = []
        self._called = False

    def __call__(self, x: Tensor, parameters: Tensor | None = None) -> Tensor:
        """Return the logits of some inputs."""
        own, kept = self.parameters, self.kept
        if parameters is not None:
            own = _split(parameters, self.step.parameters)
        if self._called:
            kept = [value.clone() for value in self.spare]
        entries = [*self.step.parameters, *self.step.frozen, *self.entries]
        values = [*own, *self.frozen, *kept]
        state = {e.name: t for e, t in zip(entries, values, strict=True)}
        with LocalTraining(*self.stream, self.mask) as noise:
            outputs: Tensor = functional_call(self.step.module.module, state, (x,))
        self.found.least = max(self.found.least, noise.least)
        if not self._called:
            self._called = True
            self._look_for_assigned(state)
        return outputs

    def _look_for_assigned(self, state: Mapping[str, Tensor]) -> None:
        """Take the values that the model gave to buffers and counters."""
        self.found.assigned.clear()
        for k, (e, given) in enumerate(zip(self.entries, self.kept, strict=True)):
            value = state[e.name]
            if value is given:
                continue
            if value.dtype != given.dtype or value.shape != given.shape:
                raise RuntimeError(f"the buffer '{e.name}' is given another shape")
            self.found.assigned.append(k)
            self.assigned.append(value.detach())


def _facts(
    names: StepNames, received: Tensor, facts: list[Tensor], carry: list[Tensor]
) -> Facts:
    """Return what one client's objective may know."""
    known = dict(zip(names.facts, facts, strict=True))
    return Facts(received, known, dict(zip(names.carry, carry, strict=True)))


def views(rows: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors ``[C, *shape]`` as views of rows ``[C, P]``."""
    if not entries:
        return []
    parts = rows.split_with_sizes([e.stop - e.start for e in entries], 1)
    return [
        part.view(len(rows), *e.shape) for part, e in zip(parts, entries, strict=True)
    ]


def _split(row: Tensor, entries: Sequence[Entry]) -> list[Tensor]:
    """Return named tensors as views of one client's row, ``[P]``."""
    if not entries:
        return []
    parts = row.split_with_sizes([e.stop - e.start for e in entries])
    return [part.view(e.shape) for part, e in zip(parts, entries, strict=True)]


def _sum(gradient: Tensor | None, penalty: Tensor | None) -> Tensor | None:
    """Return a parameter's whole gradient, or ``None`` where it has none."""
    if gradient is None or penalty is None:
        return penalty if gradient is None else gradient
    return gradient + penalty
