"""A run's parts, made of its simulation file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from ..clients.objectives import Objective
from ..clients.personal import Personal, personal
from ..clients.personal_models import own_layers
from ..core.errors import ConfigurationError, check_choice
from ..core.layout import Layout
from ..core.options import options_of
from ..core.paths import why_unreadable
from ..core.precision import Precision, check_precision
from ..core.registry import make
from ..data import (
    ClientData,
    DataSet,
    FederatedData,
    Schema,
    federate,
    load,
    load_client,
)
from ..data import check as check_data
from ..data.files import load_one_csv, load_one_npz
from ..data.groups import check_groups
from ..messages.codecs import Codec, codec
from ..metrics import Groups, LearningTask, Statistics, task_named
from ..models.adapters import factors_of
from ..server.schedules import SCHEDULES, Buffered, Schedule, make_schedule
from ..server.wrapped import with_inner
from ..simulations.engine import choose_engine
from ..simulations.planner import Choice
from ..strategies import WeightingStrategy, strategy_class
from ..strategies.server_optimizers import server_optimizer
from .configuration import Configuration
from .grouping import flips_asked, groups_asked

T = TypeVar("T")

# So many clients tell how large they all are.
MANY = 10**6


@dataclass
class Components:
    """A configuration's parts, made: what the server and the clients share."""

    configuration: Configuration
    data: FederatedData
    schema: Schema | None = None  # What nodes with files of their own are told.
    digest: str = ""  # Of the data set that they are of.
    device: str = field(init=False)
    choice: Choice | None = None  # Where and how clients train, once it is decided.

    def __post_init__(self) -> None:
        """Take the device, or the first of those that may be chosen."""
        gpus = torch.cuda.device_count()
        allowed = ["cpu", *(["cuda"] if gpus else [])]
        allowed += [f"cuda:{number}" for number in range(gpus)]
        wanted = self.configuration["engine"]["device"]
        check_choice("engine.device", wanted, ["auto", *allowed])
        self.device = self.devices[0]
        check_precision("engine.precision", self.precision, self.device)

    @property
    def devices(self) -> list[str]:
        """Where clients may train: as told, or on a card and on the CPU."""
        wanted = str(self.configuration["engine"]["device"])
        if wanted != "auto":
            return [wanted]
        if not torch.cuda.device_count():
            return ["cpu"]
        return ["cuda", *([] if self._asks_for_cards else ["cpu"])]

    @property
    def _asks_for_cards(self) -> bool:
        return float(self.configuration["engine"]["gpus-per-worker"]) > 0

    @property
    def precision(self) -> Precision:
        """How models are computed."""
        precision: Precision = self.configuration["engine"]["precision"]
        return precision

    def clients_model(self) -> nn.Module:
        """Build the model as a client does, which may not have the server's file.

        What it trains comes from the server, and what it lacks of the rest, too.
        """
        path = self.configuration["model"]["weights"]
        there = bool(path) and why_unreadable(Path(path)) is None
        return self.make_model(path if there else "")

    def make_model(self, weights: str | None = None) -> nn.Module:
        """Build the model with the run's initial weights.

        Parameters
        ----------
        weights : str, optional
            Another file than the configuration's; ``""`` for random ones.

        Raises
        ------
        ConfigurationError
            If nothing of it is trained.
        """
        table = self.configuration["model"]
        model = models.build(
            table["name"],
            self.data.input_shape,
            self.task.width(self.data.num_classes),
            seed=self.configuration.seed("model"),
            adapters=table["adapters"],
            weights=table["weights"] if weights is None else weights,
            **self.configuration.options("model"),
        )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigurationError(
                f"model '{self.configuration['model']['name']}' has no parameter that "
                "is trained: all are frozen, or there are none. Let some require a "
                "gradient."
            )
        return model

    @property
    def task(self) -> LearningTask:
        """What is predicted."""
        return task_named(self.data.task)

    @cached_property
    def statistics(self) -> Statistics:
        """What is measured of the global model."""
        metrics = self.configuration["run"]["metrics"]
        if "confusion" in metrics:
            raise ConfigurationError(
                "run.metrics: 'confusion' is a table of numbers, and no column of a "
                "run's files. Leave it out: Run.predictions() has what it counts."
            )
        made = partial(
            Statistics,
            self.task,
            self.data.num_classes,
            metrics or None,
            math.prod(self.data.target_shape) if self.task.of_pixels else None,
            self.groups,
        )
        return named("run", made)

    @cached_property
    def groups(self) -> Groups | None:
        """By which groups it is measured, or ``None``."""
        return groups_asked(self.configuration, self.data)

    def client_data(self, context: Context) -> ClientData:
        """Return a client's data: its part of a simulation, or its own file."""
        return client_data(self.configuration, context, self.data)

    def objective(self) -> Objective:
        """Make what clients minimise, with what the strategy puts around it."""
        made = self.chosen_objective()
        for method, options in self._methods():
            made = named("strategy", partial(method.objective, made, options))
        return made

    def chosen_objective(self) -> Objective:
        """Make what clients minimise, by itself."""
        name = self.configuration["objective"]["name"]
        options = self.configuration.options("objective")
        return named("objective", partial(objective, name, **options))

    def personal(self) -> Personal | None:
        """Make what clients train for themselves."""
        name = self.configuration["personal"]["name"]
        options = self.configuration.options("personal")
        return named("personal", partial(personal, name, **options))

    def personal_layout(self) -> Layout:
        """Return the layout of personal models: what is a client's own is trained."""
        personal = self.personal()
        if personal is None or not personal.layers:
            return Layout.of_module(self.make_model())
        return Layout.of_module(own_layers(self.make_model, personal))

    def codec(self) -> Codec:
        """Make what writes trained models on the wire."""
        name = self.configuration["codec"]["name"]
        return named(
            "codec", partial(codec, name, **self.configuration.options("codec"))
        )

    def client_app(self, device: str | None = None) -> TrainingApp:
        """Make the ClientApp, for the device or for another."""
        training = self.configuration["training"]
        methods = self._methods()
        return TrainingApp(
            self.clients_model,
            self.client_data,
            num_classes=self.data.num_classes,
            task=self.data.task,
            metrics=self.statistics.extra,
            objective=self.objective(),
            settings=TrainingSettings.of_keys(
                {key.replace("-", "_"): value for key, value in training.items()},
                self.configuration["run"]["rounds"],
            ),
            seed=self.configuration["run"]["seed"],
            device=device or self.device,
            sizes=self.data.sizes,
            parts=self.data.parts,
            name_of=self.data.name_of if self.data.names else None,
            probes={n: f for one, _ in methods for n, f in one.probes.items()},
            queries={n: f for one, _ in methods for n, f in one.queries.items()},
            personal=self.personal(),
            codec=self.codec(),
            precision=self.precision,
            trace=self.configuration["engine"]["trace"],
            groups=self.groups,
            num_groups={
                name: len(codes) for name, codes in self.data.attribute_names.items()
            },
        )

    def _methods(self) -> list[tuple[type[WeightingStrategy], dict[str, Any]]]:
        """Return the classes whose client halves are needed, with their options.

        That of the strategy, or those of the strategies that it wraps: they are known
        when it is made.
        """
        name = self.configuration["strategy"]["name"]
        outer = strategy_class(name)
        if issubclass(outer, WeightingStrategy):
            usual = {n: o.default for n, o in options_of(outer).items()}
            return [(outer, usual | self.configuration.options("strategy"))]
        if outer.__module__.partition(".")[0] == "flwr":
            return []  # By itself it wraps nothing.
        inside = with_inner(self.strategy())
        return [
            (type(one), {n: getattr(one, n) for n in options_of(type(one))})
            for one in inside
            if isinstance(one, WeightingStrategy)
        ]

    def _group(self) -> str:
        """Return the attribute that the strategy groups examples by, if it does."""
        return str(self.configuration.options("strategy").get("group", ""))

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

    @property
    def known_sizes(self) -> npt.NDArray[np.int64]:
        """How many examples clients have; of those drawn when asked for, of some."""
        return self.data.sizes[:MANY] if self.data.is_lazy else self.data.sizes

    def cohort(self) -> int:
        """Return how many clients train at a time."""
        share = self.configuration["strategy"].get("fraction-train") or 1.0
        cohort = max(1, int(self.data.num_clients * share))
        schedule = self.schedule()
        if isinstance(schedule, Buffered):
            cohort = min(cohort, schedule.buffer_size)
        return cohort

    def schedule(self) -> Schedule | None:
        """Make the schedule; ``None`` for the synchronous one."""
        name = self.configuration["schedule"]["name"]
        options = self.configuration.options("schedule")
        if "seed" in options_of(SCHEDULES.resolve(name)):
            options["seed"] = self.configuration["run"]["seed"]
        return named("schedule", partial(make_schedule, name, **options))

    def strategy(self) -> Strategy:
        """Make the strategy, with what it needs from the server."""
        name = self.configuration["strategy"]["name"]
        chosen = strategy_class(name)
        takes, goal = options_of(chosen), self.chosen_objective()
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
            "local_learning_rate": self.configuration["training"]["learning-rate"],
            "class_totals": "class-totals" in goal.wants,
            "pools": goal.pools,
            "hears": [name for name in goal.hears if name not in goal.pools],
            "codec": self.codec(),
            "factors": factors_of(self.clients_model()),
        }
        if self.data.num_classes:
            ours["num_classes"] = self.data.num_classes
        ours["input_shape"] = self.data.input_shape
        if "num_groups" in takes and (group := self._group()):
            check_groups("strategy.group", self.data, group)
            ours["num_groups"] = len(self.data.attribute_names[group])
        if self.statistics.sends:
            ours["statistics"] = self.statistics
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
        digest = dataset.digest
    else:
        digest, dataset = dataset.digest, check_data(dataset)
    partition = configuration["partition"]
    federated = federate(
        dataset,
        partition["name"],
        num_clients or partition["clients"] or None,
        held_out=data["held-out"],
        proxy=data["proxy"],
        validation=data["validation"],
        seed=seed,
        leave_out=partition["leave-out"],
        flips=flips_asked(configuration),
        **configuration.options("partition"),
    )
    return Components(configuration, federated, digest=digest)


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
        # What [data] says of the columns of a file holds for everybody's.
        is_csv = Path(str(path)).suffix.lower() == ".csv"
        takes = options_of(load_one_csv if is_csv else load_one_npz)
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
