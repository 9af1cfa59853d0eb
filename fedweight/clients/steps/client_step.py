"""One client's part of a step of many: its gradients and its loss on a batch.

Written for one client, and batched over clients with ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.module import FlatModule
from ..noise import LocalTraining
from ..objectives.base import Batch, Facts, Objective
from ..objectives.checks import check_gradient, check_loss
from .cross_entropy import OfLabels
from .inputs import split, views


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


class ClientStep:
    """Finds one client's gradients.

    Parameters
    ----------
    module : FlatModule
        The architecture.
    objective : Objective
        What is minimised on a batch.
    grad : Callable
        Returns a function's gradients; see :func:`._torch.differentiation.grad`.
    """

    def __init__(
        self, module: FlatModule, objective: Objective, grad: Callable[..., Any]
    ) -> None:
        self.module = module
        self.objective = objective
        self.grad = grad
        # On a CPU PyTorch's own BatchNorm can be batched.
        self.plain_norms = module.parameters.device.type != "cpu"
        entries = module.layout.entries
        self.parameters = list(module.layout.parameters)
        self.frozen = [e for e in entries if e.kind == "frozen"]
        self.buffers = [e for e in entries if e.kind == "buffer"]
        self.counters = [e for e in entries if e.kind == "integer"]
        self.trained = [objective.trains(e.name) for e in self.parameters]

    def of_loss(
        self, found: Found, parameters: list[Tensor], row: Tensor, *others: Any
    ) -> tuple[list[Tensor], Besides]:
        """Return one client's gradients of the loss, and the rest."""
        of_loss = self.grad(partial(self._loss, found), found.with_gradient)
        gradients, besides = of_loss(parameters, *others)
        return self._of_trained(found, gradients), besides

    def _of_trained(self, found: Found, gradients: list[Tensor]) -> list[Tensor]:
        """Return the gradients of what is trained; there are no others."""
        pairs = zip(found.with_gradient, gradients, strict=True)
        some = [(k, gradient) for k, gradient in pairs if self.trained[k]]
        found.with_gradient[:] = [k for k, _ in some]
        return [gradient for _, gradient in some]

    def penalties(self, rows: Tensor) -> list[Tensor | None]:
        """Return the gradients of penalties, ``[C, P]``, by parameter, if trained."""
        parts = views(rows, self.parameters)
        pairs = zip(parts, self.trained, strict=True)
        return [part if trained else None for part, trained in pairs]

    def of_objective(
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
        facts = _facts(received, client)
        first: list[Besides] = []
        moved: set[int] = set()
        spare = [[t.clone() for t in some] for some in (buffers, counters)]

        def gradient_at(parameters: Tensor) -> Tensor:
            state, told = (buffers, counters), found
            if first:  # Its buffers stay.
                state = ([t.clone() for t in spare[0]], [t.clone() for t in spare[1]])
                told = Found()
            of_loss = self.grad(partial(self._loss, told), told.with_gradient)
            one = torch.ones_like(scale)
            gradients, besides = of_loss(
                split(parameters, self.parameters),
                frozen,
                *state,
                received,
                one,
                batch,
                client,
            )
            gradients = self._of_trained(told, gradients)
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
            moved.update(k for k, trained in enumerate(self.trained) if trained)
            if not all(self.trained):
                parts = zip(split(penalty, self.parameters), self.trained, strict=True)
                some = [p if trained else torch.zeros_like(p) for p, trained in parts]
                penalty = torch.cat([part.reshape(-1) for part in some])
            return torch.cat(whole) + penalty

        gradient = self.objective.gradient(gradient_at, row, facts)
        check_gradient(self.objective, gradient, row, len(first))
        parts = split(gradient * scale, self.parameters)
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
        facts = _facts(received, client)
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


def _facts(received: Tensor, client: Mapping[str, dict[str, Tensor]]) -> Facts:
    """Return what one client's objective may know."""
    return Facts(received, client["facts"], client["carry"], client["shared"])


class _Model:
    """The model of one client in one step, as an objective calls it."""

    def __init__(
        self,
        step: ClientStep,
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
            own = split(parameters, self.step.parameters)
        if self._called:
            kept = [value.clone() for value in self.spare]
        entries = [*self.step.parameters, *self.step.frozen, *self.entries]
        values = [*own, *self.frozen, *kept]
        state = {e.name: t for e, t in zip(entries, values, strict=True)}
        plain = self.step.plain_norms
        with LocalTraining(*self.stream, self.mask, plain=plain) as noise:
            outputs: Tensor = self.step.module.with_values(state, x)
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
