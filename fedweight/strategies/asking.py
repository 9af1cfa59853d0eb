"""The first half of a round: who is asked for what, and starts from which model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from ..clients.registries import QUERIES
from ..core.errors import ConfigurationError
from ..core.layout import FlatModel
from ..core.records import RoundRecord
from ..core.rng import Purpose, generator
from ..core.texts import shown
from ..messages import keys
from ..messages import shared as told_to_all
from ..messages.arrays import FlatRecord, flatten, layout_of
from ..messages.codecs import DENSE, num_bytes
from ..messages.dispatch import Cohort
from ..messages.grids import is_complete, name_of, number_of, sizes_of, sums_models
from ..messages.shared import Long, shared_record
from ..server.phase import Population, label_totals
from ..server.sampling import (
    Drawing,
    count,
    known_empty,
    nodes_of,
    nodes_there,
    numbered,
    sample,
    straggler_epochs,
)
from ..server.timetable import Moment, Timetable
from .checks import (
    as_draw,
    asked_names,
    assigned,
    check_heard,
    mask_of,
    masked_model,
    told_apart,
)
from .exploring import explore
from .now import Asked, GlobalModel, Now
from .round import Selection

if TYPE_CHECKING:
    from .base import WeightingStrategy

_NOTHING: Mapping[str, Long] = {}


def train_messages(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
) -> Cohort:
    """Choose the round's clients and write them their messages."""
    layout = now.model.layout if now.model else None
    if layout is None or len(arrays) != len(layout.entries):
        layout = layout_of(arrays, strategy.buffers, strategy.frozen)
    now.model = flatten(arrays, layout)
    # It counts as failed until it is aggregated: a wrapper may never get there.
    unfinished = RoundRecord(round, "failed", "its replies did not arrive")
    if now.forgets:
        now.history.clear()
    now.name_of = name_of(grid)
    if not now.prepared:
        if strategy.overrides("prepare") or strategy.class_totals:
            _prepare(strategy, now, grid, config)
        now.prepared = True
    now.model = masked_model(strategy, now.model, now.method)
    now.history.append(unfinished)
    config[keys.ROUND] = round
    if now.class_totals:
        config[keys.CLASS_TOTALS] = now.class_totals
    chosen = _chosen(strategy, now, round, config, grid)
    clients = tuple(client for client, _, _ in chosen)
    selection = Selection(round, clients, now.method, now.population)
    which = _which_model(strategy, now, selection)
    told_to = told_apart(strategy, selection, now.model)
    for key, value in told_to.plain.items():
        config[key] = value
    if now.outermost:  # A wrapper might tell something, too.
        check_heard(strategy, [*config, *told_to.columns, *told_to.long])
    plain = [now.class_totals, *told_to.plain.values()]
    shared = _shared(strategy, now, {**now.pooled, **told_to.long}, plain)
    wanted = now.unpooled(strategy.pools, round)
    asks = [(*own, *wanted) for own in asked_names(strategy, selection)]
    arrivals = {arrival.client: arrival for arrival in now.arrivals or ()}
    own = {}
    # Clients that are told the same share one record.
    records: dict[tuple[tuple[str, Any], ...], ConfigRecord] = {}
    told_all = dict(config)
    now.asked = {}
    for k, (client, node, part) in enumerate(chosen):
        arrival = arrivals.get(client)
        told: dict[str, Any] = {}
        for name, column in told_to.columns.items():
            if column[k] is not None:
                told[name] = column[k]
        size = told_to_all.num_bytes(told.values()) if told else 0
        now.asked[node] = Asked(
            client, part is not None, asks[k], which[k], arrival, size
        )
        if part is not None:
            told[keys.LOCAL_EPOCHS] = part
        if arrival is not None and arrival.round != round:
            told[keys.ROUND] = arrival.round
        if asks[k]:
            told[keys.REQUEST] = asks[k]
        if told:
            same = tuple(told.items())
            if same not in records:
                told |= _request(config, asks[k])
                records[same] = ConfigRecord({**told_all, **told})
            own[node] = records[same]
    several = bool(arrivals or now.models)
    now.sent = {a.client: a for a in now.asked.values()} if several else {}
    starts = _starts(now) if several else {}
    sums = (
        not starts
        and now.outermost
        and strategy.weighs_by_size
        and strategy.weighted_by_key == keys.NUM_EXAMPLES  # always there, and finite
        and strategy.accumulate is None
        and strategy.max_share == 1
        and not strategy.factors
        and strategy.max_update_norm is None
        and sums_models(grid)
    )
    # As vectors, so that clients of ours answer in this layout.
    content = RecordDict(
        {
            strategy.arrayrecord_key: _flat(arrays, now.model),
            strategy.configrecord_key: config,
            **shared,
        }
    )
    now.cohort = Cohort(
        content,
        list(now.asked),
        MessageType.TRAIN,
        own,
        strategy.configrecord_key,
        starts=starts,
        summed_by=strategy.weighted_by_key if sums else None,
        left_out=[
            node
            for node, asked in now.asked.items()
            if sums and not strategy.keeps(round, asked.client, asked.straggler)
        ],
    )
    return now.cohort


