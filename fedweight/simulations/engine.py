"""Run a whole Flower app, server and clients, on a simulation grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from ..core.errors import ConfigurationError, EngineError, check_choice, check_range
from ..core.extras import is_installed
from ..core.signals import interruptible
from ..messages import _flower
from .grid import RunConfig, SimulationGrid
from .local import LocalGrid
from .plan import ENGINES, Plan


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    run_config: RunConfig | None = None,
    engine: str = "auto",
    workers: int | None = None,
    gpus_per_worker: float = 0.0,
    address: str | None = None,
    threads: int | None = None,
    plan: Plan | str | None = None,
) -> Context:
    """Run a Flower app in a simulation.

    Any Flower app runs unchanged: Flower's own strategies, its differential-privacy
    wrappers and client mods, ServerApps that push and pull messages themselves.

    Parameters
    ----------
    server_app, client_app : ServerApp, ClientApp
        The two halves of the app.
    num_clients : int
        N, 1 or more. A client's context has ``partition-id`` 0 to N - 1 and
        ``num-partitions`` N in its ``node_config``, as in Flower's own simulation.
    run_config : Mapping, optional
        The app's settings, as ``[tool.flwr.app.config]`` would give them.
    engine : {"auto", "local", "ray"}
        ``local`` is this process; ``ray`` is worker processes, GPUs and nodes;
        ``auto`` is Ray where several workers or GPUs, or an address, are asked for.
    workers : int, optional
        Ray workers; by default one for each core, or for each share of a GPU.
    gpus_per_worker : float
        Share of a GPU that each Ray worker gets.
    address : str, optional
        A running Ray cluster to join: ``host:port`` of its head, as ``ray start
        --head`` prints it, or ``auto`` for the one on this machine.
    threads : int, optional
        Clients that train at once in the local grid; see
        :class:`~fedweight.simulations.local.LocalGrid`.
    plan : Plan or str, optional
        How clients of our own app are trained, such as ``"batched-20"``
        (:class:`~fedweight.simulations.Plan`); one after another by default, and with
        ``"auto"``: only ``fedweight run`` and ``fedweight.run`` measure.

    Returns
    -------
    Context
        The ServerApp's context after the run.

    Examples
    --------
    >>> from flwr.serverapp import ServerApp
    >>> from flwr.clientapp import ClientApp
    >>> server_app = ServerApp()
    >>> @server_app.main()
    ... def main(grid, context):
    ...     print(len(list(grid.get_node_ids())), context.run_config["rounds"])
    >>> context = simulate(
    ...     server_app, ClientApp(), num_clients=3, run_config={"rounds": 2}
    ... )
    3 2
    """
    with make_grid(
        client_app,
        num_clients,
        run_config,
        engine=engine,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        address=address,
        threads=threads,
        plan=plan,
    ) as grid:
        context = Context(
            run_id=0,
            node_id=_flower.SERVER_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_config or {}),
        )
        server_app(grid, context)
    return context


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
    threads: int | None = None,
    plan: Plan | str | None = None,
) -> Iterator[SimulationGrid]:
    """Make a grid, for the time of a ``with`` block; see :func:`simulate`.

    Meanwhile SIGTERM ends what is done as Ctrl-C does
    (:func:`~fedweight.core.signals.interruptible`).
    """
    check_choice("engine", engine, ENGINES)
    check_local(engine, workers, gpus_per_worker, address)
    check_range("num_clients", num_clients, 1)
    check_range("gpus_per_worker", gpus_per_worker, 0)
    if workers is not None:
        check_range("workers", workers, 1)
    if isinstance(plan, str):
        plan = Plan.parse(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigurationError(
            f"plan must be a Plan or its name, such as 'batched-20', got {plan!r}."
        )
    if engine == "auto":
        engine = choose_engine(workers, gpus_per_worker, address)
    with interruptible(), _flower.task_identity(run_id=0):
        grid: SimulationGrid
        if engine == "local":
            grid = LocalGrid(
                client_app, num_clients, run_config, threads=threads, plan=plan
            )
        else:
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
            )
        try:
            yield grid
        finally:
            grid.close()


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
    workers: int | None, gpus_per_worker: float, address: str | None
) -> str:
    """Return the engine that ``auto`` stands for.

    Examples
    --------
    >>> choose_engine(workers=None, gpus_per_worker=0.0, address=None)
    'local'
    >>> choose_engine(workers=4, gpus_per_worker=0.0, address=None)
    'ray'
    """
    several = (workers or 1) > 1 or gpus_per_worker > 0
    return "ray" if several or address or torch.cuda.device_count() > 1 else "local"
