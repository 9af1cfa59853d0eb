"""Run a whole Flower app, server and clients, on a simulation grid."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ..core.environment import set_for_a_while
from ..core.errors import ConfigurationError, EngineError, check_choice, check_range
from ..core.extras import is_installed
from ..core.pytorch import torch
from ..core.signals import interruptible
from ..core.texts import shown
from ..core.threads import num_cores
from ..messages import _flower
from .failures import tracebacks_once
from .grid import (
    RunConfig,
    SimulationGrid,
    is_stranger,
    new_run_id,
    new_seed,
)
from .local import LocalGrid
from .plan import ENGINES, Plan
from .seen import Seen

log = logging.getLogger("fedweight")


ISOLATIONS = ("auto", "processes", "none")


@dataclass
class Simulated:
    """What came of a simulation.

    Attributes
    ----------
    context : Context
        The ServerApp's context after the run.
    seen : Seen
        The model that was sent last, and the metrics that clients replied.
    seconds : float
        How long it took, until all workers had ended.
    seconds_started : float
        How long it took without start-up and end: from the first reply on.
    """

    context: Context
    seen: Seen
    seconds: float
    seconds_started: float

    @property
    def arrays(self) -> ArrayRecord | None:
        """The model that the ServerApp sent last; ``None`` where that was kept apart.

        With a strategy of Flower's that evaluates on clients it is the final one.
        """
        return self.seen.arrays

    @property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """By the type of messages, what each reply's metric records said."""
        return self.seen.metrics


def simulate(
    server_app: ServerApp | Callable[[Grid, Context], None],
    client_app: ClientApp,
    num_supernodes: int | None = None,
    backend_name: str = "ray",
    backend_config: Mapping[str, Any] | None = None,
    enable_tf_gpu_growth: bool = False,
    verbose_logging: bool = False,
    *,
    num_clients: int | None = None,
    run_config: RunConfig | None = None,
    node_config: Mapping[int, RunConfig] | None = None,
    engine: str = "auto",
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    isolation: str = "auto",
    seed: int | None = None,
    threads: int | None = None,
    plan: Plan | str | None = None,
) -> Simulated:
    """Run a Flower app in a simulation.

    Any Flower app runs unchanged: Flower's own strategies, its differential-privacy
    wrappers and client mods, ServerApps that push and pull messages themselves, older
    ones with ``server_fn`` and ``client_fn``. It takes what Flower's
    ``run_simulation`` takes, so that a script changes one import.

    Parameters
    ----------
    server_app, client_app : ServerApp, ClientApp
        The two halves of the app.
    num_supernodes : int
        N, 1 or more. A client's context has ``partition-id`` 0 to N - 1 and
        ``num-partitions`` N in its ``node_config``, as in Flower's own simulation.
    backend_name : {"ray"}
        Flower's only one. It chooses nothing here; ``engine`` does.
    backend_config : Mapping, optional
        As Flower's: of ``client_resources`` ``num_cpus`` says how many cores each
        worker has to itself, and ``num_gpus`` is ``gpus_per_worker``; ``num_cpus`` of
        ``init_args`` limits the cores.
    enable_tf_gpu_growth : bool
        Whether TensorFlow is told to take a GPU's memory as it needs it.
    verbose_logging : bool
        Whether Flower's logger and ours say everything.
    num_clients : int, optional
        Another name of ``num_supernodes``.
    run_config : Mapping, optional
        The app's settings, as ``[tool.flwr.app.config]`` would give them.
    node_config : Mapping[int, Mapping], optional
        By a client's number, what its ``node_config`` holds besides.
    engine : {"auto", "local", "ray"}
        ``local`` is this machine: this process for our own app, and for any other
        worker processes without a GPU; ``ray`` is worker processes, GPUs and nodes.
        ``auto`` is Ray where GPUs or an address are asked for, and for our own app
        also where several workers are.
    workers : int, optional
        Worker processes; by default one for each core, or for each share of a GPU.
    gpus_per_worker : float
        Share of a GPU that each Ray worker gets.
    address : str, optional
        A running Ray cluster to join: ``host:port`` of its head, as ``ray start
        --head`` prints it, or ``auto`` for the one on this machine.
    isolation : {"auto", "processes", "none"}
        Where clients of the local engine run. ``processes``: in worker processes, which
        handle one at a time. ``none``: in this process, for a debugger; one at a time,
        without a time limit. ``auto``: in this process for our own app, whose clients
        leave no trace there, and for any other in processes. On every engine what a
        client does to its process is undone, but for what it stores in modules.
    seed : int, optional
        0 or more. The generators of ``random``, NumPy and PyTorch begin, for each
        message to a client, from (seed, client, which of its messages it is); by
        default from entropy. Our own app has a seed of its own.
    threads : int, optional
        Clients of our own app that train at once in the local grid; see
        :class:`~fedweight.simulations.local.LocalGrid`.
    plan : Plan or str, optional
        How clients of our own app are trained, such as ``"batched-20"``
        (:class:`~fedweight.simulations.Plan`); one after another by default, and with
        ``"auto"``: only ``fedweight run`` and ``fedweight.run`` measure.

    Returns
    -------
    Simulated
        The ServerApp's context after the run, the model and metrics seen, the time.

    Examples
    --------
    >>> from flwr.serverapp import Grid, ServerApp
    >>> from flwr.clientapp import ClientApp
    >>> server_app = ServerApp()
    >>> @server_app.main()
    ... def main(grid, context):
    ...     print(len(list(grid.get_node_ids())), context.run_config["rounds"])
    >>> done = simulate(
    ...     server_app, ClientApp(), 3, run_config={"rounds": 2}, isolation="none"
    ... )
    3 2
    >>> done.context.run_config
    {'rounds': 2}
    """
    began = time.perf_counter()
    num_clients = _one_number(num_supernodes, num_clients)
    check_choice("backend_name", backend_name, ("ray",))
    cores, gpus = resources(backend_config)
    if cores is not None and workers is None and not gpus:
        workers = cores
    settings = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"} if enable_tf_gpu_growth else {}
    with (
        set_for_a_while(settings),
        _verbose(verbose_logging),
        tracebacks_once(),
        make_grid(
            client_app,
            num_clients,
            run_config,
            engine=engine,
            workers=workers,
            gpus_per_worker=gpus_per_worker or gpus,
            address=address,
            isolation=isolation,
            seed=seed,
            node_config=node_config,
            threads=threads,
            plan=plan,
        ) as grid,
    ):
        context = Context(
            run_id=grid.run.run_id,
            node_id=_flower.SERVER_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_config or {}),
        )
        started = time.perf_counter()
        server_app(grid, context)
        ended = time.perf_counter()
    rest = ended - (grid.seen.began or started)
    return Simulated(context, grid.seen, time.perf_counter() - began, rest)


