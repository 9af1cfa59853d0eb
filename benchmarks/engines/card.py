"""What a card can do, and what is done on it.

Started as an engine it measures the device that its second argument names: its facts
are the card's name, versions, and how much it does in a second.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "numpy", "flwr", "ray", "jax", "pfl")


@dataclass(frozen=True)
class Card:
    """What a card does in a second.

    Attributes
    ----------
    launches : float
        Operations on a single number, one after another in a CUDA graph.
    bytes : float
        Read and written by copying 1 GiB.
    operations : float
        Floating-point operations of a large float32 matrix product.
    """

    launches: float
    bytes: float
    operations: float

    @classmethod
    def measured(cls, seconds: float) -> Card:
        """Measure the CUDA device, about so many seconds for each figure."""
        one = torch.zeros(1, device="cuda")
        source = torch.zeros(1 << 28, device="cuda")
        target = torch.empty_like(source)
        n = 8192
        a, b, c = (torch.randn(n, n, device="cuda") for _ in range(3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(1000):
                one.add_(1)
        launches = 1000 * rate(graph.replay, seconds)
        copies = rate(lambda: target.copy_(source), seconds, block=10)
        products = rate(lambda: torch.mm(a, b, out=c), seconds, block=10)
        return cls(launches, 2 * source.nbytes * copies, 2 * n**3 * products)


def rate(call: Callable[[], object], seconds: float, block: int = 1) -> float:
    """Return how many calls a second finish, ``block`` of them queued at a time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(block):
            call()
        torch.cuda.synchronize()
        done += block
    return done / (time.perf_counter() - began)


class Profiler:
    """Counts what PyTorch does on the card, of all threads of this process."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.__enter__()

    def end(self) -> dict[str, Any]:
        """Return how many kernels and copies there were, and how long it was busy."""
        torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in self._profile.events()
            if event.device_type == DeviceType.CUDA
        ]
        return {"launches": len(spans), "busy_s": 1e-6 * covered(spans)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much some spans cover; what several cover counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def name_of(device: str) -> str:
    """Return a device with its card's name; end the program where there is none."""
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device here: nothing is measured.")
    return f"{device}, {torch.cuda.get_device_name()}"


def version_of(package: str) -> str | None:
    """Return a package's version; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Measure the device; one round is all."""
    from .worker import Worker

    worker, device = Worker("card"), sys.argv[2]
    worker.facts = {
        "device": name_of(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in PACKAGES},
    }
    while worker.next_round(lambda: torch.zeros(0).numpy()):
        if device != "cpu":
            worker.facts["card"] = asdict(Card.measured(0.5))
            worker.facts["memory_mb"] = torch.cuda.mem_get_info()[1] / 1e6


if __name__ == "__main__":
    main()
