"""``fedweight app``: a Flower App's folder as it is, and on Flower's runtime, too."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import ConfigurationError, EngineError, FedweightError
from ..core.texts import listed, plain
from .app_folder import (
    NUM_SUPERNODES,
    AppFolder,
    backend_config,
    read_federation,
    read_node_config,
    read_pairs,
)
from .engine import Simulated, simulate
from .flower_runtime import Outcome, run_on_flower
from .seen import Metrics, difference_of_metrics, difference_of_models

# Two models agree where no value differs by more, relative to 1 or the value.
TOLERANCE = 1e-6


@dataclass
class FolderRun:
    """What came of a folder.

    Attributes
    ----------
    ours : Simulated
        The simulation.
    num_clients : int
        How many clients there were.
    theirs : Outcome, optional
        The same on Flower's runtime, where that was asked for.
    """

    ours: Simulated
    num_clients: int
    theirs: Outcome | None = None
    failures: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Gather what clients failed of."""
        several = self.ours.seen.failures
        self.failures = [plain(reason.strip().split("\n")[0]) for reason in several]

    @property
    def difference(self) -> float | None:
        """The largest difference of the two models; ``None`` where there are not two.

        See :func:`~fedweight.simulations.seen.difference_of_models`.
        """
        if self.theirs is None:
            return None
        record = self.ours.arrays
        mine = [] if record is None else record.to_numpy_ndarrays()
        if not mine and not self.theirs.arrays:
            return None
        return difference_of_models(mine, self.theirs.arrays)

    @property
    def agrees(self) -> bool:
        """Whether the two models agree; two that were never sent do."""
        return self.theirs is not None and (self.difference or 0.0) <= TOLERANCE

    @property
    def metrics_agree(self) -> bool:
        """Whether clients told the same, whoever they were."""
        if self.theirs is None:
            return False
        told, others = self.ours.metrics, self.theirs.metrics
        return difference_of_metrics(told, others) <= TOLERANCE

    @property
    def replies(self) -> dict[str, int]:
        """How many replies there were, errors too, by the type of messages."""
        return _numbers(self.ours.metrics)

    @property
    def flower_replies(self) -> dict[str, int]:
        """The same on Flower's runtime; empty where it was not asked for.

        Fewer where its first round began before all of its nodes were there.
        """
        return {} if self.theirs is None else _numbers(self.theirs.metrics)

    @property
    def replies_agree(self) -> bool:
        """Whether there were as many replies of each type."""
        return self.theirs is not None and self.replies == self.flower_replies

    def to_dict(self) -> dict[str, Any]:
        """Return what is printed with ``--json``."""
        result: dict[str, Any] = {
            "clients": self.num_clients,
            "replies": self.replies,
            "failed_replies": len(self.failures),
            "seconds": self.ours.seconds,
            "seconds_started": self.ours.seconds_started,
        }
        if self.theirs is not None:
            result["flower_seconds"] = self.theirs.seconds
            result["flower_seconds_started"] = self.theirs.seconds_started
            result["flower_replies"] = self.flower_replies
            result["replies_agree"] = self.replies_agree
            shapes_differ = self.difference == float("inf")
            result["difference"] = None if shapes_differ else self.difference
            result["models_agree"] = self.agrees
            result["metrics_agree"] = self.metrics_agree
        return result

    def lines(self) -> list[str]:
        """Return what is printed."""
        replies = _told(self.replies)
        if self.theirs is not None:
            replies += f"; on Flower's runtime {_told(self.flower_replies)}"
        result = [
            f"clients   {self.num_clients}",
            f"replies   {replies}",
            f"time      {_times(self.ours)}",
        ]
        if self.theirs is not None:
            whole = self.theirs.seconds / self.ours.seconds
            app = self.theirs.seconds_started / max(self.ours.seconds_started, 1e-3)
            result += [
                f"Flower    {_times(self.theirs)}",
                f"faster    {whole:.1f} times, {app:.1f} times without start-up",
                f"models    {self._agreement()}",
                f"metrics   {'agree' if self.metrics_agree else 'differ'}",
            ]
            if not self.replies_agree:
                result.append(f"warning: {self._missing()}")
        if self.failures:
            number = len(self.failures)
            are = (
                "reply is an error" if number == 1 else "replies are errors; the first"
            )
            result.append(f"warning: {number} {are}: {self.failures[0]}")
        return result

    def _agreement(self) -> str:
        if self.difference is None:
            return "none was sent"
        if self.agrees:
            return f"agree to {TOLERANCE:g}"
        differ = f"differ by up to {self.difference:.2g}"
        if not self.replies_agree:
            return f"{differ}, and so do the numbers of replies"
        return (
            f"{differ}, as they do where the app draws random numbers or chooses among "
            "clients"
        )

    def _missing(self) -> str:
        """Say which numbers of replies differ, and why that may be."""
        ours, theirs = self.replies, self.flower_replies
        numbers = {kind: theirs.get(kind, 0) for kind in {**ours, **theirs}}
        kinds = [kind for kind, n in numbers.items() if n != ours.get(kind, 0)]
        found = listed([f"{numbers[kind]} {kind}" for kind in kinds], most=9)
        mine = listed([ours.get(kind, 0) for kind in kinds], most=9)
        s = "s" * (sum(numbers[kind] for kind in kinds) != 1)
        said = f"Flower's clients answered {found} message{s}, ours {mine}"
        if not any(numbers[kind] < ours.get(kind, 0) for kind in kinds):
            return said
        return (
            f"{said}: its first round may begin before all nodes are there; let the "
            "strategy wait: min_available_nodes"
        )


