"""One step of a chunk of clients, batched with ``torch.vmap``, traced or as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from ...core.module import FlatModule
from ..noise import STREAMS
from ..objectives.base import Objective, defines
from ._torch.differentiation import grad, plain_attention
from ._torch.recording import Recorder
from ._torch.rewriting import drop_idle, drop_unused, fuse_descent
from ._torch.torchscript import without_python
from .client_step import Besides, ClientStep, Found
from .gradients import plain_grad, public_grad
from .hits import hits_of
from .inputs import SHARED, StepInputs, StepNames, facts_of_client

Step = Callable[..., Any]

# How what an objective sees of clients is batched over them.
OF_CLIENTS = {"facts": 0, "carry": 0, "kept": 0, "shared": None}


@dataclass(frozen=True)
class MadeStep:
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
        self.client = ClientStep(module, objective, grad)
        # Whether a step uses another gradient than that of the loss and the penalty.
        self._own_gradient = defines(objective, "gradient")

    def trace(
        self, inputs: StepInputs, names: StepNames, *, descends: bool
    ) -> MadeStep:
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
        moving = set(range(len(self.client.buffers)))  # The buffers that it changes.
        moved: list[int] = []
        found = Found()

        def step(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            given = StepInputs(*([next(left) for _ in part] for part in inputs))
            return self._do(
                given,
                names,
                found,
                moving,
                moved,
                recorder.has_changed,
                recorder.may_have_changed,
                descends=descends,
            )

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
        return MadeStep(run, moved, found.least)

    def eager(
        self, inputs: StepInputs, names: StepNames, *, descends: bool
    ) -> MadeStep:
        """Return a step that PyTorch's public functions make anew every time.

        It is slower than a traced one, and stands on nothing that PyTorch keeps to
        itself or has announced to drop. The arguments are those of :meth:`trace`.
        """
        self.module.train()
        # What the loss depends on, torch.func does not tell: seen on one client.
        first = self._of_first(inputs, names)
        client = ClientStep(self.module, self.objective, public_grad(first))
        moved: list[int] = []

        def step(*tensors: Tensor) -> list[Tensor]:
            left = iter(tensors)
            given = StepInputs(*([next(left) for _ in part] for part in inputs))
            before = [parameter._version for parameter in given.parameters]
            of_parameters = dict(zip(map(id, given.parameters), before, strict=True))

            def has_changed(tensor: Tensor) -> bool:
                return tensor._version != of_parameters[id(tensor)]

            def may_have_changed(buffer: Tensor) -> bool:
                return True  # If it has not, it is copied where it already is.

            every = set(range(len(client.buffers)))
            # The choice of kernels is that of all threads.
            with STREAMS.alone(), plain_attention():
                return self._do(
                    given,
                    names,
                    Found(),
                    every,
                    moved,
                    has_changed,
                    may_have_changed,
                    descends=descends,
                    client=client,
                )

        return MadeStep(step, moved, first.least)

    def change_after(self, given: StepInputs, names: StepNames) -> None:
        """Change the parameters after a step, as the objective says."""

        def of_client(row: Tensor, *others: Any) -> Tensor:
            return self.objective.after_step(row, facts_of_client(names, *others))

        rows, received = given.ends
        of_clients: Callable[..., Any] = vmap(of_client, in_dims=(0, None, 0, 0, None))
        told = given.facts, given.carry, given.shared
        rows.copy_(of_clients(rows, received, *told))

    # Parts of a step.

    def _do(
        self,
        given: StepInputs,
        names: StepNames,
        found: Found,
        moving: set[int],
        moved: list[int],
        has_changed: Callable[[Tensor], bool],
        may_have_changed: Callable[[Tensor], bool],
        *,
        descends: bool,
        client: ClientStep | None = None,
    ) -> list[Tensor]:
        """Do a step.

        Parameters
        ----------
        given : StepInputs
            What it starts from, and changes.
        names : StepNames
            What they are called.
        found : Found
            Is told what the model does.
        moving : set of int
            The buffers that the model may change; those that it does not are removed.
        moved : list of int
            Is told of which parameters there are gradients.
        has_changed : Callable
            Tells whether a parameter has been changed in the step.
        may_have_changed : Callable
            Tells whether a buffer has been, or may have been without a word.
        descends : bool
            Whether the step is ``w - rate * gradient``, with one rate.
        client : ClientStep, optional
            Finds each client's gradients.

        Returns
        -------
        list of Tensor
            The gradients, where the step does not descend.
        """
        losses, correct, rate = given.sums
        batch = dict(zip(names.batch, given.batch, strict=True))
        # vmap's BatchNorm changes running statistics only where they lie together.
        together = [
            buffer.contiguous() if k in moving else buffer
            for k, buffer in enumerate(given.buffers)
        ]
        scale = rate if descends else torch.ones_like(rate)
        gradients, besides = self._of_clients(
            given, together, names, batch, scale, found, client or self.client
        )
        if any(map(has_changed, given.parameters)):
            raise RuntimeError("the model changes its parameters itself")
        for k, value in zip(found.assigned, besides.assigned, strict=True):
            [*together, *given.counters][k].copy_(value)
        for k in sorted(moving):
            if may_have_changed(together[k]):
                given.buffers[k].copy_(together[k])
            else:
                moving.remove(k)
        self._count(besides, batch, losses, correct)
        penalties: Sequence[Any] = [None] * len(self.client.parameters)
        if not self._own_gradient and self._is_penalised(given, names):
            penalties = self.client.penalties(self._penalties(given, names))
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

    def _of_clients(
        self,
        given: StepInputs,
        together: list[Tensor],
        names: StepNames,
        batch: Mapping[str, Tensor],
        scale: Tensor,
        found: Found,
        step: ClientStep,
    ) -> tuple[list[Tensor], Besides]:
        """Return every client's gradients, and the rest, ``[C, ...]`` each.

        Parameters
        ----------
        together : list of Tensor
            The buffers; changed in place.
        scale : Tensor
            0-d: what the gradients are multiplied by.
        step : ClientStep
            Finds those of one client.
        """
        own, client = _of_objective(given, names, batch)
        rows, received = given.ends
        along = {name: None if name in SHARED else 0 for name in own}
        of_client = step.of_objective if self._own_gradient else step.of_loss
        batched: Callable[..., Any] = vmap(
            partial(of_client, found),
            in_dims=(0, 0, None, 0, 0, None, None, along, OF_CLIENTS),
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

    def _of_first(self, given: StepInputs, names: StepNames) -> Found:
        """Return what a step of the first client finds out; it changes nothing."""
        found, step = Found(), ClientStep(self.module, self.objective, plain_grad)
        of_client = step.of_objective if self._own_gradient else step.of_loss
        batch = dict(zip(names.batch, given.batch, strict=True))
        own, client = _of_objective(given, names, batch)
        rows, received = given.ends
        of_client(
            found,
            [t[0].clone() for t in given.parameters],
            rows[0].clone(),
            given.frozen,
            [t[0].clone() for t in given.buffers],
            [t[0].clone() for t in given.counters],
            received,
            torch.ones_like(given.sums[2]),
            {name: t if name in SHARED else t[0] for name, t in own.items()},
            {
                part: some
                if OF_CLIENTS[part] is None
                else {n: t[0] for n, t in some.items()}
                for part, some in client.items()
            },
        )
        return found

    def _is_penalised(self, given: StepInputs, names: StepNames) -> bool:
        """Tell whether there is a penalty on the parameters."""
        received = given.ends[1]
        known, carry = ([t[0] for t in part] for part in (given.facts, given.carry))
        facts = facts_of_client(names, received, known, carry, given.shared)
        return self.objective.penalty_gradient(received, facts) is not None

    def _penalties(self, given: StepInputs, names: StepNames) -> Tensor:
        """Return the penalty's gradient for each client, ``[C, P]``."""

        def of_client(row: Tensor, *others: Any) -> Tensor | None:
            return self.objective.penalty_gradient(row, facts_of_client(names, *others))

        of_clients: Callable[..., Any] = vmap(of_client, in_dims=(0, None, 0, 0, None))
        told = given.facts, given.carry, given.shared
        return of_clients(*given.ends, *told)  # type: ignore[no-any-return]

    def _count(
        self,
        besides: Besides,
        batch: Mapping[str, Tensor],
        losses: Tensor,
        correct: Tensor,
    ) -> None:
        """Add the clients' losses and hits to what they were so far."""
        loss, counts = besides.loss, batch["counts"]
        hits = hits_of(besides.outputs, batch["y"], ahead=1)
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


def _of_objective(
    given: StepInputs, names: StepNames, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return what an objective sees of a batch, and of each client, by name."""
    own = {name: batch[name] for name in batch if name not in ("counts", "ids")}
    kept = {
        name: values.gather(1, batch["ids"])
        for name, values in zip(names.kept, given.kept, strict=True)
    }
    facts = dict(zip(names.facts, given.facts, strict=True))
    carry = dict(zip(names.carry, given.carry, strict=True))
    shared = dict(zip(names.shared, given.shared, strict=True))
    return own, {"facts": facts, "carry": carry, "kept": kept, "shared": shared}


def _sum(gradient: Tensor | None, penalty: Tensor | None) -> Tensor | None:
    """Return a parameter's whole gradient, or ``None`` where it has none."""
    if gradient is None or penalty is None:
        return penalty if gradient is None else gradient
    return gradient + penalty
