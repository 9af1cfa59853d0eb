"""The tables of a simulation file: their keys, defaults, ranges and meanings.

What a table's ``name`` picks brings options of its own, which stand beside ``name``; so
do the optimiser and the schedule of the learning rate that [training] picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..clients.objectives import OBJECTIVES
from ..clients.optimizers import FILLED_IN, OPTIMIZERS
from ..clients.personal import PERSONAL
from ..clients.rate_schedules import RATE_SCHEDULES
from ..clients.settings import TrainingSettings
from ..core.errors import ConfigurationError
from ..core.options import ANY, MOST, Option, options_of
from ..core.precision import Precision
from ..core.registry import Registry, check_callable
from ..core.settings import kebab, names_of
from ..data import DATA_SETS
from ..data.partitions import PARTITIONS
from ..messages import keys
from ..messages.codecs import CODECS
from ..models import MODELS
from ..models.adapters import ADAPTERS
from ..server.schedules import SCHEDULES
from ..strategies import SERVER_OPTIMIZERS, STRATEGIES
from .columns import DECISIVE

# Beyond these a number can only be a mistake: a seed longer than Flower carries,
# seconds that make ten years, more threads or workers than a machine has.
MOST_SEED = 2**63 - 1
MOST_CLIENTS = 10**8
MOST_SECONDS = 3e8
MOST_THREADS = 1024
MOST_WORKERS = 10_000


Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


@dataclass(frozen=True)
class Run:
    """[run]: how long, and from which seed."""

    name: Annotated[
        str,
        Field(description="what the run's folder is called; a file's own name, if any"),
    ] = "quickstart"
    rounds: Annotated[int, Field(ge=1, le=MOST, description="rounds of training")] = 20
    seed: Annotated[
        Seed, Field(description="the seed that every random number comes from")
    ] = 0
    timeout: Annotated[
        float,
        Field(
            ge=0,
            le=MOST_SECONDS,
            description="seconds to wait for a round's replies; 0 has no limit",
        ),
    ] = 0.0
    evaluate_every: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="rounds from one server evaluation to the next",
        ),
    ] = 1

    checkpoint_rounds: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="rounds from one checkpoint to the next; 0 does not count them",
        ),
    ] = 0
    checkpoint_minutes: Annotated[
        float,
        Field(
            ge=0,
            le=MOST_SECONDS / 60,
            description="minutes from one checkpoint to the next; 0 does not time them",
        ),
    ] = 10.0
    stop_after: Annotated[
        int,
        Field(
            ge=0,
            le=MOST,
            description="rounds without improvement that end the run; 0 never ends it",
        ),
    ] = 0
    stop_metric: Annotated[
        str, Field(description="what must improve, as the clients measure it")
    ] = "evaluate-loss"
    stop_delta: Annotated[
        float,
        Field(
            ge=0, description="what is better by no more than this is no improvement"
        ),
    ] = 0.0
    keep_best: Annotated[
        str,
        Field(
            description="keep the model that is best by this on the clients' held-out "
            "data, too; empty: only the last"
        ),
    ] = ""
    metrics: Annotated[
        Sequence[str],
        BeforeValidator(names_of),
        Field(
            description="what is measured besides loss and accuracy, as macro-f1 or "
            "auc; empty: what is usual for the task"
        ),
    ] = field(default_factory=list)
    keep_clients: Annotated[
        bool,
        Field(
            description="write at the end what clients keep: personal models, and what "
            "objectives carry"
        ),
    ] = True


@dataclass(frozen=True)
class Data:
    """[data]: the data set, and what of it is kept aside."""

    name: Annotated[str, Field(description="a data set, or 'module:function'")] = (
        "digits"
    )
    path: Annotated[
        str, Field(description="the folder or file that holds it, where it needs one")
    ] = ""
    held_out: Annotated[
        float,
        Field(ge=0, lt=1, description="share of a client's data it keeps to evaluate"),
    ] = 0.2
    proxy: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the training data the server keeps as a proxy set",
        ),
    ] = 0.02
    validation: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the training data the server keeps to choose by, as "
            "the sweep of a comparison does",
        ),
    ] = 0.0


@dataclass(frozen=True)
class Partition:
    """[partition]: who has which examples."""

    name: Annotated[
        str, Field(description="how the data are split, or 'module:function'")
    ] = "dirichlet"
    clients: Annotated[
        int,
        Field(
            ge=0,
            le=MOST_CLIENTS,
            description="how many clients there are; 0 is all natural ones",
        ),
    ] = 20
    leave_out: Annotated[
        Sequence[Annotated[int, Field(ge=0)]],
        Field(description="numbers of simulated clients that have no examples"),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class Bias:
    """[bias]: labels that are wrong on purpose, at some clients or in some groups."""

    attribute: Annotated[
        str,
        Field(
            description="the sensitive attribute by which labels are flipped; empty: "
            "all alike, by one rate"
        ),
    ] = ""
    flip_rates: Annotated[
        Sequence[Annotated[float, Field(ge=0, le=1)]],
        Field(
            description="share of the clients' labels that is flipped, one a group in "
            "the order of their names; the test set keeps its true labels"
        ),
    ] = field(default_factory=list)
    strength: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="how much clients differ: from 0, all flip alike, to 1, from "
            "none at one client to twice the rates at another",
        ),
    ] = 0.0


@dataclass(frozen=True)
class EvaluatedGroups:
    """[groups]: by which sensitive attributes is measured."""

    attributes: Annotated[
        Sequence[str],
        BeforeValidator(names_of),
        Field(
            description="sensitive attributes whose groups are measured (groups.csv); "
            "none: those that data.sensitive names, if it is there"
        ),
    ] = field(default_factory=list)
    intersections: Annotated[
        bool,
        Field(description="whether the groups of each two attributes are crossed"),
    ] = False
    min_size: Annotated[
        int,
        Field(
            ge=1,
            le=MOST,
            description="examples of a group that a client must have to tell of it",
        ),
    ] = 1
    positive: Annotated[
        str | int,
        Field(
            description="the class, by name or number, whose selection rate, true and "
            "false positive rate are measured; empty: class 1 of two"
        ),
    ] = ""


@dataclass(frozen=True)
class Model:
    """[model]: what is trained."""

    name: Annotated[str, Field(description="a model, or 'module:function'")] = "mlp"
    adapters: Annotated[
        str,
        Field(
            description="what is trained beside a frozen model: lora, or "
            "'module:function'; 'none' trains the model itself"
        ),
    ] = "none"
    weights: Annotated[
        str,
        Field(
            description="a safetensors file with the weights that the model begins "
            "with; empty: random ones"
        ),
    ] = ""


@dataclass(frozen=True)
class LocalObjective:
    """[objective]: what clients minimise."""

    name: Annotated[
        str, Field(description="what clients minimise, or 'module:Class'")
    ] = "plain"


@dataclass(frozen=True)
class PersonalModels:
    """[personal]: what clients train for themselves, and keep."""

    name: Annotated[
        str, Field(description="what personal models minimise, or 'module:Class'")
    ] = "none"


@dataclass(frozen=True)
class ServerStrategy:
    """[strategy]: how much each client counts."""

    name: Annotated[
        str, Field(description="how clients are weighed, or 'module:Class'")
    ] = "fedavg"


@dataclass(frozen=True)
class Server:
    """[server]: what the server does with the aggregated update."""

    name: Annotated[
        str, Field(description="the server's optimiser: none, momentum or adam")
    ] = "none"


@dataclass(frozen=True)
class Timing:
    """[schedule]: when the server makes the next model."""

    name: Annotated[
        str,
        Field(
            description="when the next model is made: synchronous, deadline or "
            "buffered, or 'module:Class'"
        ),
    ] = "synchronous"


@dataclass(frozen=True)
class Wire:
    """[codec]: how clients write what they have trained."""

    name: Annotated[
        str,
        Field(
            description="how trained models are sent: dense, bfloat16 or low-bits, or "
            "'module:Class'"
        ),
    ] = "dense"


@dataclass(frozen=True)
class Engine:
    """[engine]: where clients run, and how."""

    name: Annotated[
        Literal["auto", "local", "ray"], Field(description="where clients run")
    ] = "auto"
    workers: Annotated[
        int,
        Field(
            ge=0,
            le=MOST_WORKERS,
            description="Ray workers; 0 is one for each core or GPU share",
        ),
    ] = 0
    gpus_per_worker: Annotated[
        float, Field(ge=0, description="share of a GPU for each Ray worker")
    ] = 0.0
    address: Annotated[str, Field(description="a running Ray cluster to join")] = ""
    threads: Annotated[
        int,
        Field(
            ge=0,
            le=MOST_THREADS,
            description="clients at once in the local engine; 0 decides",
        ),
    ] = 0
    plan: Annotated[
        str,
        Field(description="how clients train: auto, loop or batched-N (N at once)"),
    ] = "auto"
    device: Annotated[str, Field(description="auto, cpu, cuda or cuda:N")] = "auto"
    precision: Annotated[
        Precision,
        Field(
            description="how models are computed: fp32; tf32, coarser on a GPU; "
            "bf16, autocast to bfloat16. Weights and sums are float32"
        ),
    ] = "fp32"
    trace: Annotated[
        bool,
        Field(
            description="whether the step of many clients at once is traced; without, "
            "it is slower and stands on PyTorch's public functions alone"
        ),
    ] = True


def _table(cls: type, **defaults: Any) -> dict[str, Option]:
    """Return the keys of a table, some with another default than the class has."""
    return {
        kebab(name): replace(option, default=defaults.get(name, option.default))
        for name, option in options_of(cls).items()
    }


def _run() -> dict[str, Option]:
    """Return the keys of [run], where a decision rests on one of what is measured."""
    table = _table(Run)
    for key, also in (("stop-metric", keys.TRAIN_LOSS), ("keep-best", "")):
        one_of: Any = Literal.__getitem__((*DECISIVE, also))
        annotation = Annotated[one_of, Field(description=table[key].meaning)]
        table[key] = replace(table[key], annotation=annotation)
    return table


def _training(**defaults: Any) -> dict[str, Option]:
    """Return the keys of [training], where what is picked is a name."""
    table = _table(TrainingSettings, **defaults)
    for key in ("optimizer", "learning-rate-schedule"):
        named = Annotated[str, Field(description=table[key].meaning)]
        table[key] = replace(table[key], annotation=named)
    return table


SCHEMA: dict[str, dict[str, Option]] = {
    "run": _run(),
    "data": _table(Data),
    "partition": _table(Partition),
    "bias": _table(Bias),
    "groups": _table(EvaluatedGroups),
    "model": _table(Model),
    "objective": _table(LocalObjective),
    "personal": _table(PersonalModels),
    # The quick start learns fast: more than an app that is told nothing does.
    "training": _training(epochs=10, batch_size=16, momentum=0.9),
    "strategy": _table(ServerStrategy),
    "server": _table(Server),
    "schedule": _table(Timing),
    "codec": _table(Wire),
    "engine": _table(Engine),
}

# The table that only a comparison reads; all others are of every one of its runs.
COMPARE = "compare"

# Seeds that a file may have beside the run's, so that two runs differ in one thing
# only. Absent they are the run's. What is picked may have an option of this name: then
# the key is that option.
SEEDS: dict[str, Option] = {
    "partition": Option(
        0, Annotated[Seed, Field(description="seed of who has which examples")]
    ),
    "model": Option(
        0, Annotated[Seed, Field(description="seed of the initial weights")]
    ),
}


@dataclass(frozen=True)
class Pick:
    """What a table's ``name`` picks, and how the library calls it.

    Attributes
    ----------
    registry : Registry
        The names, beside ``"module:attribute"``.
    call : str
        How it is called, as a message says it.
    positional : int
        How many arguments the library gives by position, whatever they are called.
    given : frozenset[str]
        Those that the library gives by name, and a file may not.
    """

    registry: Registry
    call: str
    positional: int = 0
    given: frozenset[str] = frozenset()


PICKS: dict[str, Pick] = {
    "data": Pick(DATA_SETS, "function(**options)", given=frozenset({"path", "seed"})),
    "partition": Pick(PARTITIONS, "function(dataset, num_clients, rng, **options)", 3),
    "model": Pick(MODELS, "function(input_shape, num_classes, **options)", 2),
    "objective": Pick(OBJECTIVES, "Class(**options)"),
    "personal": Pick(PERSONAL, "Class(**options)"),
    "strategy": Pick(
        STRATEGIES,
        "Class(**options)",
        given=frozenset(
            {
                *("arrayrecord_key", "configrecord_key", "weighted_by_key"),
                *("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"),
                *("buffers", "frozen", "device", "model", "num_classes", "proxy"),
                *("seed", "server_optimizer", "statistics", "threads", "codec"),
            }
        ),
    ),
    "server": Pick(SERVER_OPTIMIZERS, "Class(**options)"),
    "schedule": Pick(SCHEDULES, "Class(**options)"),
    "codec": Pick(CODECS, "Class(**options)"),
}

# What other keys of a table than its name pick, by table and key.
FURTHER_PICKS: dict[str, dict[str, Pick]] = {
    "model": {"adapters": Pick(ADAPTERS, "function(model, **options)", 1)},
    "training": {
        "optimizer": Pick(
            OPTIMIZERS, "Class(params, lr, weight_decay, **options)", given=FILLED_IN
        ),
        "learning-rate-schedule": Pick(RATE_SCHEDULES, "Class(**options)"),
    },
}


def picks_of(table: str) -> dict[str, Pick]:
    """Return what the keys of a table pick, by key."""
    named = {"name": PICKS[table]} if table in PICKS else {}
    return named | FURTHER_PICKS.get(table, {})


def options_in_file(
    table: str, name: str, where: str = "", key: str = "name"
) -> dict[str, Option]:
    """Return the options of what a table's key picks, those of the library left out.

    :data:`~fedweight.core.options.ANY` is among them where it takes any. ``where`` is
    what a message calls the table.
    """
    pick = picks_of(table)[key]
    try:
        chosen = pick.registry.resolve(name)
    except ConfigurationError as error:
        if key == "name":
            raise
        raise ConfigurationError(f"{where or table}.{key}: {error}") from None
    what = f"{where or table}.{key} '{name}'"
    check_callable(what, chosen, pick.call, pick.positional)
    options = options_of(chosen)
    library = {*list(options)[: pick.positional], *pick.given}
    if key != "name":  # A key of the table's own, as momentum, is that one.
        library |= {own.replace("-", "_") for own in SCHEMA[table]}
    return {
        name: o.in_file
        for name, o in options.items()
        if name not in library and not o.given
    }


def seed_rule(table: str, name: str) -> dict[str, Option]:
    """Return the rule of a table's own seed, unless its choice has such an option."""
    if table not in SEEDS or {"seed", ANY} & set(options_in_file(table, name)):
        return {}
    return {"seed": SEEDS[table]}