def _numbers(metrics: Metrics) -> dict[str, int]:
    return {kind: len(replies) for kind, replies in metrics.items()}


def _told(numbers: dict[str, int]) -> str:
    told = ", ".join(f"{kind} {number}" for kind, number in numbers.items())
    return told or "none as messages"


def _times(run: Simulated | Outcome) -> str:
    return f"{run.seconds:.1f} s, {run.seconds_started:.1f} s without start-up"


def run_folder(
    folder: str | Path = ".",
    *,
    run_config: Sequence[str] = (),
    federation_config: Sequence[str] = (),
    clients: int | None = None,
    node_config: Sequence[str] = (),
    compare_with_flower: bool = False,
    **options: Any,
) -> FolderRun:
    """Run the folder of a Flower App as ``flwr run`` would simulate it.

    Parameters
    ----------
    folder : str or Path
        Where its ``pyproject.toml`` is.
    run_config, federation_config, node_config : Sequence[str]
        ``"key=value ..."``, or the name of one TOML file: as Flower's command line
        takes the first two, and for each client (``"0.path='a'"``).
    clients : int, optional
        N; by default ``num-supernodes`` of ``federation_config``, or Flower's 2.
    compare_with_flower : bool
        Whether to run it on Flower's runtime afterwards.
    **options
        Of :func:`~fedweight.simulations.simulate`.

    Raises
    ------
    ConfigurationError
        For what is not allowed.
    EngineError
        Where the ServerApp fails; the traceback is its ``__cause__``'s.
    """
    app = AppFolder.read(folder)
    overrides = read_pairs(run_config, "--run-config")
    config = app.config(run_config)
    federation = read_federation(federation_config)
    if clients is not None and "num-supernodes" in federation:
        raise ConfigurationError(
            f"clients is {clients}, but --federation-config has num-supernodes = "
            f"{federation['num-supernodes']}. Give one of the two."
        )
    number = clients
    if number is None:
        number = federation.get("num-supernodes", NUM_SUPERNODES)
    own = read_node_config(node_config)
    if compare_with_flower and own:
        raise ConfigurationError(
            "with --node-config there is nothing to compare: Flower's simulation gives "
            "its nodes a partition-id and nothing else."
        )
    server_app, client_app = app.load()

    def serve(grid: Any, context: Any) -> None:
        try:
            server_app(grid, context)
        except FedweightError:
            raise
        except SystemExit as stop:
            if stop.code:
                raise EngineError(f"the ServerApp ended with {stop.code!r}.") from stop
        except Exception as error:
            raise EngineError(
                f"the ServerApp failed: {type(error).__name__}: {error}"
            ) from error

    ours = simulate(
        serve,
        client_app,
        number,
        backend_config=backend_config(federation),
        verbose_logging=federation.get("verbose", False),
        run_config=config,
        node_config=own,
        **options,
    )
    theirs = None
    if compare_with_flower:
        asked = {**federation, "num-supernodes": number}
        theirs = run_on_flower(app, overrides, asked)
    return FolderRun(ours, number, theirs)


def trace_of(error: BaseException) -> str:
    """Return the traceback of what made a ServerApp fail, empty if it did not."""
    cause = error.__cause__
    if not isinstance(error, EngineError) or cause is None:
        return ""
    return "".join(traceback.format_exception(cause))
