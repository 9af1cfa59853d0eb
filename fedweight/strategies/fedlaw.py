"""FedLAW: learn on the server how much each client counts, and how much to shrink.

Zexi Li et al., "Revisiting Weighted Aggregation in Federated Learning with Neural
Networks", ICML 2023. The next model is ``gamma * sum_k lambda_k w_k``; a small
labelled proxy set on the server decides lambda and gamma. Details that the paper
leaves open follow its authors' code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import field
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR

from ..core.batches import batches, least_examples
from ..core.errors import ConfigurationError
from ..core.layout import Entry, FlatModel, as_tensor, is_finite
from ..core.module import FlatModule
from ..core.options import GIVEN
from ..core.rng import Purpose, generator, torch_seed
from ..core.threads import one_thread
from ..core.updates import Updates
from .base import WeightingStrategy
from .round import Round
from .weights import cap

# The two-stage variant averages theta from this epoch on, at this learning rate.
SWA_START, SWA_RATE = 5, 0.05


class Proxy(Protocol):
    """Labelled examples: ``x`` of shape ``[n, ...]`` and classes ``y``, ``[n]``."""

    @property
    def x(self) -> Any:  # noqa: D102
        ...

    @property
    def y(self) -> Any:  # noqa: D102
        ...


class FedLAW(WeightingStrategy):
    """Learn the clients' weights and a shrinking factor on a proxy set.

    Every round starts afresh from ``lambda = p`` (``exp``) or uniform (``quad``) and
    ``gamma = 1``, and minimises the cross-entropy of ``gamma * sum_k lambda_k w_k`` on
    the proxy set. The weights lambda sum to one; gamma scales the *model*, not the
    step, so below 1 it is a weight decay on the server.

    Parameters
    ----------
    model : nn.Module
        The architecture, returning class scores ``[n, C]``. It is copied.
    proxy : Examples
        Labelled examples held by the server, ``x`` and ``y`` as arrays or tensors.
        Never part of the test set (the authors' code cuts it from there).
    form : {"exp", "quad"}
        ``exp``: ``lambda = softmax(theta)``, ``gamma = exp(phi)``. ``quad``:
        ``lambda = theta^2 / sum theta^2``, ``gamma = phi^2``.
    server_epochs : int
        0 or more passes over the proxy set; 0 is FedAvg (``exp``).
    batch_size : int
        1 or more proxy examples a step.
    optimizer : {"adam", "sgd"}
        Adam with betas (0.5, 0.999), or SGD with momentum 0.9.
    learning_rate : float
        Above 0. The authors' 0.01 is for CIFAR-10, 0.005 for their other data.
    swa : bool
        Two stages of half the epochs each (the second has one more where they are
        odd): first lambda with stochastic weight averaging of theta, then gamma.
        Unverified in detail.
    shrink : float, optional
        Above 0: learn nothing, use ``gamma = shrink`` and ``lambda = p`` (the paper's
        analysis of a fixed gamma). 1 is FedAvg.
    max_log_shrink : float
        Above 0; gamma, where it is learned, stays between ``exp(-max_log_shrink)`` and
        its inverse. Nothing else bounds it: a step of Adam may be longer than the
        learning rate while the gradient grows, as it does in deep networks.
    revert_if_worse : bool
        Use FedAvg where the learned model has a higher proxy loss than FedAvg's. Ours.
    coherence : bool
        Log each client's ``sum_{j != k} p_j cos(update_k, update_j)``, which the paper
        analyses and does not use; unverified. It costs a few inner products a client.
    proxy_statistics : bool
        Running statistics come from the proxy batches, as in the authors' code. False
        averages the clients' by data size.
    device : str
        Where the proxy set is evaluated.

    Notes
    -----
    The model stays in training mode on the proxy set, as in the authors' code: a
    BatchNorm sees the batch's statistics, which cancel much of gamma's effect. Their
    code halves the learning rate after 20 epochs, so never within the default; here
    it stays.
    """

    needs: ClassVar[tuple[str, ...]] = ("model", "proxy")
    caps_weights: ClassVar[bool] = True

    model: Annotated[nn.Module, GIVEN]
    proxy: Annotated[Proxy, GIVEN]
    form: Literal["exp", "quad"] = "exp"
    server_epochs: Annotated[int, Field(ge=0)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 128
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    swa: bool = False
    shrink: Annotated[float, Field(gt=0)] | None = None
    max_log_shrink: Annotated[float, Field(gt=0)] = 1.0
    revert_if_worse: bool = True
    coherence: bool = True
    proxy_statistics: bool = False
    device: Annotated[str, GIVEN] = "cpu"
    _held: _Held = field(init=False)

    def __post_init__(self) -> None:
        """Copy the model to where the proxy set is evaluated."""
        super().__post_init__()
        buffers = {name for name, _ in self.model.named_buffers()}
        named = self.model.named_parameters()
        frozen = {name for name, p in named if not p.requires_grad}
        for name, value in {"buffers": buffers, "frozen": frozen}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        held = _Held(self.model, self.proxy, self.device)
        object.__setattr__(self, "_held", held)

    @property
    def of_classes(self) -> bool:
        """True: what it learns on the proxy set is a cross-entropy."""
        return True

    def aggregate(self, round: Round) -> Tensor:
        """Return ``gamma * sum_k lambda_k w_k``."""
        self._begin(round)
        p = cap(round.size_weights, self.max_share)
        average = self._shrunk(round, p, 1.0)
        before = self._loss(average)
        weights, gamma = self._learn(round) if self.shrink is None else (p, self.shrink)
        weights = cap(weights, self.max_share)
        parameters = self._shrunk(round, weights, gamma)
        after = self._loss(parameters)
        worse = not after <= before  # NaN is worse
        reverted = worse and self.revert_if_worse and self.shrink is None
        if reverted:
            weights, gamma, parameters = p, 1.0, average
        round.log("weight", weights)
        round.log("gamma", gamma)
        round.log("proxy-loss-before", before)
        round.log("proxy-loss-after", after)
        round.log("reverted", reverted)
        if self.coherence:
            round.log("coherence", coherence(round.updates, p))
        return parameters

    def _shrunk(self, round: Round, weights: Tensor, gamma: float) -> Tensor:
        """Return ``gamma * sum_k weights_k w_k``; what nobody changed stays."""
        origin = round.model.parameters
        model = round.updates.combine(weights).add_(origin).mul_(gamma)
        round.keep_still(model)
        return model

    def aggregate_buffers(self, round: Round, buffers: Updates) -> Tensor:
        """Return the clients' mean, or what the proxy batches left."""
        if self.proxy_statistics:
            return self._held.module.save().buffers
        return super().aggregate_buffers(round, buffers)

    def _learn(self, round: Round) -> tuple[Tensor, float]:
        """Return lambda and gamma after ``server_epochs`` on the proxy set."""
        k = round.num_clients
        # What each step makes stays where the proxy set is: nobody waits for it.
        x = start(round.size_weights, self.form).to(self.device).requires_grad_()
        if not self.swa:
            optimizer = self._optimizer(x)
            for epoch in range(self.server_epochs):
                for batch in self._batches(round.number, epoch):
                    x.grad = self._gradient(round, x.detach(), batch)
                    optimizer.step()
                    self._clamp(x)
            return self._split(x)
        half = self.server_epochs // 2
        optimizer = self._optimizer(x)
        cosine = CosineAnnealingLR(optimizer, T_max=100)
        swa = SWALR(optimizer, swa_lr=SWA_RATE)
        total, count = torch.zeros_like(x), 0
        for epoch in range(half):
            for batch in self._batches(round.number, epoch):
                x.grad = self._gradient(round, x.detach(), batch)
                x.grad[k] = 0.0
                optimizer.step()
            if epoch > SWA_START:
                total, count = total + x.detach(), count + 1
                swa.step()
            else:
                cosine.step()
        if count:
            x = (total / count).requires_grad_()
        optimizer = self._optimizer(x)
        for epoch in range(half, self.server_epochs):
            for batch in self._batches(round.number, epoch):
                x.grad = self._gradient(round, x.detach(), batch)
                x.grad[:k] = 0.0
                optimizer.step()
                self._clamp(x)
        return self._split(x)

    def _optimizer(self, x: Tensor) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam([x], lr=self.learning_rate, betas=(0.5, 0.999))
        return torch.optim.SGD([x], lr=self.learning_rate, momentum=0.9)

    def _split(self, x: Tensor) -> tuple[Tensor, float]:
        weights, gamma = split(x.detach().cpu(), self.form)
        return weights, float(gamma)

    def _clamp(self, x: Tensor) -> None:
        """Keep gamma within its bounds."""
        limit = self.max_log_shrink
        with torch.no_grad():
            if self.form == "exp":
                x[-1].clamp_(-limit, limit)
            else:
                x[-1].clamp_(np.exp(-limit / 2), np.exp(limit / 2))

    def _gradient(self, round: Round, x: Tensor, batch: Tensor) -> Tensor:
        """Return the gradient of the batch's loss by ``x``, one backward pass."""
        weights, gamma = split(x, self.form)
        mean = round.updates.combine(weights).add_(self._held.there(round.model))
        self._held.module.parameters.copy_(mean).mul_(gamma)
        round.keep_still(self._held.module.parameters)
        self._held.module.gradients.zero_()
        loss = self._held.cross_entropy(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        g = self._held.module.gradients.to(round.model.layout.dtype)
        for place in round.still:
            g[place] = 0.0  # Neither lambda nor gamma moves it.
        inner = round.updates.dot(g)
        return chain(x, self.form, inner, torch.dot(g.to(mean.dtype), mean))

    def _begin(self, round: Round) -> None:
        """Load the global model; its parameters are overwritten, its buffers used."""
        ours, theirs = self._held.module.layout, round.model.layout
        model = round.model
        if theirs == ours.travelling:
            model = self._held.base.complete(model)
        elif ours != theirs:
            pairs = zip_longest(ours.entries, theirs.entries)
            mine, other = next(pair for pair in pairs if pair[0] != pair[1])
            raise ConfigurationError(
                "model: FedLAW was given another model than the clients train. It has "
                f"{_describe(mine)} where theirs has {_describe(other)}."
            )
        self._held.module.load(model)
        self._held.module.train()
        self._held.seed = torch_seed(self.seed, Purpose.SERVER, round.number)
        self._held.step = 0

    def _batches(self, round: int, epoch: int) -> Iterator[Tensor]:
        """Yield the indices of an epoch's batches, in an order of its own."""
        stream = generator(self.seed, Purpose.SERVER, round, epoch + 1)
        order = torch.from_numpy(stream.permutation(len(self._held.y))).to(self.device)
        for part in batches(len(order), self.batch_size, self._held.least):
            yield order[part]

    def _loss(self, parameters: Tensor) -> float:
        """Return the mean loss on the whole proxy set, as the optimiser sees it."""
        self._held.module.parameters.copy_(parameters)
        self._held.step = 0
        total = torch.zeros((), dtype=torch.float64, device=self._held.x.device)
        with torch.no_grad():
            for batch in self._batches(0, 0):
                total += self._held.cross_entropy(batch).double() * len(batch)
        return float(total) / len(self._held.y)


class _Held:
    """What the server holds to learn on: the model, the proxy set, random numbers.

    Attributes
    ----------
    module : FlatModule
        The model, overwritten at every step.
    base : Base
        What of it no round changes.
    x, y : Tensor
        The proxy set, where it is evaluated.
    least : int
        How many examples the model needs to train.
    seed, step : int
        Of the round's random numbers, and how many steps have drawn some.
    """

    def __init__(self, model: nn.Module, proxy: Proxy, device: str) -> None:
        self.seed = self.step = 0
        self.module = FlatModule(copy.deepcopy(model), device)
        self.base = self.module.copy_base()
        self._global: tuple[FlatModel | None, Tensor] = None, self.module.parameters
        self.x = _tensor(proxy.x).to(device)
        self.y = _tensor(proxy.y).to(device, torch.int64)
        if self.x.is_floating_point():
            self.x = self.x.to(self.module.layout.dtype)
        if not len(self.y) or len(self.x) != len(self.y):
            raise ConfigurationError(
                f"proxy has {len(self.x)} inputs and {len(self.y)} labels: FedLAW "
                "needs one label an input, and at least one of each. Without labelled "
                "data on the server use fedavg."
            )
        self.least = least_examples(self._can_train)
        if len(self.y) < self.least:
            raise ConfigurationError(
                "proxy has 1 example, and this model cannot train on one alone, as "
                "where it has BatchNorm. Give it 2 or more."
            )

    def there(self, model: FlatModel) -> Tensor:
        """Return the global model's parameters, brought there once a round."""
        if self._global[0] is not model:
            self._global = model, model.parameters.to(self.x.device)
        return self._global[1]

    def _can_train(self, k: int) -> bool:
        """Try whether the model can train on so many proxy examples."""
        module, rows = self.module, torch.arange(k) % len(self.y)
        module.train()
        module.gradients.zero_()
        devices = [self.x.device] if self.x.is_cuda else []
        with torch.random.fork_rng(devices):
            try:
                scores = module(self.x[rows])
                loss = nn.functional.cross_entropy(scores, self.y[rows])
                loss.backward()  # type: ignore[no-untyped-call]
            except Exception:
                return False
        return is_finite(loss.detach()) and is_finite(module.gradients)

    def cross_entropy(self, batch: Tensor) -> Tensor:
        """Return the mean loss of a batch; dropout draws from this round's stream."""
        self.step += 1
        devices = [self.x.device] if self.x.is_cuda else []
        with torch.random.fork_rng(devices):
            # Not torch.manual_seed: it takes down the call stack for devices that are
            # not there, at every step.
            torch.default_generator.manual_seed(self.seed + self.step)
            if devices:
                with torch.cuda.device(self.x.device):
                    torch.cuda.manual_seed(self.seed + self.step)
            scores = self.module(self.x[batch])
        return nn.functional.cross_entropy(scores, self.y[batch])


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else as_tensor(np.asarray(values))


def _describe(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    return f"the {entry.kind} '{entry.name}' {list(entry.shape)} {entry.dtype}"


def start(p: Tensor, form: str) -> Tensor:
    """Return where ``x = [theta_1 .. theta_K, phi]`` starts.

    ``exp`` starts at data size; ``quad`` at uniform weights, whatever the data size.
    """
    if form == "exp":
        return torch.cat([p.double().log(), torch.zeros(1, dtype=torch.float64)])
    theta = torch.full((len(p),), len(p) ** -0.5, dtype=torch.float64)
    return torch.cat([theta, torch.ones(1, dtype=torch.float64)])


def split(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return lambda, ``[K]``, and gamma, a scalar, of ``x``, ``[K + 1]``."""
    theta, phi = x[:-1], x[-1]
    if form == "exp":
        return torch.softmax(theta, 0), phi.exp()
    return theta.square() / theta.square().sum(), phi.square()


def chain(x: Tensor, form: str, inner: Tensor, along: Tensor) -> Tensor:
    """Return the loss's gradient by ``x``, ``[K + 1]``.

    Parameters
    ----------
    x : Tensor
        Shape ``[K + 1]``; theta and phi.
    form : {"exp", "quad"}
        How lambda and gamma are made of them.
    inner : Tensor
        Shape ``[K]``; ``<g, update_k>``, with g the gradient by the model's
        parameters at ``gamma v``, ``v = sum_k lambda_k w_k``.
    along : Tensor
        ``<g, v>``.
    """
    weights, gamma = split(x, form)
    # <g, w_k - v>: the global model drops out, since the weights sum to one.
    apart = inner - torch.dot(weights, inner)
    if form == "exp":
        return torch.cat([gamma * weights * apart, (gamma * along)[None]])
    theta, phi = x[:-1], x[-1]
    slope = 2 * theta / theta.square().sum()
    return torch.cat([gamma * slope * apart, (2 * phi * along)[None]])


def coherence(updates: Updates, p: Tensor) -> Tensor:
    """Return how well each update agrees with the others', ``[K]``, in [-1, 1].

    ``sum_{j != k} p_j cos(update_k, update_j)``; 0 for an update of 0. Made of the
    weighted sum of all updates of length 1, less each one's own part.
    """
    lengths, shares = updates.norms(), p.to(updates.dtype)
    there = lengths > 0
    units = torch.where(there, lengths, 1.0).to(updates.dtype)[:, None]
    inner = torch.zeros_like(p)
    with one_thread():
        for _, sheet in updates.sheets():
            # All of one length: then one that is tiny costs no other its digits.
            units, own, inner = (v.to(sheet.device) for v in (units, shares, inner))
            sheet.div_(units)
            inner += torch.mv(sheet, torch.mv(sheet.T, own))
    inner = inner.cpu()
    others = p.sum() - p
    return torch.where(there, inner - shares, 0.0).clamp(-others, others)
