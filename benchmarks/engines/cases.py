"""What ``gpu.py`` measures: a case for each row."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .results import Row

# Seconds that a row may take.
LIMIT = 40.0

# Strategies that look at every update, beside FedAvg.
WEIGHED = ("fedlaw", "fedce", "ida")


@dataclass(frozen=True)
class Case:
    """What a row is measured of.

    Attributes
    ----------
    kind : {"card", "rounds", "trainer", "quick start", "tests", "plans"}
        What is done: whole rounds, training alone, the whole quick start, the tests
        that need a card, or the plan that auto chooses beside plans by hand.
    work : str
        Of rounds and plans a name such as ``S100``; of the trainer the model and how
        many clients train at once; of the quick start its strategy.
    engine : str
        Who runs rounds; who trains, where that is not fedweight.
    device : {"card", "cpu", "auto"}
        Where clients train; ``card`` is what the command line says.
    plan : str
        How fedweight trains them; how exact the products of Triton by hand are.
    strategy : str
        How fedweight weighs them.
    workers : int
        How many processes share the card; 0 is as many as cores.
    limit : float
        Seconds that it may take.
    """

    kind: str
    work: str = ""
    engine: str = ""
    device: str = "card"
    plan: str = "auto"
    strategy: str = "fedavg"
    workers: int = 0
    limit: float = LIMIT

    @property
    def name(self) -> str:
        """What the row is called; no other has that name."""
        words = [self.kind, self.work, self.engine]
        if self.strategy != "fedavg":
            words.append(self.strategy)
        if self.engine in ("local", "ray", "triton") or self.kind == "quick start":
            words.append(self.plan)
        if self.workers:
            words.append(f"{self.workers} workers")
        if self.device != "card":
            words.append(f"device {self.device}")
        return ", ".join(filter(None, words))

    @property
    def is_engine(self) -> bool:
        """Whether a process of :mod:`engines.processes` measures it."""
        return self.kind not in ("tests", "plans")

    def row(self) -> Row:
        """Return what is written of it before it is measured."""
        own = ("kind", "work", "engine", "strategy", "device")
        return {"row": self.name, **{n: getattr(self, n) for n in own}, "note": ""}


def rounds(work: str, *engines: str, **how: Any) -> list[Case]:
    """Return a work's cases: engines, fedweight's with a plan, as in ``local loop``."""
    cases = []
    for engine in engines:
        name, _, plan = engine.partition(" ")
        case = Case("rounds", work, name, plan=plan or "auto", **how)
        if name in ("ray", "flwr"):
            case = replace(case, workers=4)
        if name in ("jax", "flwr"):  # Compiling takes long, and so does Flower's start.
            case = replace(case, limit=60.0)
        cases.append(case)
    return cases


def all_cases() -> list[Case]:
    """Return what is measured, the most important first."""
    by_hand = {
        "S100": "batched-100", "S1000": "batched-1000", "S10000": "batched-2000",
        "M100": "batched-100", "M1000": "batched-100", "G100": "batched-100",
        "G1000": "batched-1000", "L4": "loop", "L20": "loop",
    }  # fmt: skip
    local = {work: f"local {plan}" for work, plan in by_hand.items()}
    trainer = [Case("trainer", f"S{n}") for n in (4096, 1024, 256)]
    trainer += [Case("trainer", f"M{n}") for n in (256, 1024, 4096)]
    # Several forms are compiled, to take the quickest.
    in_triton = [
        Case("trainer", f"S{n}", "triton", plan=precision, limit=60.0)
        for n, precision in ((4096, "ieee"), (256, "ieee"), (4096, "tf32x3"))
    ]
    quick = [
        Case("quick start", work=strategy, plan=plan, device=device)
        for strategy in ("fedavg", "fedlaw", "ida")
        for device, plan in (("auto", "auto"), ("card", "batched-20"), ("cpu", "auto"))
    ]
    weighed = [
        case
        for strategy in WEIGHED
        for case in rounds("S1000", local["S1000"], strategy=strategy)
    ]
    return [
        Case("card", limit=150.0),  # Before anything is in the disk's cache.
        *rounds("S1000", "floor", local["S1000"], "local auto", "jax", limit=60.0),
        *rounds("S100", "floor", local["S100"], "local auto", "ray batched-25"),
        *rounds("S100", "flwr", "jax"),
        *trainer[:1],
        *in_triton[:1],
        *rounds("M100", "floor", local["M100"], "local auto", "jax"),
        *quick[:3],
        Case("tests", limit=120.0),
        *rounds("S10000", local["S10000"], "local auto"),
        *rounds("M1000", local["M1000"], "local auto"),
        *trainer[1:],
        *in_triton[1:],
        *weighed,
        *quick[3:5],
        *quick[6:8],
        *rounds("G100", "floor", local["G100"], "local auto"),
        *rounds("L4", "floor", local["L4"], "local auto"),
        *rounds("L20", "floor", local["L20"], "local auto"),
        *rounds("S100", "pfl", "ray auto"),
        *(
            Case("plans", n, limit=60.0)
            for n in ("S1000", "M100", "S100", "G100", "L4")
        ),
        *rounds("M100", "local loop", "ray batched-25", "flwr", "pfl"),
        *rounds("S1000", "ray batched-250", "pfl", "local loop"),
        *rounds("S1000", "local auto", device="cpu"),
        *rounds("M100", "local auto", device="cpu"),
        *rounds("G1000", local["G1000"], "local auto"),
        *rounds("S10000", "jax"),
        *rounds("M1000", "jax"),
        *rounds("S10000", "floor", device="cpu"),
        *rounds("M1000", "floor"),
        *(replace(case, device="cpu", plan="loop") for case in weighed),
        *quick[5:6],
        *quick[8:],
    ]


def small(case: Case) -> Case:
    """Return a case that takes a CPU a moment, to try the program."""
    sizes = {4: 2, 20: 3, 100: 4, 256: 2, 1000: 6, 1024: 4, 4096: 6, 10_000: 8}
    numbers = [int(n) for n in re.findall(r"\d+", case.work)]
    work = case.work[:1] + str(sizes[numbers[0]]) if numbers else case.work
    plan = "batched-2" if case.plan.startswith("batched") else case.plan
    workers = 2 if case.workers else 0
    # Here the machine may have other work to do, and no card waits meanwhile.
    limit = 5 * case.limit
    return replace(case, work=work, plan=plan, workers=workers, limit=limit)
