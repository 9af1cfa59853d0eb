"""One step of one client, on a module as PyTorch runs it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ...core.errors import ClientError
from ...core.layout import FlatModel
from ...core.module import FlatModule
from ..noise import LocalTraining, Streams
from ..objectives.base import Batch, Facts, Loss, Objective, defines
from ..objectives.checks import (
    check_gradient,
    check_loss,
    check_outputs,
    check_vector,
)
from .carried import carry_of, facts_of, kept_of, shared_of
from .predictions import predictions
from .task import Task


class ModuleStep:
    """Finds the gradients of one client's steps.

    Parameters
    ----------
    module : FlatModule
        Loaded with what the client trains.
    start : FlatModel
        The global model as received.
    task : Task
        The client's.
    objective : Objective
        What is minimised on a batch.
    noisy : bool
        Whether the model may draw noise in any step. Otherwise one that draws none in
        its first step is taken to draw none.

    Attributes
    ----------
    carry : dict[str, Tensor]
        What the client carries after the last step.
    kept : dict[str, Tensor]
        ``[n]`` each: what is kept of its examples.
    """

    def __init__(
        self,
        module: FlatModule,
        start: FlatModel,
        task: Task,
        objective: Objective,
        *,
        noisy: bool,
    ) -> None:
        device = module.parameters.device
        self.module = module
        self.objective = objective
        self.noisy = noisy
        self.key = task.noise_key
        self.looks = True  # Whether it draws noise is known after its first step.
        self.received = start.parameters.to(device)
        facts = facts_of(task, start.parameters)
        self.facts = {name: value.to(device) for name, value in facts.items()}
        shared = shared_of(task, start.parameters)
        self.shared = {name: value.to(device) for name, value in shared.items()}
        predict = partial(predictions, module, start)
        carried = carry_of(objective, task, start.parameters, predict)
        self.carry = {name: value.to(device) for name, value in carried.items()}
        if defines(objective, "look"):
            module.load(start if task.own is None else task.own)
        # Half precision is too coarse for what grows by little.
        dtype = torch.promote_types(module.parameters.dtype, torch.float32)
        like = module.parameters.new_empty(len(task.examples), dtype=dtype)
        self.kept = {
            name: torch.as_tensor(kept_of(name, value, task)).to(like).expand_as(like)
            for name, value in objective.per_example.items()
        }
        entries = module.layout.parameters
        self.trained = [objective.trains(e.name) for e in entries]
        self._held: Tensor | None = None
        if not all(self.trained):
            sizes = torch.tensor([e.stop - e.start for e in entries])
            held = torch.tensor([not trained for trained in self.trained])
            self._held = held.repeat_interleave(sizes).to(device)
        self._own_gradient = defines(objective, "gradient")
        self._calls_again = self._own_gradient or defines(objective, "loss")
        self._changes_after = defines(objective, "after_step")

    def gradient(self, batch: Batch, rows: Tensor, step: int) -> tuple[Loss, bool]:
        """Put the gradient of a step where the module has its gradients.

        Parameters
        ----------
        batch : Batch
            The step's examples.
        rows : Tensor
            ``[n]``: their places among the client's examples.
        step : int
            The number of the step, from 0.

        Returns
        -------
        tuple
            What the objective found, and whether every parameter has a gradient, as
            where there is a penalty.
        """
        module, facts = self.module, self._facts()
        batch.stream = self.key, step
        if self.kept:
            batch.state = {n: v.index_select(0, rows) for n, v in self.kept.items()}
        before = _Before.of(module, self.noisy) if self._calls_again else None
        if not self._own_gradient:
            loss = self._backward(batch, facts, step, before, first=True)
            penalty = self._penalty(facts)
            if penalty is not None:
                module.gradients.add_(penalty)
            self._hold(module.gradients)
            self._keep(loss, rows)
            return loss, penalty is not None
        found: list[Loss] = []
        own, penalised = module.parameters.clone(), False

        def gradient_at(parameters: Tensor) -> Tensor:
            nonlocal penalised
            module.parameters.copy_(parameters)
            loss = self._backward(batch, facts, step, before, first=not found)
            found.append(loss)
            penalty = self._penalty(facts)
            penalised = penalty is not None
            gradient = module.gradients.clone()
            if penalty is not None:
                gradient.add_(penalty)
            return self._hold(gradient)

        try:
            gradient = self.objective.gradient(gradient_at, own.clone(), facts)
        finally:
            module.parameters.copy_(own)
        check_gradient(self.objective, gradient, own, len(found))
        module.gradients.copy_(gradient)
        self._hold(module.gradients)
        self._keep(found[0], rows)
        return found[0], penalised

    def _penalty(self, facts: Facts) -> Tensor | None:
        """Return the gradient of a penalty, ``[P]``, if there is one."""
        parameters = self.module.parameters
        penalty = self.objective.penalty_gradient(parameters, facts)
        if penalty is not None:
            check_vector(self.objective, "penalty_gradient", penalty, parameters)
        return penalty

    def _hold(self, gradient: Tensor) -> Tensor:
        """Make a gradient 0, in place, where nothing is trained."""
        return gradient if self._held is None else gradient.masked_fill_(self._held, 0)

    def change_after(self) -> None:
        """Change the parameters after a step, as the objective says."""
        if self._changes_after:
            facts = self._facts()
            with torch.no_grad():
                parameters = self.module.parameters
                found = self.objective.after_step(parameters, facts)
                check_vector(self.objective, "after_step", found, parameters)
                parameters.copy_(found)

    def _facts(self) -> Facts:
        """Return what the objective may know now."""
        return Facts(self.received, self.facts, self.carry, self.shared)

    def _backward(
        self,
        batch: Batch,
        facts: Facts,
        step: int,
        before: _Before | None,
        *,
        first: bool,
    ) -> Loss:
        """Find the loss of a batch, and its gradient."""
        batch.begin()
        model = _Model(self, step, before, first=first)
        loss = self.objective.loss(model, batch, facts)
        check_loss(self.objective, loss, self.carry, batch.state)
        if model.gives is not None:
            check_outputs(self.objective, loss, (len(batch.y), *model.gives))
        self.module.gradients.zero_()
        loss.value.backward()  # type: ignore[no-untyped-call]
        return loss

    def _keep(self, loss: Loss, rows: Tensor) -> None:
        """Take over what the client carries, and what is kept of its examples."""
        if loss.carry:
            self.carry |= {name: value.detach() for name, value in loss.carry.items()}
        for name, value in loss.state.items():
            kept = self.kept[name]
            self.kept[name] = kept.index_copy(0, rows, value.detach().to(kept))


class _Model:
    """The model in a step, as an objective calls it.

    Attributes
    ----------
    gives : tuple of int, optional
        The shape of what it gives for an example, once it was called.
    """

    gives: tuple[int, ...] | None = None

    def __init__(
        self, client: ModuleStep, step: int, before: _Before | None, *, first: bool
    ) -> None:
        self.client = client
        self.step = step
        self.before = before
        self.first = first

    def __call__(self, x: Tensor, parameters: Tensor | None = None) -> Tensor:
        """Return the logits of some inputs."""
        client = self.client
        noise = LocalTraining(client.key, self.step) if client.looks else None
        with noise or nullcontext():
            if self.first and parameters is None:
                outputs = client.module(x)
            else:
                outputs = self._again(x, parameters)
        if not isinstance(outputs, Tensor):
            raise ClientError(
                f"the model returned {type(outputs).__name__}, not one tensor of "
                "logits, [n, C]."
            )
        self.gives = tuple(outputs.shape[1:])
        if self.first:
            client.looks = client.noisy or (noise is not None and noise.layers > 0)
        self.first = False
        return outputs

    def _again(self, x: Tensor, parameters: Tensor | None) -> Tensor:
        """Call the model with the buffers and streams that the first call had."""
        assert self.before is not None
        module = self.client.module
        state = {name: value.clone() for name, value in self.before.buffers.items()}
        if parameters is not None:
            entries = module.layout.parameters
            parts = parameters.split_with_sizes([e.stop - e.start for e in entries])
            pairs = zip(entries, parts, strict=True)
            state |= {e.name: part.view(e.shape) for e, part in pairs}
        with self.before.streams or nullcontext():
            outputs: Tensor = module.with_values(state, module.laid_out(x))
        return outputs


class _Before:
    """What a step's calls of the model begin with.

    Attributes
    ----------
    buffers : dict[str, Tensor]
        The module's buffers and counters.
    streams : Streams, optional
        The process's random streams, where the model draws from them.
    """

    def __init__(self, buffers: dict[str, Tensor], streams: Streams | None) -> None:
        self.buffers = buffers
        self.streams = streams

    @classmethod
    def of(cls, module: FlatModule, noisy: bool) -> _Before:
        """Take note of what there is before a step."""
        buffers = {n: b.detach().clone() for n, b in module.module.named_buffers()}
        device = module.parameters.device
        return cls(buffers, Streams(device) if noisy else None)