def _one_number(num_supernodes: int | None, num_clients: int | None) -> int:
    """Return how many clients there are, by whichever name it was said."""
    if (num_supernodes is None) == (num_clients is None):
        raise ConfigurationError(
            "give the number of clients once, as num_supernodes or as num_clients, got "
            f"num_supernodes = {num_supernodes!r} and num_clients = {num_clients!r}."
        )
    return (num_clients or 0) if num_supernodes is None else num_supernodes


@contextlib.contextmanager
def _verbose(wanted: bool) -> Iterator[None]:
    """Let Flower's logger and ours say everything, for a ``with`` block."""
    loggers = [logging.getLogger(name) for name in ("flwr", "fedweight")]
    before = [logger.level for logger in loggers]
    for logger in loggers if wanted else ():
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def resources(backend_config: Mapping[str, Any] | None) -> tuple[int | None, float]:
    """Read Flower's ``backend_config``.

    Parameters
    ----------
    backend_config : Mapping, optional
        As Flower's ``run_simulation`` takes it, with ``-`` or ``_`` in its keys.

    Returns
    -------
    tuple[int | None, float]
        How many workers the cores are enough for, where that is said, and the share of
        a GPU that each gets.

    Examples
    --------
    >>> from fedweight.core.threads import num_cores
    >>> resources({"client_resources": {"num_cpus": num_cores(), "num_gpus": 0.5}})
    (1, 0.5)
    """
    config = {_key(name): value for name, value in (backend_config or {}).items()}
    known = ("init_args", "client_resources", "actor")
    for name in config:
        check_choice("a key of backend_config", name, known)
    own = {_key(k): v for k, v in (config.get("client_resources") or {}).items()}
    init = {_key(k): v for k, v in (config.get("init_args") or {}).items()}
    gpus = float(own.get("num_gpus") or 0.0)
    if "num_cpus" not in own and "num_cpus" not in init:
        return None, gpus
    each = own.get("num_cpus", 1)
    cores = init.get("num_cpus") or num_cores()
    check_range("num_cpus of client_resources", each, 0, low_open=True)
    return max(1, int(cores / each)), gpus


def _key(name: str) -> str:
    return name.replace("-", "_")


