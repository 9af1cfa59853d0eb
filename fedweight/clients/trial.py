"""What a trial finds out about a model, before clients train it.

How a model may be trained does not show before it is: whether it looks across a batch,
draws random numbers, or needs two examples. So a few steps on a few examples are made
with it, and compared.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context
from torch import nn

from ..core.precision import Precision, gpu_arithmetic
from ..core.threads import as_in_a_new_thread, one_thread
from ..data.examples import Examples
from ..data.federated import ClientData
from .coding import Coding
from .noise import own_streams
from .objectives import Objective
from .own_objectives import check_own
from .samples import Kind, Samples
from .settings import TrainingSettings
from .trying import Findings, mixes_examples, try_alone, try_batched

T = TypeVar("T")

log = logging.getLogger("fedweight")


class Trials:
    """What trials have found out about an app's model; each is made once.

    It travels with the app to other processes.

    Parameters
    ----------
    make : Callable[[], nn.Module]
        Makes the architecture.
    data : Callable[[Context], ClientData]
        Returns a client's data.
    objective : Objective
        What is minimised on a batch.
    settings : TrainingSettings
        How many examples a batch has.
    device : str
        Where training runs.
    sizes : Sequence[int], optional
        How many examples clients have.
    coding : Coding
        How classes and groups are coded.
    precision : {"fp32", "tf32", "bf16"}
        In which clients compute.
    traced : bool
        Whether steps of many clients at once are traced.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        data: Callable[[Context], ClientData],
        objective: Objective,
        settings: TrainingSettings,
        device: str,
        sizes: Sequence[int] | npt.NDArray[np.int64] | None,
        coding: Coding,
        *,
        precision: Precision = "fp32",
        traced: bool = True,
    ) -> None:
        self.make = make
        self.data = data
        self.objective = objective
        self.settings = settings
        self.device = device
        self.sizes = sizes
        self.coding = coding
        self.precision = precision
        self.traced = traced
        self._kind: Kind | None = None
        self._found: dict[tuple[str, Kind], Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock behind."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with what is known."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def kind(self, context: Context) -> Kind | None:
        """Return the kind of the first clients' inputs; ``None`` if they have none."""
        if self._kind is None:
            self._kind = Samples(self.data, context, self.sizes).kind()
        return self._kind

    def alone(
        self,
        kind: Kind,
        context: Context,
        own: Examples | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Findings:
        """Return how clients train one after another; see :func:`try_alone`.

        ``own`` are a client's own examples, for where the first ones have none.
        """

        def ask(examples: Examples) -> Findings:
            return try_alone(
                self.make,
                examples,
                self.objective,
                self._device,
                cancelled,
                self.coding,
            )

        return self._ask("alone", kind, context, own, ask, Findings(), cancelled)

    def batched(
        self,
        kind: Kind,
        context: Context,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> str:
        """Return why clients must not train at once; see :func:`try_batched`.

        The first time a warning says it, too.
        """
        known: str | None = self._found.get(("at once", kind))
        if known is not None:
            return known
        findings = self.alone(kind, context, None, cancelled)

        def ask(examples: Examples) -> str:
            return try_batched(
                self.make,
                examples,
                self.objective,
                self._device,
                findings,
                self.settings.batch_size,
                cancelled,
                self.coding,
                precision=self.precision,
                traced=self.traced,
            )

        failed = "no trial with the first clients' examples succeeded"
        why = self._ask("at once", kind, context, None, ask, failed, cancelled)
        if why:
            with own_streams(0, torch.device(self._device)):
                name = type(self.make()).__name__
            log.warning("model %s trains one client after another: %s.", name, why)
        return why

    def check(self, context: Context) -> None:
        """Refuse an objective with which no client can train; see :func:`check_own`.

        Where nobody has examples here, nothing can be said.
        """
        kind = self.kind(context)
        few = None if kind is None else Samples(self.data, context, self.sizes).of(kind)
        with self._computing():
            for examples in few or ():
                check_own(
                    self.make, examples, self.objective, self._device, self.coding
                )
                return

    def mixes_examples(self, kind: Kind, context: Context, own: Examples) -> bool:
        """Tell whether evaluation mixes clients; see :func:`mixes_examples`."""

        def ask(examples: Examples) -> bool:
            return mixes_examples(self.make, examples, self._device)

        return self._ask("mixes", kind, context, own, ask, False)

    @property
    def _device(self) -> str:
        """Where trials run: not on a GPU that only the workers have."""
        gpu = torch.cuda.is_available() or not self.device.startswith("cuda")
        return self.device if gpu else "cpu"

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute as clients do, and nobody else makes a trial meanwhile."""
        products = gpu_arithmetic(self.precision, self._device)
        with self._lock, as_in_a_new_thread(), one_thread(), products:
            yield

    def _ask(
        self,
        question: str,
        kind: Kind,
        context: Context,
        own: Examples | None,
        ask: Callable[[Examples], T],
        otherwise: T,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> T:
        """Return what a trial says, which is made once for a kind of input.

        A trial that fails is made again with others' examples, and then given up: the
        error will be that of the clients. Where there are no examples it waits.
        """
        if (question, kind) in self._found:
            known: T = self._found[question, kind]
            return known
        with self._computing():
            answer: T = self._found.get((question, kind), otherwise)
            if (question, kind) in self._found:
                return answer
            tried = False
            for examples in Samples(self.data, context, self.sizes).of(kind, own):
                tried = True
                try:
                    answer = ask(examples)
                except Exception as error:
                    if cancelled():
                        raise
                    log.debug("a trial of the model failed: %s", error)
                else:
                    break
            if tried:
                self._found[question, kind] = answer
            return answer
