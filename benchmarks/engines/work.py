"""The work that every engine does, without what it takes to do it.

Imports neither PyTorch nor NumPy, and so can the program that measures: processes
share a library's pages, and the memory of an engine would seem smaller.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import BENCHMARKS

SAMPLES = 128  # Of each client.
CLASSES = 10
BATCH = 32
LEARNING_RATE = 0.05
SEED = 0

INPUT_SHAPES = {"S": (1, 28, 28), "M": (1, 28, 28), "G": (80,), "L": (3, 32, 32)}
TOKENS = 80  # Of the texts of G.


@dataclass(frozen=True)
class Work:
    """What is measured: a model, and how many clients train in a round.

    Attributes
    ----------
    model : {"S", "M", "G", "L"}
        An MLP of 50,890 parameters, a CNN of 582,026, a GRU of characters of 58,634, a
        ResNet-18 of 11.17 million.
    cohort : int
        K, 2 or more; all clients take part in every round.
    """

    model: str
    cohort: int

    @classmethod
    def parse(cls, name: str) -> Work:
        """Read a name such as ``S20``."""
        model, cohort = name[:1].upper(), name[1:]
        if model not in INPUT_SHAPES or not cohort.isdigit() or int(cohort) < 2:
            raise ValueError(
                f"'{name}' is no work: give {', '.join(INPUT_SHAPES)} followed by the "
                "number of clients from 2, such as S20."
            )
        return cls(model, int(cohort))

    @property
    def name(self) -> str:
        """The name that :meth:`parse` reads."""
        return f"{self.model}{self.cohort}"

    def write(self, folder: Path, device: str = "cpu") -> str:
        """Write data, orders and start to an empty folder, all from a fixed seed.

        Parameters
        ----------
        folder : Path
            Where the engines will read it.
        device : {"cpu", "cuda"}
            Where clients will train.

        Returns
        -------
        str
            The device, and which card that is.

        Raises
        ------
        CalledProcessError
            If there is no such device, or no room for the files. The reason has been
            printed by then.
        """
        result = subprocess.run(
            [sys.executable, "-m", "engines.job", self.name, str(folder), device],
            cwd=BENCHMARKS,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return result.stdout.strip()

    def tell(
        self,
        folder: Path,
        workers: int,
        plan: str = "auto",
        device: str = "cpu",
        strategy: str = "fedavg",
    ) -> None:
        """Write how the next engine is to do it, beside what :meth:`write` wrote.

        Parameters
        ----------
        folder : Path
            Where the engine will read it.
        workers : int
            How many processes or threads an engine may use.
        plan : str
            How fedweight trains clients; see ``engine.plan`` in a simulation's file.
        device : {"cpu", "cuda"}
            Where clients train.
        strategy : {"fedavg", "fedlaw", "fedce", "ida"}
            How fedweight weighs them.
        """
        job = {"model": self.model, "cohort": self.cohort, "workers": workers}
        job |= {"plan": plan, "device": device, "strategy": strategy}
        (folder / "job.json").write_text(json.dumps(job))