@contextlib.contextmanager
def make_grid(
    client_app: ClientApp,
    num_clients: int,
    run_config: RunConfig | None = None,
    *,
    engine: str = "auto",
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    isolation: str = "auto",
    seed: int | None = None,
    node_config: Mapping[int, RunConfig] | None = None,
    threads: int | None = None,
    plan: Plan | str | None = None,
) -> Iterator[SimulationGrid]:
    """Make a grid, for the time of a ``with`` block; see :func:`simulate`.

    Meanwhile SIGTERM ends what is done as Ctrl-C does
    (:func:`~fedweight.core.signals.interruptible`).
    """
    check_choice("engine", engine, ENGINES)
    check_choice("isolation", isolation, ISOLATIONS)
    check_range("num_clients", num_clients, 1)
    check_range("gpus_per_worker", gpus_per_worker, 0)
    if workers is not None:
        check_range("workers", workers, 1)
    if threads is not None:
        check_range("threads", threads, 1)
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigurationError(
            f"plan must be a Plan or its name, such as 'batched-20', got {plan!r}."
        )
    stranger = is_stranger(client_app)
    apart = isolation == "processes" or (isolation == "auto" and stranger)
    check_local(engine, None if apart else workers, gpus_per_worker, address)
    if engine == "auto":
        several = None if apart else workers
        engine = choose_engine(several, gpus_per_worker, address, counts_gpus=not apart)
    if engine == "ray" and isolation == "none":
        raise ConfigurationError(
            "isolation is 'none', which is this process, but the engine is Ray. Leave "
            "one of the two out."
        )
    run_config = checked_run_config(run_config)
    nodes: dict[str, Any] = {
        "node_config": checked_node_config(node_config, num_clients),
        "seed": new_seed() if seed is None else seed,
        "run_id": new_run_id(),
    }
    if seed is None and stranger:
        log.info("Clients draw random numbers from seed = %d.", nodes["seed"])
    with interruptible(), _flower.task_identity(nodes["run_id"]):
        grid: SimulationGrid
        if engine == "ray":
            check_engine(engine)
            from .ray.grid import RayGrid

            grid = RayGrid(
                client_app,
                num_clients,
                run_config,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                address=address,
                plan=plan,
                show=stranger,
                **nodes,
            )
        elif apart:
            from .workers.grid import ProcessGrid

            grid = ProcessGrid(
                client_app, num_clients, run_config, workers=workers, **nodes
            )
        else:
            grid = LocalGrid(
                client_app,
                num_clients,
                run_config,
                threads=threads,
                plan=plan,
                **nodes,
            )
        try:
            yield grid
        finally:
            grid.close()


def checked_run_config(
    config: Mapping[Any, Any] | None, what: str = "run_config"
) -> dict[str, bool | float | int | str]:
    """Return settings of the types that Flower allows; raise for any other.

    Examples
    --------
    >>> checked_run_config({"rate": 0.1})
    {'rate': 0.1}
    """
    for name, value in (config or {}).items():
        if not isinstance(name, str) or not isinstance(value, bool | float | int | str):
            raise ConfigurationError(
                f"{what} has text, numbers and truth values by their names, as Flower "
                f"takes them, got {name!r} = {value!r}."
            )
    return dict(config or {})


def checked_node_config(
    config: Mapping[int, RunConfig] | None, num_clients: int
) -> dict[int, RunConfig]:
    """Return what clients' ``node_config`` hold besides, by number.

    Raises
    ------
    ConfigurationError
        If there is no such client, or what is given is no table of settings.
    """
    found: dict[int, RunConfig] = {}
    for client, own in (config or {}).items():
        whole = hasattr(client, "__index__") and not isinstance(client, bool)
        if not whole or not 0 <= client < num_clients:
            raise ConfigurationError(
                f"node_config has settings by the numbers of clients, 0 to "
                f"{num_clients - 1}, got {shown(client)}."
            )
        if not isinstance(own, Mapping):
            raise ConfigurationError(
                f"node_config of client {client} must be settings by their names, got "
                f"{shown(own)}."
            )
        found[int(client)] = checked_run_config(own, f"node_config of client {client}")
    return found


def check_local(
    engine: str,
    workers: int | None,
    gpus_per_worker: float,
    address: str | None,
    table: str = "",
) -> None:
    """Refuse, for the local engine, what only Ray has; ``table`` has the keys."""
    if engine != "local":
        return
    of_ray = {
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "address": address,
    }
    for name, value in of_ray.items():
        if value:
            key = f"{table}.{name.replace('_', '-')}" if table else name
            raise ConfigurationError(
                f"{key} is {value!r}, which is for Ray, but the engine is 'local'. "
                "Leave it out, or choose the engine 'ray'."
            )


def check_engine(engine: str) -> None:
    """Raise :class:`EngineError` if an engine cannot be used here."""
    if engine == "ray" and not is_installed("ray"):
        raise EngineError(
            "the Ray engine needs the package ray, which is not installed. "
            "Install fedweight[simulation], or use engine = 'local'."
        )


def choose_engine(
    workers: int | None,
    gpus_per_worker: float,
    address: str | None,
    *,
    counts_gpus: bool = True,
) -> str:
    """Return the engine that ``auto`` stands for.

    Several GPUs are a reason for Ray, unless clients are to have none of them
    (``counts_gpus``).

    Examples
    --------
    >>> choose_engine(workers=None, gpus_per_worker=0.0, address=None)
    'local'
    >>> choose_engine(workers=4, gpus_per_worker=0.0, address=None)
    'ray'
    """
    if (workers or 1) > 1 or gpus_per_worker > 0 or address:
        return "ray"
    return "ray" if counts_gpus and torch.cuda.device_count() > 1 else "local"
