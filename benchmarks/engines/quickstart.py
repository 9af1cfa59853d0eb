"""The quick start as it is, with another strategy, number of rounds, device and plan.

Started with a folder for what it writes, and these four. A round of the engine is a
whole run.
"""

import sys
import tempfile

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

import fedweight

from . import BENCHMARKS
from .worker import Worker

FILE = BENCHMARKS.parent / "simulations" / "quickstart.toml"


def main() -> None:
    """Run the quick start as often as told."""
    worker = Worker(f"fedweight {fedweight.__version__}")
    folder, strategy, rounds, device, plan = sys.argv[1:]
    model: dict[str, npt.NDArray[np.float32]] = {}

    def weights() -> npt.NDArray[np.float32]:
        return np.concatenate([array.ravel() for _, array in sorted(model.items())])

    while worker.next_round(weights):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            run = fedweight.run(
                FILE,
                strategy=strategy,
                out=f"{place}/run",
                report=False,
                progress=False,
                settings={
                    "run.rounds": int(rounds),
                    "engine.device": device,
                    "engine.plan": plan,
                },
            )
            model |= load_file(run.folder / "model.safetensors")
            worker.facts = {n: run.config["engine"][n] for n in ("plan", "device")}


if __name__ == "__main__":
    main()