def _prepare(
    strategy: WeightingStrategy, now: Now, grid: Grid, config: ConfigRecord
) -> None:
    """Let the method ask clients before the first round; record who did not answer."""
    nodes_there(grid, max(strategy.min_available_nodes, strategy.min_train_nodes))
    population = Population(
        grid,
        strategy.seed,
        {*QUERIES.entries, *strategy.queries},
        partial(explore, strategy, now, grid, config),
    )
    try:
        if strategy.class_totals:  # First: who explores wants them, too.
            now.class_totals = label_totals(population)
            config[keys.CLASS_TOTALS] = now.class_totals
        if strategy.overrides("prepare"):
            now.method = strategy.prepare(population)
    finally:
        if population.record.clients:
            now.history.append(population.record)


def _shared(
    strategy: WeightingStrategy,
    now: Now,
    long: Mapping[str, Long],
    plain: Iterable[Any],
) -> dict[str, ConfigRecord]:
    """Return what all clients are told that is long, as a record of a message.

    What every client is sent in all, with what is ``plain``, and sends back, is noted.
    """
    assert now.model is not None
    mask = mask_of(strategy, now.method, now.model.parameters)
    if mask is not None:
        long = {**long, keys.MASK: mask}
    layout = now.model.layout
    now.bytes_down = num_bytes(DENSE, layout, mask)
    now.bytes_down += told_to_all.num_bytes([*long.values(), *plain])
    now.bytes_up = num_bytes(strategy.codec, layout, mask)
    return {keys.SHARED: shared_record(long, layout)} if long else {}


def evaluate_messages(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
) -> Cohort | list[Any]:
    """Choose who evaluates the global model, and write them their messages."""
    now.asked, now.not_asked = {}, {}
    if strategy.fraction_evaluate == 0:
        return []
    now.name_of = name_of(grid)
    nodes = drawn(
        strategy,
        now,
        grid,
        strategy.fraction_evaluate,
        strategy.min_evaluate_nodes,
        Purpose.EVALUATION,
        round,
    )
    config[keys.ROUND] = round
    empty = known_empty(grid, [client for client, _ in nodes], now.without_examples)
    nodes = [(client, node) for client, node in nodes if client not in empty]
    return _evaluation(strategy, now, round, nodes, arrays, config)


def last_messages(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    arrays: ArrayRecord,
    config: ConfigRecord,
    grid: Grid,
) -> Cohort:
    """Write all clients what they are sent after the rounds."""
    now.name_of = name_of(grid)
    now.population = count(grid, now.without_examples)
    if now.class_totals:
        config[keys.CLASS_TOTALS] = now.class_totals
    nodes = [*numbered(grid).items()]
    told = now.pooled, [now.class_totals]
    return _evaluation(strategy, now, round, nodes, arrays, config, *told)


def _evaluation(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    nodes: Sequence[tuple[int, int]],
    arrays: ArrayRecord,
    config: ConfigRecord,
    long: Mapping[str, Long] = _NOTHING,
    plain: Iterable[Any] = (),
) -> Cohort:
    """Write some clients that they are to evaluate, each its global model.

    ``long`` and ``plain`` are what they are told besides.
    """
    clients = tuple(client for client, _ in nodes)
    selection = Selection(round, clients, now.method, now.population)
    which = _which_model(strategy, now, selection)
    now.asked = {
        node: Asked(client, False, (), own)
        for (client, node), own in zip(nodes, which, strict=True)
    }
    if now.model is None:  # All rounds are over, of which this process saw none.
        layout = layout_of(arrays, strategy.buffers, strategy.frozen)
        now.model = flatten(arrays, layout)
    if strategy.overrides("mask"):
        model = flatten(arrays, now.model.layout)
        arrays = _flat(arrays, masked_model(strategy, model, now.method))
    content = RecordDict(
        {
            strategy.arrayrecord_key: arrays,
            strategy.configrecord_key: config,
            **_shared(strategy, now, long, plain),
        }
    )
    now.cohort = Cohort(
        content,
        list(now.asked),
        MessageType.EVALUATE,
        config_key=strategy.configrecord_key,
        starts=_starts(now),
        num_bytes=now.bytes_down,
    )
    return now.cohort


def drawn(
    strategy: WeightingStrategy,
    now: Now,
    grid: Grid,
    fraction: float,
    least: int,
    purpose: Purpose,
    round: int,
    drawing: Drawing | None = None,
) -> list[tuple[int, int]]:
    """Draw ``(client, node)`` pairs, in the order of the clients' numbers."""
    pairs, now.population = sample(
        grid,
        partial(generator, strategy.seed, purpose, round),
        fraction,
        least,
        strategy.min_available_nodes,
        now.without_examples,
        drawing,
    )
    return pairs


def _drawing(strategy: WeightingStrategy, now: Now, round: int) -> Drawing | None:
    """Return what asks the method who is drawn, if it has a say."""
    if not strategy.overrides("draw"):
        return None
    return lambda clients, population: as_draw(
        strategy, Selection(round, clients, now.method, population)
    )


