"""Optimizers of one client, on a module whose tensors are views of vectors."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.module import FlatModule
from ..optimizers import Foreign, LocalOptimizer
from ..settings import TrainingSettings


def _moved(
    module: FlatModule, trained: Sequence[bool], *, everything: bool
) -> list[bool]:
    """Tell which parameters have a gradient in this step, of those that are trained."""
    fresh = module.fresh_gradients()
    pairs = zip(fresh, trained, strict=True)
    return [(own or everything) and wanted for own, wanted in pairs]


class FlatOptimizer:
    """An optimizer on a module's one vector, as long as all of it has gradients.

    Parameters
    ----------
    module : FlatModule
        What is trained.
    settings : TrainingSettings
        The rule.
    learning_rate : float
        Of the first steps.
    trained : Sequence[bool]
        Whether each of the module's parameters is trained.
    """

    def __init__(
        self,
        module: FlatModule,
        settings: TrainingSettings,
        learning_rate: float,
        trained: Sequence[bool],
    ) -> None:
        self.module = module
        self.trained = trained
        self.parameters = [module.parameters]
        self.gradients = [module.gradients]
        self.optimizer = LocalOptimizer(settings, learning_rate, self.parameters)
        if self.optimizer.remembers:
            module.fresh_gradients()  # From now on.

    def set_rate(self, rate: float) -> None:
        """Let the next steps have another learning rate."""
        self.optimizer.learning_rate = rate

    def step(self, *, everything: bool) -> None:
        """Use the gradients of this step; all parameters have one if ``everything``."""
        if not self.optimizer.remembers:  # A gradient of 0 is as good as none.
            self.optimizer.step(self.parameters, self.gradients)
            return
        fresh = _moved(self.module, self.trained, everything=everything)
        whole = all(fresh)
        if not whole and len(self.parameters) != len(fresh):
            places = [slice(e.start, e.stop) for e in self.module.layout.parameters]
            self.parameters = [self.module.parameters[place] for place in places]
            self.gradients = [self.module.gradients[place] for place in places]
            self.optimizer.divide(places)
        if whole:
            fresh = [True] * len(self.parameters)
        pairs = zip(self.gradients, fresh, strict=True)
        self.optimizer.step(self.parameters, [g if own else None for g, own in pairs])


class ForeignOptimizer:
    """An optimizer of PyTorch's or the user's on a module's own parameters.

    The parameters are those of :class:`FlatOptimizer`.
    """

    def __init__(
        self,
        module: FlatModule,
        settings: TrainingSettings,
        learning_rate: float,
        trained: Sequence[bool],
    ) -> None:
        assert isinstance(settings.rule, Foreign)
        self.module = module
        self.trained = trained
        named = dict(module.module.named_parameters())
        self.parameters = [named[e.name] for e in module.layout.parameters]
        self.optimizer = settings.rule.made(
            self.parameters, learning_rate, settings.weight_decay
        )
        module.fresh_gradients()  # From now on.

    def set_rate(self, rate: float) -> None:
        """Let the next steps have another learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, *, everything: bool) -> None:
        """Use the gradients of this step; all parameters have one if ``everything``."""
        kept = [parameter.grad for parameter in self.parameters]
        moved = _moved(self.module, self.trained, everything=everything)
        for parameter, own in zip(self.parameters, moved, strict=True):
            if not own:
                parameter.grad = None  # As it is where nothing has asked for it.
        try:
            self.optimizer.step()
        finally:
            for parameter, grad in zip(self.parameters, kept, strict=True):
                parameter.grad = grad
            self.module.fresh_gradients()  # It may have changed them itself.
