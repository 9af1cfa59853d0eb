"""One turn of an engine: started, warmed up, measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .processes import EngineProcess

TOLERANCE = 1e-4


@dataclass
class Turn:
    """What one engine did in one turn; not a number is what it did not reach.

    Attributes
    ----------
    version : str
        What the engine says it is.
    startup : float
        Seconds from the start of the process to the end of its first round.
    round : float
        Seconds of a round.
    weights : ndarray
        The global weights after two rounds.
    pss : float, optional
        Most memory of the host, in MB, where it was weighed.
    """

    version: str = ""
    startup: float = math.nan
    round: float = math.nan
    weights: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, "f"))
    pss: float | None = None

    def take(self, process: EngineProcess, file: Path, seconds: float) -> None:
        """Let a process, just begun, run rounds for about so many seconds.

        The first does not count. The second does where it takes as long as that alone:
        then it is all.

        Parameters
        ----------
        process : EngineProcess
            The engine.
        file : Path
            Where it may write its weights.
        seconds : float
            How long to measure.
        """
        process.run(1)
        self.version = process.version
        self.startup = time.perf_counter() - process.started
        self.round = process.run(1)
        process.weights(file)
        self.weights = np.load(file)
        if self.round < seconds:
            rounds = math.ceil(seconds / self.round)
            self.round = process.run(rounds) / rounds


def difference(
    weights: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]
) -> float:
    """Return ``|weights - expected| / |expected|``; 1e9 if one is not a number."""
    if weights.shape != expected.shape:
        return 1e9
    distance = np.linalg.norm(weights.astype(np.float64) - expected)
    relative = float(distance / np.linalg.norm(expected.astype(np.float64)))
    return relative if math.isfinite(relative) else 1e9