def _chosen(
    strategy: WeightingStrategy,
    now: Now,
    round: int,
    config: ConfigRecord,
    grid: Grid,
) -> list[tuple[int, int, int | None]]:
    """Return who trains: client, node, and the epochs of a straggler."""
    timetable = _timetable(now, round, config, grid)
    if timetable is None or timetable.arrivals is None:
        nodes = drawn(
            strategy,
            now,
            grid,
            strategy.fraction_train,
            strategy.min_train_nodes,
            Purpose.SAMPLING,
            round,
            _drawing(strategy, now, round),
        )
    else:
        nodes = nodes_of(grid, [arrival.client for arrival in timetable.arrivals])
        now.population = count(grid, now.without_examples)
    epochs = straggler_epochs(
        strategy.seed, round, strategy.stragglers, len(nodes), config
    )
    clients = [client for client, _ in nodes]
    empty = known_empty(grid, clients, now.without_examples)
    now.leave_out(empty)
    now.not_asked = dict.fromkeys(
        [client for client in clients if client in empty], keys.NO_EXAMPLES
    )
    if now.clock is not None:
        whole = _epochs(config)
        passes = {
            client: whole if part is None else part
            for client, part in zip(clients, epochs, strict=True)
            if client not in empty
        }
        now.not_asked |= now.clock.late(passes)
        now.history[-1].metrics["round-seconds"] = now.clock.seconds(passes)
    return [
        (client, node, part)
        for (client, node), part in zip(nodes, epochs, strict=True)
        if client not in now.not_asked
    ]


def _timetable(
    now: Now, round: int, config: ConfigRecord, grid: Grid
) -> Timetable | None:
    """Ask the loop's schedule, if there is one."""
    if now.clock is None:
        return None
    if not is_complete(grid):
        raise ConfigurationError(
            f"schedule: {now.clock.name} needs simulated clients; "
            "real ones are waited for. Leave it out."
        )
    assert now.model is not None
    nodes = grid.get_node_ids()
    if not isinstance(nodes, range):  # A simulation's is not written out.
        nodes = list(nodes)
        clients = sorted(map(number_of(grid), nodes))
        if clients != [*range(len(clients))]:
            raise ConfigurationError(
                f"schedule: {now.clock.name} needs clients that are "
                f"numbered from 0 on, got {shown(clients)}. Leave it out."
            )

    def known_sizes(clients: Sequence[int]) -> Sequence[int] | None:
        """Return how many examples some clients have, with what they said."""
        sizes = sizes_of(grid, clients)
        said = now.without_examples
        if sizes is not None or said.isdisjoint(clients):
            return sizes
        return [int(client not in said) for client in clients]

    moment = Moment(round, now.model, _epochs(config), len(nodes), known_sizes)
    return now.clock.next(moment)


def _epochs(config: ConfigRecord) -> int:
    """Return how many passes over their data clients are told to make."""
    told: Any = config.get(keys.LOCAL_EPOCHS, 1)
    return int(told)


def _which_model(
    strategy: WeightingStrategy, now: Now, selection: Selection
) -> list[int]:
    """Return which global model each client starts from; make those that are new."""
    given = assigned(strategy, selection)
    which = [0] * len(selection.clients) if given is None else given
    if given is None or not (now.models or now.outermost or any(which)):
        return which
    if not now.outermost:
        raise ConfigurationError(
            f"{type(strategy).__name__} keeps several global models, of which what "
            "runs it sees only the mean. Start it itself, and not inside another "
            "strategy."
        )
    if now.arrivals is not None:
        raise ConfigurationError(
            f"{type(strategy).__name__} keeps several global models, which a buffered "
            "schedule does not know. Choose another schedule."
        )
    model = now.model
    assert model is not None
    if now.first is None:
        now.first = GlobalModel(model.parameters, model.buffers, model.integers, 0.0)
    missing = max(which, default=0) + 1 - len(now.models)
    now.models = [*now.models, *[now.first] * missing]
    return which


def _starts(now: Now) -> dict[int, FlatRecord]:
    """Return, by node, the model of each client that is not sent the shared one."""
    models: dict[int, FlatModel] = {}
    if now.models:
        several = [now.global_model(which) for which in range(len(now.models))]
        models = {node: several[asked.which] for node, asked in now.asked.items()}
    for node, asked in now.asked.items():
        if asked.arrival is not None and asked.arrival.start is not now.model:
            models[node] = asked.arrival.start
    records = {id(model): FlatRecord(model) for model in models.values()}
    return {node: records[id(model)] for node, model in models.items()}


def _flat(arrays: ArrayRecord, model: FlatModel) -> ArrayRecord:
    """Return arrays as a record that says how they are laid out."""
    known = isinstance(arrays, FlatRecord) and arrays.flat is model
    return arrays if known else FlatRecord(model)


def _request(config: ConfigRecord, asks: Collection[str]) -> dict[str, list[str]]:
    """Return the config's own request, if it has one, with the method's added."""
    if not asks:
        return {}
    already = config.get(keys.REQUEST)
    names = [str(n) for n in already] if isinstance(already, list) else []
    return {keys.REQUEST: [*names, *(n for n in asks if n not in names)]}
