"""A run's parts, made of its simulation file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Context
from flwr.serverapp.strategy import Strategy
from torch import nn

from .. import models
from ..clients import TrainingApp, TrainingSettings, client_number, objective
from ..clients.objectives import Proximal
from ..clients.probes import PROBES, REPORTED
from ..core.errors import ConfigurationError, check_choice, closest
from ..core.layout import Layout, as_tensor
from ..core.options import options_of
from ..core.registry import make
from ..data import ClientData, FederatedData, Schema, load_client
from ..data.examples import channels_last
from ..data.files import load_one_csv
from ..messages import keys
from ..messages.arrays import FlatRecord
from ..server.schedules import SCHEDULES, Buffered, Clock, Schedule, make_schedule
from ..server.wrapped import with_inner
from ..simulations import Plan
from ..simulations.engine import check_engine, check_local, choose_engine
from ..simulations.grid import usable_plan
from ..simulations.planner import (
    SAMPLE,
    WORTH_MEASURING,
    choose_plan,
    estimated_seconds,
    machine,
)
from ..strategies import WeightingStrategy, strategy_class
from ..strategies.server_optimizers import server_optimizer
from .configuration import Configuration

T = TypeVar("T")

# So many clients of a round fit into memory: their messages and replies.
MOST_ASKED = 10**7

# So many clients tell how large they all are.
MANY = 10**6


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
        methods = self._methods()
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
            probes={n: f for one in methods for n, f in one.probes.items()},
            queries={n: f for one in methods for n, f in one.queries.items()},
        )

    def _methods(self) -> list[type[WeightingStrategy]]:
        """Return the classes whose probes and queries clients need.

        That of the strategy, or those of the strategies that it wraps: they are known
        when it is made.
        """
        name = self.configuration["strategy"]["name"]
        outer = strategy_class(name)
        if issubclass(outer, WeightingStrategy):
            return [outer]
        if outer.__module__.partition(".")[0] == "flwr":
            return []  # By itself it wraps nothing.
        inside = with_inner(self.strategy())
        return [type(one) for one in inside if isinstance(one, WeightingStrategy)]

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
        for one in with_inner(strategy):
            self._check_stragglers(one)
            self._check_request(one, client_app)
            self._check_proximal(one, client_app)
            if simulated:
                self._check_clients(one)
        self._check_schedule(strategy, simulated=simulated)
        self._check_decisions(strategy)
        self._check_model()
        if simulated:
            check_local(**engine_arguments(self.configuration), table="engine")
            check_engine(self.engine())

    def _check_stragglers(self, strategy: Strategy) -> None:
        """Refuse stragglers that have no time for a single epoch."""
        share = getattr(strategy, "stragglers", 0)
        epochs = self.configuration["training"]["epochs"]
        if share and epochs < 2:
            raise ConfigurationError(
                f"strategy.stragglers is {share:g}, which needs "
                f"training.epochs of 2 or more, got {epochs}: a straggler does fewer "
                "epochs than the others, but at least one."
            )

    @staticmethod
    def _check_request(strategy: Strategy, client_app: TrainingApp) -> None:
        """Refuse a strategy that asks for what clients do not measure."""
        if not isinstance(strategy, WeightingStrategy):
            return
        reported = (*REPORTED, keys.LOSS, keys.ACCURACY)
        names = sorted({*PROBES.entries, *client_app.probes})
        for name in strategy.request:
            if name not in names and name not in reported:
                raise ConfigurationError(
                    f"{type(strategy).__name__}.request names '{name}', which clients "
                    f"do not measure.{closest(name, names)} There are "
                    f"{', '.join(names)}; a function of your own is one of `probes`."
                )

    def _check_clients(self, strategy: Strategy) -> None:
        """Refuse a strategy that asks for more clients than there are, or than fit."""
        clients, schedule = self.data.num_clients, self.schedule()
        shares = ["fraction_train", "fraction_evaluate"]
        if schedule is not None and schedule.chooses:
            shares.remove("fraction_train")
        for name in shares:
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

    def _check_decisions(self, strategy: Strategy) -> None:
        """Refuse to stop, or to choose a model, by what nobody will have measured."""
        table = self.configuration["run"]
        rests_on = {
            "run.stop-metric": table["stop-metric"] if table["stop-after"] else "",
            "run.keep-best": table["keep-best"],
        }
        off = {"run.stop-metric": "run.stop-after = 0", "run.keep-best": 'it to ""'}
        for key, metric in rests_on.items():
            why, instead = self._not_measured(strategy, metric) if metric else ("", "")
            if why:
                advice = f"{instead}set {off[key]}"
                raise ConfigurationError(
                    f"{key} is '{metric}', but {why}. {advice[0].upper()}{advice[1:]}."
                )

    def _not_measured(self, strategy: Strategy, metric: str) -> tuple[str, str]:
        """Return why no round will have a metric, and what to do; empty if it will."""
        if not has_our_loop(strategy):
            return f"{own_loop(self.configuration)}, which ends when it wants", ""
        trains = metric.startswith("train-")
        share = "fraction_train" if trains else "fraction_evaluate"
        if any(getattr(one, share, 1.0) == 0 for one in with_inner(strategy)):
            key = f"strategy.{share.replace('_', '-')}"
            return f"{key} is 0: no client measures it", f"Raise {key}, or "
        if trains:
            return "", ""
        raise_it = "Raise data.held-out, or "
        if self.configuration["data"]["held-out"] == 0:
            return "data.held-out is 0: clients keep nothing to evaluate", raise_it
        if self.schema is None and not self.data.holds_out:
            return (
                f"no client has so many examples that data.held-out = "
                f"{self.configuration['data']['held-out']:g} leaves it one to evaluate",
                raise_it,
            )
        return "", ""

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
        schedule = self.schedule()
        if isinstance(schedule, Buffered):
            cohort = min(cohort, schedule.buffer_size)
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

    def schedule(self) -> Schedule | None:
        """Make the schedule; ``None`` for the synchronous one."""
        name = self.configuration["schedule"]["name"]
        options = self.configuration.options("schedule")
        if "seed" in options_of(SCHEDULES.resolve(name)):
            options["seed"] = self.configuration["run"]["seed"]
        return named("schedule", partial(make_schedule, name, **options))

    def _check_schedule(self, strategy: Strategy, *, simulated: bool) -> None:
        """Refuse what does not go with a schedule that is not the synchronous one."""
        schedule = self.schedule()
        if schedule is None:
            return
        name = self.configuration["schedule"]["name"]
        if not simulated:
            raise ConfigurationError(
                f"schedule.name: '{name}' is for simulated clients, whose speeds are "
                "known. Choose 'synchronous'."
            )
        if not isinstance(strategy, WeightingStrategy):
            raise ConfigurationError(
                f"schedule.name: '{name}' needs a strategy derived from "
                "fedweight.strategies.WeightingStrategy, got "
                f"{type(strategy).__name__}. Choose 'synchronous'."
            )
        if not has_our_loop(strategy):
            raise ConfigurationError(
                f"schedule.name: '{name}' does not go with "
                f"{own_loop(self.configuration)}. Choose 'synchronous'."
            )
        with strategy.following(Clock(schedule)):  # It says what does not go.
            pass
        if not isinstance(schedule, Buffered):
            return
        if strategy.stragglers or strategy.fraction_train != 1:
            key = "stragglers" if strategy.stragglers else "fraction-train"
            raise ConfigurationError(
                f"strategy.{key} does not go with schedule '{name}', where "
                "schedule.concurrency says how many clients train at a time. Leave it "
                "out."
            )
        clients = self.data.num_clients
        if schedule.buffer_size > clients:
            raise ConfigurationError(
                f"schedule.buffer-size is {schedule.buffer_size}, but there are "
                f"{clients} clients (partition.clients), and none is in a buffer twice."
            )
        if strategy.min_replies > schedule.buffer_size:
            raise ConfigurationError(
                f"strategy.min-replies is {strategy.min_replies}, but no round has "
                f"more than schedule.buffer-size = {schedule.buffer_size} replies."
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
            "local_learning_rate": self.configuration["training"]["learning-rate"],
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


def has_our_loop(strategy: Strategy) -> bool:
    """Tell whether our loop runs a strategy's rounds, and no ``start`` of its own."""
    return type(strategy).start in (Strategy.start, WeightingStrategy.start)


def own_loop(configuration: Configuration) -> str:
    """Return how a message says that a strategy runs its rounds itself."""
    name = configuration["strategy"]["name"]
    return f"strategy '{name}' runs its rounds in a start() of its own"


def named(table: str, call: Callable[[], T]) -> T:
    """Make what a table describes; an error says which table it is about."""
    try:
        return make("what it names", call)
    except ConfigurationError as error:
        if str(error).startswith(f"{table}."):
            raise
        raise ConfigurationError(f"[{table}]: {error}") from error.__cause__


def engine_arguments(configuration: Configuration) -> dict[str, Any]:
    """Return what [engine] says of where clients run, as :func:`simulate` takes it."""
    table = configuration["engine"]
    return {
        "engine": table["name"],
        "workers": table["workers"] or None,
        "gpus_per_worker": table["gpus-per-worker"],
        "address": table["address"] or None,
    }


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
