"""The Flower App that this folder is: what ``flwr run .`` and real nodes start.

The run config holds the keys of a simulation file, dotted (``strategy.name``), and
``settings`` for the options beside them (``settings = "strategy.a=0.2"``).
"""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy on Flower's grid, and write the run's folder."""
    from .parameters import FlatModule, FlatRecord
    from .studies.folder import new_folder
    from .studies.runner import Recorder, serve

    nodes = len(list(grid.get_node_ids()))
    components = _components(_frozen(context), nodes or None)
    strategy = components.strategy()
    initial = FlatRecord(FlatModule(components.make_model()).save())
    table = components.configuration["run"]
    folder = new_folder(None, f"{table['name']}-flower-seed{table['seed']}")
    recorder = Recorder(folder, components, strategy)
    recorder.begin()
    try:
        serve(grid, components, strategy, initial, recorder)
    finally:
        recorder.end()
    from .studies.result import Run

    print(f"test accuracy {Run(folder).summary()['test_accuracy']:.4f}")
    print(f"results in {folder.resolve()}")


def _handle(message: Message, context: Context) -> Message:
    clients = context.node_config.get("num-partitions")
    app = _client_app(_frozen(context), None if clients is None else int(clients))
    return app(message, context)


client_app.train()(_handle)
client_app.evaluate()(_handle)
client_app.query("label_counts")(_handle)

Frozen = tuple[tuple[str, bool | float | int | str], ...]


def _frozen(context: Context) -> Frozen:
    """Return the run config in a form that can be a key."""
    return tuple(sorted(context.run_config.items()))


@lru_cache(maxsize=2)
def _components(run_config: Frozen, num_clients: int | None):  # type: ignore[no-untyped-def]
    from .studies.configuration import Configuration
    from .studies.runner import prepare

    return prepare(Configuration.unflatten(dict(run_config)), num_clients=num_clients)


@lru_cache(maxsize=2)
def _client_app(run_config: Frozen, num_clients: int | None) -> ClientApp:
    """Make a process's ClientApp once, however many messages it handles."""
    app: ClientApp = _components(run_config, num_clients).client_app()
    return app
