"""One run: from a simulation file to a run's folder."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .. import models
from ..clients import TrainingApp, TrainingSettings, client_number, objective
from ..clients.objectives import Proximal
from ..clients.training import evaluate
from ..core.errors import ConfigurationError, DataError, OutputError, check_choice
from ..core.layout import Layout, as_tensor
from ..core.module import FlatModule
from ..core.options import options_of
from ..core.registry import make
from ..core.settings import parse_setting
from ..core.signals import interruptible
from ..core.texts import NAME_LENGTH, listed, plain, shown
from ..core.threads import one_thread
from ..data import (
    ClientData,
    DataSet,
    FederatedData,
    Schema,
    federate,
    load,
    load_client,
    notes,
)
from ..data import check as check_data
from ..data.examples import channels_last
from ..data.files import load_one_csv
from ..messages import keys
from ..messages.arrays import FlatRecord, flatten
from ..server import loop
from ..server.checkpoint import not_carried
from ..server.loop import ServerState
from ..simulations import Plan, SimulationGrid, simulate
from ..simulations.engine import check_engine, check_local, choose_engine
from ..simulations.grid import usable_plan
from ..simulations.planner import (
    SAMPLE,
    WORTH_MEASURING,
    choose_plan,
    estimated_seconds,
    machine,
)
from ..strategies import RoundRecord, WeightingStrategy, strategy_class
from ..strategies.server_optimizers import server_optimizer
from .columns import CLIENT_COLUMNS, ROUND_COLUMNS
from .configuration import Configuration
from .folder import (
    Table,
    cannot_repeat,
    check_free,
    check_repeats,
    new_folder,
    old_folder,
    write_whole,
)
from .keeper import NAME as KEPT
from .keeper import Keeper, go_on, read_checkpoint
from .listener import Listener
from .records import ErrorLog, client_row, round_row
from .result import Run

log = logging.getLogger("fedweight")

T = TypeVar("T")

# So many clients of a round fit into memory: their messages and replies.
MOST_ASKED = 10**7

# So many clients tell how large they all are.
MANY = 10**6


@dataclass(frozen=True)
class Progress:
    """What is known after a round; ``accuracy`` is the test accuracy, or NaN."""

    round: int
    rounds: int
    accuracy: float
    loss: float
    seconds: float


Report = Callable[[Progress], None]

GIVEN_IN_PYTHON = cannot_repeat(
    "its data were given in Python",
    "give them again: fedweight.run(file, dataset=...)",
)


@dataclass
class Components:
    """A configuration's parts, made: what the server and the clients share."""

    configuration: Configuration
    data: FederatedData
    schema: Schema | None = None  # What nodes with files of their own are told.
    device: str = field(init=False)

    def __post_init__(self) -> None:
        """Choose the device."""
        wanted = self.configuration["engine"]["device"]
        gpus = torch.cuda.device_count()
        if wanted == "auto":
            wanted = "cuda" if gpus else "cpu"
        allowed = ["cpu", *(["cuda"] if gpus else [])]
        allowed += [f"cuda:{number}" for number in range(gpus)]
        check_choice("engine.device", wanted, ["auto", *allowed])
        self.device = wanted

    def make_model(self) -> nn.Module:
        """Build the model with the run's initial weights."""
        return models.build(
            self.configuration["model"]["name"],
            self.data.input_shape,
            self.data.num_classes,
            seed=self.configuration.seed("model"),
            **self.configuration.options("model"),
        )

    def client_data(self, context: Context) -> ClientData:
        """Return a client's data: its part of a simulation, or its own file."""
        return client_data(self.configuration, context, self.data)

    def client_app(self) -> TrainingApp:
        """Make the ClientApp."""
        training = self.configuration["training"]
        chosen = self.configuration["objective"]["name"]
        return TrainingApp(
            self.make_model,
            self.client_data,
            num_classes=self.data.num_classes,
            objective=named(
                "objective",
                partial(objective, chosen, **self.configuration.options("objective")),
            ),
            settings=TrainingSettings(
                **{key.replace("-", "_"): value for key, value in training.items()}
            ),
            seed=self.configuration["run"]["seed"],
            device=self.device,
            sizes=self.data.sizes,
            name_of=self.data.name_of if self.data.names else None,
        )

    def engine(self) -> str:
        """Return the engine that ``auto`` stands for."""
        table = self.configuration["engine"]
        if table["name"] != "auto":
            return str(table["name"])
        return choose_engine(
            table["workers"] or None,
            table["gpus-per-worker"],
            table["address"] or None,
        )

    def gpus_per_worker(self) -> float:
        """Return the share of a GPU that each Ray worker gets.

        Ray hides the GPUs from a worker without a share; so where clients train on
        one, each worker has a whole GPU unless told otherwise, or more workers share.
        """
        table = self.configuration["engine"]
        told = float(table["gpus-per-worker"])
        if told or self.engine() != "ray" or not self.device.startswith("cuda"):
            return told
        return min(1.0, torch.cuda.device_count() / (table["workers"] or 1))

    def check_feasible(
        self, strategy: Strategy, client_app: TrainingApp, *, simulated: bool = True
    ) -> None:
        """Refuse, before anything is written, what could only fail later.

        Where the run is not ``simulated``, who takes part is not known before.
        """
        epochs = self.configuration["training"]["epochs"]
        if getattr(strategy, "stragglers", 0) and epochs < 2:
            raise ConfigurationError(
                f"strategy.stragglers is {strategy.stragglers:g}, which needs "  # type: ignore[attr-defined]
                f"training.epochs of 2 or more, got {epochs}: a straggler does fewer "
                "epochs than the others, but at least one."
            )
        self._check_proximal(strategy, client_app)
        self._check_model()
        if simulated:
            self._check_clients(strategy)
            check_local(**engine_arguments(self.configuration), table="engine")
            check_engine(self.engine())

    def _check_clients(self, strategy: Strategy) -> None:
        """Refuse a strategy that asks for more clients than there are, or than fit."""
        clients = self.data.num_clients
        for name in ("fraction_train", "fraction_evaluate"):
            asked = clients * float(getattr(strategy, name, 0.0))
            if asked > MOST_ASKED:
                raise ConfigurationError(
                    f"strategy.{name.replace('_', '-')} is {asked / clients:g}, which "
                    f"asks {asked:,.0f} clients in a round; at most {MOST_ASKED:,} "
                    "fit. Take a smaller share."
                )
        for name in (
            "min_train_nodes",
            "min_evaluate_nodes",
            "min_available_nodes",
            "min_replies",
        ):
            least = getattr(strategy, name, 0)
            if least > clients:
                raise ConfigurationError(
                    f"strategy.{name.replace('_', '-')} is {least}, but there are "
                    f"{clients} clients (partition.clients)."
                )

    @staticmethod
    def _check_proximal(strategy: Strategy, chosen: TrainingApp) -> None:
        """Refuse a proximal term that makes local training diverge."""
        key, mu = "strategy.proximal-mu", getattr(strategy, "proximal_mu", None)
        if mu is None and isinstance(chosen.objective, Proximal):
            key, mu = "objective.mu", chosen.objective.mu
        limit = chosen.settings.diverging_mu
        if mu is not None and mu >= limit:
            raise ConfigurationError(
                f"{key} must be below {limit:g}, got {mu:g}: from 2 (1 + momentum) / "
                "learning-rate on, the proximal term alone makes sgd diverge. Lower it "
                "or training.learning-rate."
            )

    def _check_model(self) -> None:
        """Refuse a model that cannot take the data or gives no logits for them."""
        some = self.data.client(int(self._sizes.argmax())).train
        if not len(some):
            some = self.data.test
        x = as_tensor(some.x[:2])
        if not len(x):
            return
        name, data = self.configuration["model"]["name"], self.data.name
        module = self.make_model().eval()
        takes = f"[{', '.join(map(str, x.shape[1:]))}] of {x.dtype}"
        try:
            with torch.no_grad():
                shape = list(module(x).shape)
        except Exception as error:
            hint = ""
            if x.dtype == torch.int64:
                hint = ". Whole numbers are tokens; for features give floating ones"
            elif channels_last(self.data.input_shape):
                hint = ". Images are [n, c, h, w]: x.transpose(0, 3, 1, 2)"
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            raise ConfigurationError(
                f"model.name: '{name}' cannot take an example of data '{data}', "
                f"{takes}: {type(error).__name__}: {reason}{hint}."
            ) from None
        if shape != [len(x), self.data.num_classes]:
            raise ConfigurationError(
                f"model.name: '{name}' gives shape {shape} for {len(x)} examples of "
                f"data '{data}'; it must be [{len(x)}, {self.data.num_classes}], a "
                "logit for each class."
            )

    @property
    def _sizes(self) -> npt.NDArray[np.int64]:
        """How many examples clients have; of those drawn when asked for, of some."""
        return self.data.sizes[:MANY] if self.data.is_lazy else self.data.sizes

    def plan(self, client_app: TrainingApp, initial: FlatRecord) -> Plan:
        """Return how clients are trained: as told, or as is fastest here.

        Not at once where that does not give what each alone gives.
        """
        told = Plan.parse(self.configuration["engine"]["plan"])
        if told is not None:
            return usable_plan(told, client_app, self.data.num_clients, {})
        module = self.make_model()
        training = self.configuration["training"]
        share = self.configuration["strategy"].get("fraction-train") or 1.0
        cohort = max(1, int(self.data.num_clients * share))
        sizes = self._sizes
        steps = -(-sizes // training["batch-size"]) * training["epochs"]
        rounds = self.configuration["run"]["rounds"]
        num_steps = int(rounds * cohort * steps.mean())
        num_parameters = Layout.of_module(module).num_parameters
        short = estimated_seconds(num_steps, training["batch-size"], num_parameters)
        # On a CPU convolutions of many clients at once are slower, always.
        convolves = any(
            isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()
        )
        if self.device == "cpu" and (convolves or short < WORTH_MEASURING):
            return Plan()
        return choose_plan(
            client_app,
            initial,
            clients=np.flatnonzero(sizes)[:SAMPLE].tolist(),
            num_clients=self.data.num_clients,
            cohort=cohort,
            about={
                "model": str(module),
                "objective": dict(self.configuration["objective"]),
                "training": dict(training),
                "cohort": cohort,
                "examples": int(np.median(sizes)),
                "device": self.device,
                **machine(),
            },
        )

    def strategy(self) -> Strategy:
        """Make the strategy, with what it needs from the server."""
        name = self.configuration["strategy"]["name"]
        chosen = strategy_class(name)
        takes = options_of(chosen)
        ours: dict[str, Any] = {
            "seed": self.configuration["run"]["seed"],
            "server_optimizer": named(
                "server",
                partial(
                    server_optimizer,
                    self.configuration["server"]["name"],
                    **self.configuration.options("server"),
                ),
            ),
            "device": self.device,
            "num_classes": self.data.num_classes,
        }
        if self.configuration["engine"]["threads"]:
            ours["threads"] = self.configuration["engine"]["threads"]
        if ours["server_optimizer"] and "server_optimizer" not in takes:
            raise ConfigurationError(
                f"server.name: strategy '{name}' takes no server optimiser; choose "
                "'none'."
            )
        arguments = {key: value for key, value in ours.items() if key in takes}
        of_the_server: dict[str, Callable[[], Any]] = {
            "model": self.make_model,
            "proxy": lambda: self.data.proxy,
        }
        for needed in getattr(chosen, "needs", ()):
            check_choice(f"strategy '{name}': needs", needed, of_the_server)
            arguments[needed] = of_the_server[needed]()
        arguments |= self.configuration.options("strategy")
        made = named("strategy", partial(chosen, **arguments))
        if isinstance(made, WeightingStrategy) and not hasattr(made, "history"):
            raise ConfigurationError(
                f"strategy '{name}': its __init__ must call super().__init__(...) with "
                "the arguments that are not its own."
            )
        return made


def named(table: str, call: Callable[[], T]) -> T:
    """Make what a table describes; an error says which table it is about."""
    try:
        return make("what it names", call)
    except ConfigurationError as error:
        if str(error).startswith(f"{table}."):
            raise
        raise ConfigurationError(f"[{table}]: {error}") from error.__cause__


def prepare(
    configuration: Configuration,
    dataset: DataSet | None = None,
    num_clients: int | None = None,
) -> Components:
    """Load and divide the data of a configuration.

    Parameters
    ----------
    configuration : Configuration
        What to run.
    dataset : DataSet, optional
        Data of your own instead of the configuration's.
    num_clients : int, optional
        How many clients there really are, where something else decides that.
    """
    data = configuration["data"]
    seed = configuration.seed("partition")
    if dataset is None:
        dataset = load(
            data["name"], data["path"] or None, seed, **configuration.options("data")
        )
    else:
        dataset = check_data(dataset)
    partition = configuration["partition"]
    federated = federate(
        dataset,
        partition["name"],
        num_clients or partition["clients"] or None,
        held_out=data["held-out"],
        proxy=data["proxy"],
        seed=seed,
        **configuration.options("partition"),
    )
    return Components(configuration, federated)


def engine_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return what [engine] says of where clients run, as :func:`simulate` takes it."""
    table = configuration["engine"]
    return {
        "engine": table["name"],
        "workers": table["workers"] or None,
        "gpus_per_worker": table["gpus-per-worker"],
        "address": table["address"] or None,
    }


def make_ready(
    components: Components, *, simulated: bool = True
) -> tuple[Strategy, TrainingApp, FlatRecord]:
    """Make what a run starts with, or refuse it before anything is written.

    Where the run is not ``simulated``, who takes part is not known before.

    Returns
    -------
    tuple
        The strategy, the ClientApp and the initial model.
    """
    Plan.parse(components.configuration["engine"]["plan"])
    strategy = components.strategy()
    client_app = components.client_app()
    initial = FlatRecord(FlatModule(components.make_model()).save())
    components.check_feasible(strategy, client_app, simulated=simulated)
    return strategy, client_app, initial


def client_data(
    configuration: Configuration,
    context: Context,
    federated: FederatedData | None,
    schema: Schema | None = None,
) -> ClientData:
    """Return the data of the client behind a context.

    A real node names its file, ``data-path``, whose columns are put in the order of the
    server's, its ``schema``; a simulated one names its ``partition-id``.
    """
    path = context.node_config.get("data-path")
    if path is not None:
        options = configuration.options("data")
        # What [data] says of the columns of a CSV file holds for everybody's.
        takes = (
            options_of(load_one_csv) if Path(str(path)).suffix.lower() == ".csv" else {}
        )
        return load_client(
            str(path),
            held_out=configuration["data"]["held-out"],
            seed=configuration.seed("partition"),
            schema=schema,
            **{key: value for key, value in options.items() if key in takes},
        )
    if federated is None or "partition-id" not in context.node_config:
        raise ConfigurationError(
            "the node config has neither 'partition-id' nor 'data-path'. Start the "
            "SuperNode with --node-config \"data-path='/path/to/data.csv'\"."
        )
    return federated.client(client_number(context))


def run(
    file: str | Path | None = None,
    *,
    strategy: str | None = None,
    engine: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    dataset: DataSet | None = None,
    report: bool = True,
    progress: Report | None = None,
    overwrite: bool = False,
) -> Run:
    """Run a simulation and write its folder.

    Ctrl-C and SIGTERM end it early, with all that was recorded written.

    Parameters
    ----------
    file : str or Path, optional
        A simulation file; the quick start by default.
    strategy, engine, seed : optional
        Short for the settings ``strategy.name``, ``engine.name`` and ``run.seed``.
    out : str or Path, optional
        The run's folder; by default a new one under ``runs/``.
    settings : Mapping or sequence of str
        Override keys of the file: ``{"partition.alpha": 0.1}``, or texts as on the
        command line, ``["partition.alpha=0.1"]``.
    dataset : DataSet, optional
        Data of your own instead of the file's ``[data]``.
    report : bool
        Write ``report.html`` at the end.
    progress : Callable[[Progress], None], optional
        Called after every round.
    overwrite : bool
        Remove the run that is in the folder already, as one that crashed leaves it.
        A folder that holds anything else, or a run that goes on, is refused all the
        same.

    Returns
    -------
    Run
        The folder, as pandas frames and plots.

    Raises
    ------
    ConfigurationError, DataError, EngineError
        Before anything is written.
    OutputError
        A file cannot be written. Those that were written before are whole.

    Examples
    --------
    >>> import fedweight
    >>> result = fedweight.run(
    ...     strategy="ida", settings={"run.rounds": 2}
    ... )  # doctest: +SKIP
    >>> result.rounds["test_accuracy"].plot()  # doctest: +SKIP
    """
    if not isinstance(settings, Mapping):
        settings = {
            f"{table}.{key}": value
            for table, key, value in map(parse_setting, settings)
        }
    short = {"strategy.name": strategy, "engine.name": engine, "run.seed": seed}
    given = {key: value for key, value in short.items() if value is not None}
    if dataset is not None and not isinstance(dataset, DataSet):
        raise DataError(
            f"dataset must be a fedweight.data.DataSet, got {shown(dataset)}. A file "
            "is named by data.name and data.path."
        )
    own = None if dataset is None else dataset.name
    if file is not None and own is None and "data.name" not in settings:
        check_repeats(Path(file))
    configuration = Configuration.read(file, {**settings, **given}, own)
    check_free(out, overwrite)
    components = prepare(configuration, dataset)
    chosen, client_app, initial = make_ready(components)
    name = configuration["strategy"]["name"].rsplit(":", 1)[-1].lower()
    label = f"{configuration['run']['name']}-{name}-seed{configuration['run']['seed']}"
    plan = components.plan(client_app, initial)
    # What was measured is part of the configuration now: it repeats the run.
    components.configuration = configuration.having("engine", "plan", str(plan))
    return _simulated(
        components,
        (chosen, client_app, initial),
        plan,
        new_folder(out, label, overwrite),
        report=report,
        progress=progress,
        preface="" if dataset is None else GIVEN_IN_PYTHON,
    )


def resume(
    folder: str | Path, *, report: bool = True, progress: Report | None = None
) -> Run:
    """Go on with a run that was stopped, from its last checkpoint.

    Its folder then holds what an uninterrupted run would have written, but for what the
    clock said.

    Parameters
    ----------
    folder : str or Path
        The run's folder.
    report : bool
        Write ``report.html`` at the end.
    progress : Callable[[Progress], None], optional
        Called after every round.

    Raises
    ------
    DataError
        If the folder is not a run's, or has no checkpoint of this run.
    ConfigurationError
        If the run is going on, or its data were given in Python.
    """
    before = Run(Path(folder))
    config = before.folder / "config.toml"
    check_repeats(config)
    configuration = Configuration.read(config)
    if before.complete:
        raise ConfigurationError(
            f"the run in {before.folder} is complete: there is nothing to go on with."
        )
    checkpoint = read_checkpoint(before.folder, configuration)
    components = prepare(configuration)
    made = make_ready(components)
    plan = Plan.parse(configuration["engine"]["plan"])
    return _simulated(
        components,
        made,
        plan or Plan(),
        old_folder(before.folder),
        report=report,
        progress=progress,
        checkpoint=checkpoint,
    )


def _simulated(
    components: Components,
    made: tuple[Strategy, TrainingApp, FlatRecord],
    plan: Plan,
    take: AbstractContextManager[Path],
    *,
    report: bool,
    progress: Report | None,
    preface: str = "",
    checkpoint: Mapping[str, Any] | None = None,
) -> Run:
    """Simulate a run that is ready, and write its folder."""
    strategy, client_app, initial = made
    configuration = components.configuration
    began = time.perf_counter()
    folder: Path | None = None
    server_app = ServerApp()

    with interruptible(), ExitStack() as stack:

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            nonlocal folder
            # The clients' engine is there: nothing is left that could be refused.
            folder = stack.enter_context(take)
            recorder = Recorder(folder, components, strategy, progress, began)
            with recorder.recording(
                {"plan": str(plan)}, preface=preface, anew=checkpoint is None
            ):
                serve(grid, components, strategy, initial, recorder, checkpoint)

        try:
            with quiet_flower():
                simulate(
                    server_app,
                    client_app,
                    num_clients=components.data.num_clients,
                    threads=configuration["engine"]["threads"] or None,
                    plan=plan,
                    **engine_arguments(configuration)
                    | {"gpus_per_worker": components.gpus_per_worker()},
                )
            assert folder is not None
            result = Run(folder)
            if report:
                result.report()
        except BaseException as stop:
            if folder is not None:
                stop.add_note(_what_was_recorded(folder))
            raise
    return result


def _what_was_recorded(folder: Path) -> str:
    said = f"What was recorded is in {folder}. To see it: fedweight report {folder}"
    if (folder / KEPT).is_file():
        said += f". To go on from the last checkpoint: fedweight resume {folder}"
    return said


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to warnings; what a round did is in the run's folder."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def serve(
    grid: Grid,
    components: Components,
    strategy: Strategy,
    initial: FlatRecord,
    recorder: Recorder,
    checkpoint: Mapping[str, Any] | None = None,
) -> None:
    """Be the server: let the strategy run its rounds, and record them.

    With a ``checkpoint`` only those that come after it.
    """
    configuration = components.configuration
    recorder.grid = grid
    schema = components.schema
    told = {} if schema is None else {keys.SCHEMA: schema.write()}
    epochs = configuration["training"]["epochs"]
    rounds = configuration["run"]["rounds"]
    timeout = configuration["run"]["timeout"] or None
    state = ServerState(
        initial,
        train_config=ConfigRecord({keys.LOCAL_EPOCHS: epochs, **told}),
        evaluate_config=ConfigRecord(dict(told)),
    )
    with one_thread():
        if type(strategy).start in (Strategy.start, WeightingStrategy.start):
            callbacks: list[loop.Callback] = [recorder]
            if isinstance(grid, SimulationGrid):
                _tell_what_is_not_carried(strategy)
                callbacks.append(Keeper(configuration, strategy, grid, recorder))
            if checkpoint is None:
                recorder(state)
            else:
                assert isinstance(grid, SimulationGrid)
                state = go_on(checkpoint, strategy, grid, recorder, initial)
            loop.federate(
                strategy,
                grid,
                state,
                until=rounds,
                timeout=timeout,
                callbacks=callbacks,
            )
        else:  # It runs its rounds in a way of its own.
            strategy.start(
                grid,
                initial,
                num_rounds=rounds,
                timeout=timeout,  # type: ignore[arg-type]
                train_config=state.train_config,
                evaluate_config=state.evaluate_config,
                evaluate_fn=recorder.after_round,
            )


def _tell_what_is_not_carried(strategy: Strategy) -> None:
    """Name, at the start, what a run that is resumed would not have."""
    odd = not_carried(strategy)
    if odd:
        log.warning(
            "a run of %s that is stopped cannot go on with the same bits: no "
            "checkpoint can hold its %s",
            type(strategy).__name__,
            listed(odd),
        )


class Recorder:
    """Writes a run's folder, round by round.

    Parameters
    ----------
    folder : Path
        The run's folder.
    components : Components
        What is run.
    strategy : Strategy
        Its ``history`` is what is recorded, if it keeps one.
    progress : Callable, optional
        Called after every round.
    began : float, optional
        When the run began, by ``time.perf_counter``; by default now.
    """

    def __init__(
        self,
        folder: Path,
        components: Components,
        strategy: Strategy,
        progress: Report | None = None,
        began: float | None = None,
    ) -> None:
        self.folder = folder
        self.components = components
        self.strategy = strategy
        self.progress = progress
        self.rounds = Table(folder / "rounds.csv", ROUND_COLUMNS)
        self.clients = Table(folder / "clients.csv", CLIENT_COLUMNS, ["name"])
        self.errors = ErrorLog(folder / "errors.log")
        self.timings = Table(folder / "timings.csv", ("round", "seconds", "elapsed"))
        self.partition: Table | None = None
        self._described: set[int] = set()
        self._module: FlatModule | None = None
        self._arrays: ArrayRecord | None = None
        self._began = self._last = time.perf_counter() if began is None else began
        self._heard: list[RoundRecord] = []
        self._environment: dict[str, Any] = {}
        self.grid: Grid | None = None
        self.listener: Listener | None = None
        if not hasattr(strategy, "history"):
            self._listen(strategy)

    def _listen(self, strategy: Strategy) -> None:
        """Record what clients answer to a strategy that keeps no history itself."""
        listener = Listener(self._heard, self._client_of, self._name_of)
        self.listener = listener
        strategy.configure_train = listener.asks(strategy.configure_train)  # type: ignore[method-assign]
        strategy.aggregate_train = listener.hears(strategy.aggregate_train)  # type: ignore[method-assign]

    def _client_of(self, node: int) -> int:
        number: Callable[[int], int] = getattr(self.grid, "client_of", int)
        return number(node)

    def _name_of(self, client: int) -> str:
        name: Callable[[int], str] = getattr(self.grid, "name_of", None) or str
        return name(client)

    @contextmanager
    def recording(
        self,
        engine: Mapping[str, Any] | None = None,
        *,
        own_data: bool = False,
        preface: str = "",
        anew: bool = True,
    ) -> Iterator[None]:
        """Write the folder while rounds are run in a ``with`` block.

        However the block ends, what was recorded in it is written.

        Parameters
        ----------
        engine : Mapping, optional
            What else is known of the engine.
        own_data : bool
            Clients have data of their own: how those are spread is theirs to know.
        preface : str
            Comments that ``config.toml`` begins with.
        anew : bool
            False where the run was begun before, and goes on.
        """
        try:
            self._begin(dict(engine or {}), own_data, preface, anew)
            yield
        except BaseException as stop:
            failure = self._end()
            if failure is not None and not isinstance(stop, OutputError):
                log.warning("%s", failure)  # Not instead of what stopped the run.
            raise
        failure = self._end()
        if failure is not None:
            raise failure

    @property
    def state(self) -> dict[str, Any]:
        """How much is recorded, for :meth:`restore`."""
        tables = self._tables().items()
        return {
            "tables": {name: table.state for name, table in tables},
            "errors": self.errors.state,
            "described": sorted(self._described),
            "own-metrics": [] if self.listener is None else self.listener.own_metrics,
            "elapsed": time.perf_counter() - self._began,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what was recorded later is removed."""
        for name, table in self._tables().items():
            table.restore(state["tables"][name])
        self.errors.restore(state["errors"])
        self._described = set(state["described"])
        if self.listener is not None:
            self.listener.own_metrics = state["own-metrics"]
        self._last = time.perf_counter()
        self._began = self._last - state["elapsed"]

    def _tables(self) -> dict[str, Table]:
        tables = {
            "rounds": self.rounds,
            "clients": self.clients,
            "timings": self.timings,
        }
        return (
            tables if self.partition is None else tables | {"partition": self.partition}
        )

    def _begin(
        self, engine: dict[str, Any], own_data: bool, preface: str, anew: bool
    ) -> None:
        """Write what is known before the first round."""
        components = self.components
        self._environment = environment_of(components)
        self._environment["engine"] |= engine
        if own_data:
            del self._environment["data"]["clients"]
        else:
            self._environment["data"]["notes"] = notes(components.data)
        if anew:
            config = preface + components.configuration.to_toml()
            write_whole(self.folder / "config.toml", config)
            self._write_environment()
        if own_data:
            return
        classes = (f"label_{c}" for c in range(components.data.num_classes))
        name = ("name",) if components.data.names else ()
        columns = ("client", *name, "train_examples", "held_out_examples", *classes)
        self.partition = Table(self.folder / "partition.csv", columns)
        # Of clients that are computed when they are asked for, only those who are.
        lazy = components.data.is_lazy
        if anew:
            self._write_partition(() if lazy else range(components.data.num_clients))

    def _write_environment(self) -> None:
        text = json.dumps(self._environment, indent=2) + "\n"
        write_whole(self.folder / "environment.json", text)

    def _write_partition(self, clients: Iterable[int]) -> None:
        """Add clients that are not there yet to ``partition.csv``."""
        if self.partition is None:
            return
        # A reply may claim to be from a client that there is not.
        data = self.components.data
        there_are = range(data.num_clients)
        new = [c for c in clients if c in there_are and c not in self._described]
        self._described.update(new)
        rows = []
        for client in new:
            train, held_out = data.labels(client)
            name = {"name": plain(data.name_of(client), NAME_LENGTH)}
            rows.append(
                {
                    "client": client,
                    **(name if data.names else {}),
                    "train_examples": int(train.sum()),
                    "held_out_examples": int(held_out.sum()),
                    **{f"label_{c}": n for c, n in enumerate(train.tolist())},
                }
            )
        self.partition.append(rows)

    def __call__(self, state: ServerState) -> None:
        """Record a round of our loop, or what was there before the first."""
        self.after_round(state.round, state.arrays)

    def after_round(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate the global model, and record the round; Flower's evaluate_fn."""
        self._arrays = arrays
        test = self._test(number, arrays)
        history = getattr(self.strategy, "history", self._heard)
        if history and history[-1].number == number:
            record = history[-1]
        else:
            record = RoundRecord(number)
        self.clients.append(client_row(number, c) for c in record.clients)
        self.errors.add(record)
        if self.components.data.is_lazy:
            self._write_partition(c.client for c in record.clients)
        self.rounds.append([round_row(record, test)])
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.timings.append(
            [{"round": number, "seconds": seconds, "elapsed": now - self._began}]
        )
        if self.progress is not None:
            self.progress(
                Progress(
                    number,
                    self.components.configuration["run"]["rounds"],
                    test.get("accuracy", float("nan")),
                    test.get("loss", float("nan")),
                    now - self._began,
                )
            )
        return MetricRecord(dict(test)) if test else None

    def _end(self) -> OutputError | None:
        """Write all that is still to be written; return why some of it cannot be."""
        tables = (self.rounds, self.clients, self.timings, self.partition)
        jobs = [table.write for table in tables if table is not None]
        jobs += [self.errors.write, self._write_connected, self._write_model]
        failure = None
        for write in jobs:
            try:
                write()
            except OutputError as error:
                failure = failure or error
        return failure

    def _write_connected(self) -> None:
        """Write down which clients were there, where they come and go."""
        connected = getattr(self.grid, "connected", None)
        if connected is not None and self._environment:
            self._environment["data"]["connected"] = sorted(connected)
            self._write_environment()

    def _write_model(self) -> None:
        if self._arrays is not None:
            layout = self._ready_module().layout
            state = flatten(self._arrays, layout).state_dict()
            write_whole(self.folder / "model.safetensors", safetensors_bytes(state))

    def _ready_module(self) -> FlatModule:
        if self._module is None:
            components = self.components
            self._module = FlatModule(components.make_model(), components.device)
        return self._module

    def _test(self, number: int, arrays: ArrayRecord) -> dict[str, float]:
        table = self.components.configuration["run"]
        due = number % table["evaluate-every"] == 0 or number == table["rounds"]
        if not due:
            return {}
        module = self._ready_module()
        model = flatten(arrays, module.layout)
        loss, accuracy = evaluate(module, model, self.components.data.test)
        return {"loss": loss, "accuracy": accuracy}


def environment_of(components: Components) -> dict[str, Any]:
    """Return what a run ran on: versions, machine, engine, data."""
    test = components.data.test
    packages = ("fedweight", "flwr", "torch", "ray", "numpy", "pandas")
    name = components.engine()
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "gpus": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ],
        },
        "engine": {"name": name, "device": components.device},
        "data": {
            "name": components.data.name,
            "clients": components.data.num_clients,
            "classes": components.data.num_classes,
            "class_names": list(components.data.class_names),
            "input_shape": list(components.data.input_shape),
            "test_examples": len(test),
            "largest_test_class": _largest_share(test.y),
        },
        "model": {
            "parameters": Layout.of_module(components.make_model()).num_parameters
        },
    }


def _largest_share(labels: Any) -> float | None:
    """Return the share of the most frequent class; None where there are no labels."""
    if not len(labels):
        return None
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
