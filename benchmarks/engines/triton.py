"""Training of many clients at once, as one program for a card, written in Triton.

Started and measured as :mod:`engines.trainer`, and does the same: orders are drawn
anew in every update, losses and hits are summed, the models are rows of one matrix.
Model S only, and plain SGD, with or without momentum. It is no part of fedweight: what
it shows on a card tells whether that would pay.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedweight.clients import TrainingSettings
from fedweight.clients.steps.schedule import Schedule
from fedweight.clients.steps.task import Tasks
from fedweight.core.module import FlatModule
from fedweight.data.parts import Parts

from . import trainer
from .triton_mlp import train_clients
from .work import BATCH, CLASSES, INPUT_SHAPES, LEARNING_RATE
from .worker import Worker

# Rows of models begin at multiples of so many values, so that a thread moves four.
ALIGNED = 32

Precision = Literal["ieee", "tf32x3"]

# Products of tiles have no side below this.
LEAST_SIDE = 16


@dataclass(frozen=True)
class Shape:
    """How a program is laid out on a card.

    Attributes
    ----------
    tile : int
        Inputs whose weights are in a processor at a time.
    warps : int
        Of 32 threads, that train a client together.
    stages : int
        Tiles that are on their way at a time.
    """

    tile: int
    warps: int
    stages: int

    def __str__(self) -> str:
        """Say so."""
        return f"tiles of {self.tile}, {self.warps} warps, {self.stages} stages"


# They differ in how often shared memory is read and how many clients a processor has.
SHAPES = (Shape(32, 4, 3), Shape(32, 2, 2), Shape(64, 4, 2), Shape(32, 8, 2))


class Orders:
    """Puts each update's orders on a device while it trains with the ones before.

    Parameters
    ----------
    size : tuple of int
        Of all orders of an update.
    device : torch.device
        Where they are read.

    Attributes
    ----------
    on_device : Tensor
        The last ones.
    """

    def __init__(self, size: tuple[int, ...], device: torch.device) -> None:
        self.on_device = torch.empty(size, dtype=torch.int64, device=device)
        on_card = device.type == "cuda"
        self._places = [
            torch.empty(size, dtype=torch.int64, pin_memory=on_card) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in self._places] if on_card else []
        self._turn = 0

    def put(self, orders: npt.NDArray[np.int64]) -> None:
        """Put them there, once the device has done what it was told before."""
        self._turn = 1 - self._turn
        place = self._places[self._turn]
        if self._copied:  # Nobody may still be reading what is overwritten.
            self._copied[self._turn].synchronize()
        place.copy_(torch.from_numpy(orders))
        self.on_device.copy_(place, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


class ManyMLPs:
    """Trains clients of an MLP with one hidden layer at once.

    Parameters
    ----------
    module : FlatModule
        Where all begin; it lies on the device. Hidden units are a power of 2, 16 or
        more.
    settings : TrainingSettings
        SGD, its momentum and the size of a batch; nothing else of them is looked at.
    tasks : Tasks
        Clients whose examples are rows of common arrays.
    learning_rate : float
        Of all.
    precision : {"ieee", "tf32x3"}
        Of products: float32's own, or three of the tensor cores, whose sum comes near.
    shapes : Sequence[Shape]
        The quickest is taken on a card, the first elsewhere.

    Attributes
    ----------
    losses, correct : Tensor
        ``[C]``: sums over the examples that the last training met.
    shape : Shape
        The one that was taken.
    """

    def __init__(
        self,
        module: FlatModule,
        settings: TrainingSettings,
        tasks: Tasks,
        learning_rate: float,
        precision: Precision = "ieee",
        shapes: Sequence[Shape] = SHAPES,
    ) -> None:
        parts = tasks.examples
        assert isinstance(parts, Parts)
        device, clients = module.parameters.device, len(tasks)
        weight, _, weight_2, _ = (e.shape for e in module.layout.parameters)
        self._tasks, self._first = tasks, parts.first
        self._plan = plan = Schedule.of(tasks, settings.batch_size, 1)
        x, y = torch.from_numpy(parts.whole.x), torch.from_numpy(parts.whole.y)
        self._orders = Orders((plan.total, clients, plan.width), device)
        size = self._size = module.layout.num_parameters
        stride = triton.cdiv(size, ALIGNED) * ALIGNED
        self._models = torch.empty(clients, stride, device=device)
        velocities = self._models
        if settings.momentum:
            velocities = torch.empty_like(self._models)
        self.losses = torch.empty(clients, device=device)
        self.correct = torch.empty_like(self.losses)
        self._given = {
            "x_all": x.flatten(1).to(device),
            "y_all": y.to(device),
            "rows": self._orders.on_device,
            "counts": plan.counts.to(device),
            "steps": torch.from_numpy(plan.steps).to(device),
            "start": module.parameters.clone(),
            "models": self._models,
            "velocities": velocities,
            "losses": self.losses,
            "correct": self.correct,
            "clients": clients,
            "stride": stride,
            "rate": learning_rate,
            "momentum": settings.momentum,
            "INPUTS": weight[1],
            "HIDDEN": weight[0],
            "CLASSES": weight_2[0],
            "PADDED": side(weight_2[0]),
            "WIDTH": plan.width,
            "BATCH": side(plan.width),
            "MOMENTUM": settings.momentum > 0,
            "PRECISION": precision,
        }
        self._draw()
        self.shape = shapes[0]
        if device.type == "cuda" and len(shapes) > 1:
            self.shape = min(shapes, key=self._seconds)

    def train(self) -> Tensor:
        """Train all from the start; return their models ``[C, P]``, kept until then."""
        self._draw()
        self._launch(self.shape)
        return self._models[:, : self._size]

    def _draw(self) -> None:
        self._orders.put(self._plan.rows(self._tasks, self._first))

    def _seconds(self, shape: Shape) -> float:
        """Return how long all take; what is compiled first does not count."""
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self._launch(shape)
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _launch(self, shape: Shape) -> None:
        train_clients[(len(self._tasks),)](
            **self._given,
            TILE=shape.tile,
            num_warps=shape.warps,
            num_stages=shape.stages,
            enable_fp_fusion=True,
        )


def side(size: int) -> int:
    """Return a side of a tile that such a size fits in."""
    return max(LEAST_SIDE, triton.next_power_of_2(size))


def at_once(
    model: str, tasks: Tasks, device: str, precision: Precision = "ieee"
) -> tuple[ManyMLPs, Callable[[], Tensor]]:
    """Return what trains the clients at once, adds them up, and returns ``[C, P]``."""
    module = trainer.make(model, device)
    many = ManyMLPs(module, trainer.SETTINGS, tasks, LEARNING_RATE, precision)
    total = torch.zeros_like(module.parameters)
    weights = torch.full((len(tasks),), 1 / len(tasks), device=device)

    def update() -> Tensor:
        rows = many.train()
        torch.mv(rows.T, weights, out=total)
        return rows

    return many, update


@dataclass(frozen=True)
class Needs:
    """What the compiled program takes of a processor, for each client at a time.

    Attributes
    ----------
    registers : int
        Of a thread; a processor of an H200 has 65,536.
    spilled : int
        Bytes of a thread for which there were no registers.
    shared : int
        Bytes of shared memory; a processor of an H200 has 227 KB.
    """

    registers: int
    spilled: int
    shared: int


def compiled(
    shape: Shape, precision: Precision, *, momentum: bool, capability: int = 90
) -> tuple[Needs, str]:
    """Compile for model S and a card that need not be here.

    Returns
    -------
    Needs
        What it takes.
    str
        What Triton made of it, before it became instructions.
    """
    inputs, hidden = math.prod(INPUT_SHAPES["S"]), 64
    fixed = {"INPUTS": inputs, "HIDDEN": hidden, "CLASSES": CLASSES}
    fixed |= {"PADDED": side(CLASSES), "WIDTH": BATCH, "BATCH": side(BATCH)}
    fixed |= {"TILE": shape.tile, "MOMENTUM": momentum, "PRECISION": precision}
    kinds = dict.fromkeys(train_clients.arg_names, "*fp32")
    kinds |= dict.fromkeys(("y_all", "rows", "steps"), "*i64")
    kinds |= {"clients": "i32", "stride": "i32", "rate": "fp32", "momentum": "fp32"}
    kinds |= dict.fromkeys(fixed, "constexpr")
    aligned = {
        (k,): [["tt.divisibility", 16]]
        for k, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or name == "stride"
    }
    made = triton.compile(
        ASTSource(train_clients, kinds, fixed, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": shape.warps,
            "num_stages": shape.stages,
            "enable_fp_fusion": True,
        },
    )
    dump = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.check_output([dump, "-res-usage", file.name], text=True)
    counts = {name: int(n) for name, n in re.findall(r"([A-Z]+):(\d+)", said)}
    needs = Needs(counts["REG"], counts["STACK"], made.metadata.shared)
    return needs, made.asm["ttgir"]


def main() -> None:
    """Run updates as told."""
    worker = Worker(f"Triton {triton.__version__}, PyTorch {torch.__version__}")
    if sys.argv[2] != "S":
        sys.exit(f"Triton by hand has no model {sys.argv[2]}")
    if sys.argv[4] == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("Triton needs a card; TRITON_INTERPRET=1 tries it on a CPU")
    precision: Any = sys.argv[5]

    def made(model: str, tasks: Tasks, device: str) -> Callable[[], Tensor]:
        many, update = at_once(model, tasks, device, precision)
        worker.facts["plan"] = str(many.shape)
        return update

    trainer.run(worker, made)


if __name__ == "__main__":
    main()
