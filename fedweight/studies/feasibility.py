"""What is refused, or told, before a run writes anything: all that could fail later."""

from __future__ import annotations

import logging

import torch
from flwr.serverapp.strategy import FedAvg, Strategy

from ..clients import TrainingApp
from ..clients.objectives import Proximal
from ..clients.objectives.base import defines
from ..clients.personal_models import own_layers
from ..clients.probes import REPORTED
from ..clients.registries import PROBES
from ..core.errors import ConfigurationError, closest
from ..core.layout import as_tensor
from ..core.texts import shown
from ..data.examples import channels_last
from ..data.groups import check_groups
from ..messages import keys
from ..server.schedules import Buffered, Clock, Schedule
from ..server.wrapped import with_inner
from ..simulations.engine import check_engine, check_local
from ..strategies import WeightingStrategy
from .columns import DECISIVE
from .components import Components, engine_arguments, has_our_loop, own_loop

log = logging.getLogger("fedweight")

# So many clients of a round fit into memory: their messages and replies.
MOST_ASKED = 10**7


def check_feasible(
    components: Components,
    strategy: Strategy,
    client_app: TrainingApp,
    *,
    simulated: bool = True,
) -> None:
    """Refuse, before anything is written, what could only fail later.

    Where the run is not ``simulated``, who takes part is not known before.
    """
    for one in with_inner(strategy):
        _check_task(components, one)
        _check_stragglers(components, one)
        _check_request(one, client_app)
        _check_proximal(one, client_app)
        _tell_of_terms(one, client_app)
        if simulated:
            _check_clients(components, one)
    _check_wants(components, strategy, client_app)
    _check_codec(components, strategy)
    _check_schedule(components, strategy, simulated=simulated)
    _check_decisions(components, strategy)
    _check_model(components)
    _check_personal(components)
    for trials in client_app.own_trials:
        trials.check(client_app.first_context)
    if simulated:
        check_local(**engine_arguments(components.configuration), table="engine")
        check_engine(components.engine())


def _check_task(components: Components, strategy: Strategy) -> None:
    """Refuse a strategy that needs classes, or a score, where there is none."""
    task, name = components.task, type(strategy).__name__
    if not task.has_classes and getattr(strategy, "of_classes", False):
        raise ConfigurationError(
            f"{name} needs examples that have a class, and those of data "
            f"'{components.data.name}' {task.instead} ({task.name}). Choose another "
            "strategy, such as 'fedavg'."
        )
    if not task.score and getattr(strategy, "of_scores", False):
        raise ConfigurationError(
            f"{name} goes by scores from 0 to 1, such as accuracies, and {task.name} "
            "has none. Choose another strategy, such as 'fedavg'."
        )


def _check_stragglers(components: Components, strategy: Strategy) -> None:
    """Refuse stragglers that have no time for a single epoch."""
    share = getattr(strategy, "stragglers", 0)
    epochs = components.configuration["training"]["epochs"]
    if share and epochs < 2:
        raise ConfigurationError(
            f"strategy.stragglers is {share:g}, which needs "
            f"training.epochs of 2 or more, got {epochs}: a straggler does fewer "
            "epochs than the others, but at least one."
        )


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


def _check_wants(
    components: Components, strategy: Strategy, client_app: TrainingApp
) -> None:
    """Refuse an objective that wants to know what nobody tells it."""
    chosen = client_app.objective
    measured = sorted({*PROBES.entries, *client_app.probes})
    for one in chosen.pools:
        if one not in measured:
            raise ConfigurationError(
                f"objective {type(chosen).__name__}: pools has {shown(one)}, which "
                f"clients do not measure.{closest(one, measured)} There are "
                f"{', '.join(measured)}."
            )
    tells = [getattr(one, "class_totals", False) for one in with_inner(strategy)]
    if "class-totals" in chosen.wants and not any(tells):
        name = components.configuration["objective"]["name"]
        raise ConfigurationError(
            f"objective '{name}' wants to know how many examples of each class all "
            f"clients have, which {type(strategy).__name__} does not tell them. Choose "
            "a strategy of fedweight's."
        )
    pools = [getattr(one, "pools", None) or {} for one in with_inner(strategy)]
    if not any(one.keys() >= chosen.pools.keys() for one in pools):
        name = components.configuration["objective"]["name"]
        raise ConfigurationError(
            f"objective '{name}' wants {', '.join(chosen.pools)} added up over the "
            f"clients, which {type(strategy).__name__} does not do. Choose a strategy "
            "of fedweight's."
        )
    # The loop tells the round itself, and the totals that the strategy is asked for.
    known = {*chosen.pools, keys.ROUND, keys.CLASS_TOTALS}
    untold = [one for one in chosen.hears if one not in known]
    if untold and not any(map(_may_tell, with_inner(strategy))):
        name = components.configuration["objective"]["name"]
        raise ConfigurationError(
            f"objective '{name}' hears '{untold[0]}' from the strategy, and "
            f"{type(strategy).__name__} tells clients nothing. Choose the strategy "
            "that it belongs to, or another objective."
        )
    if "groups" in chosen.wants and components.schema is None:
        by = [one for one in with_inner(strategy) if hasattr(one, "num_groups")]
        key = "strategy.group" if by else "objective.group"
        check_groups(key, components.data, chosen.group)


def _may_tell(strategy: Strategy) -> bool:
    """Tell whether clients may be told something by a strategy, whatever that is."""
    if isinstance(strategy, WeightingStrategy):
        return any(map(strategy.overrides, ("configure_train", "mask", "tell")))
    return type(strategy).configure_train is not FedAvg.configure_train


def _check_codec(components: Components, strategy: Strategy) -> None:
    """Refuse a codec that the server does not know of."""
    ours = any(isinstance(one, WeightingStrategy) for one in with_inner(strategy))
    if not ours and not components.codec().exact:
        raise ConfigurationError(
            f"codec.name is '{components.configuration['codec']['name']}', which "
            f"{type(strategy).__name__} cannot read. Choose a strategy of fedweight's, "
            "or 'dense'."
        )


def _check_clients(components: Components, strategy: Strategy) -> None:
    """Refuse a strategy that asks for more clients than there are, or than fit."""
    clients, schedule = components.data.num_clients, components.schedule()
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


def _tell_of_terms(strategy: Strategy, chosen: TrainingApp) -> None:
    """Say where a strategy's proximal term stands in for an objective's.

    And where a strategy asks for work by a normaliser that does not know the terms
    of an objective of one's own.
    """
    method, told = type(strategy).__name__, getattr(strategy, "proximal_mu", None)
    local = chosen.objective
    if isinstance(local, Proximal):
        if told is not None and told != local.mu:
            log.warning(
                "%s tells clients strategy.proximal-mu = %g, which takes the place "
                "of objective.mu = %g",
                method,
                told,
                local.mu,
            )
        while isinstance(local, Proximal):
            local = local.inner
    own_term = defines(local, "penalty_gradient")
    if own_term and keys.NORMALISER in getattr(strategy, "request", ()):
        log.warning(
            "%s divides updates by the gradients in them, and it does not know "
            "what the penalty_gradient of %s makes: where it is proximal, set "
            "strategy.proximal-mu instead",
            method,
            type(local).__name__,
        )


def _check_decisions(components: Components, strategy: Strategy) -> None:
    """Refuse to stop, or to choose a model, by what nobody will have measured."""
    table = components.configuration["run"]
    rests_on = {
        "run.stop-metric": table["stop-metric"] if table["stop-after"] else "",
        "run.keep-best": table["keep-best"],
    }
    off = {"run.stop-metric": "run.stop-after = 0", "run.keep-best": 'it to ""'}
    for key, metric in rests_on.items():
        why, instead = (
            _not_measured(components, strategy, metric) if metric else ("", "")
        )
        if why:
            advice = f"{instead}set {off[key]}"
            raise ConfigurationError(
                f"{key} is '{metric}', but {why}. {advice[0].upper()}{advice[1:]}."
            )


def _not_measured(
    components: Components, strategy: Strategy, metric: str
) -> tuple[str, str]:
    """Return why no round will have a metric, and what to do; empty if it will."""
    if not has_our_loop(strategy):
        return f"{own_loop(components.configuration)}, which ends when it wants", ""
    name, statistics = DECISIVE.get(metric, ""), components.statistics
    if name in components.task.offered and name not in statistics.measures:
        return f"run.metrics does not have '{name}'", "Add it there, or "
    if name and name not in statistics.measures:
        return f"{components.task.name} has no {name}", "Choose evaluate-loss, or "
    trains = metric.startswith("train-")
    share = "fraction_train" if trains else "fraction_evaluate"
    if any(getattr(one, share, 1.0) == 0 for one in with_inner(strategy)):
        key = f"strategy.{share.replace('_', '-')}"
        return f"{key} is 0: no client measures it", f"Raise {key}, or "
    if trains:
        return "", ""
    raise_it = "Raise data.held-out, or "
    held_out = components.configuration["data"]["held-out"]
    if held_out == 0:
        return "data.held-out is 0: clients keep nothing to evaluate", raise_it
    if components.schema is None and not components.data.holds_out:
        return (
            f"no client has so many examples that data.held-out = {held_out:g} leaves "
            "it one to evaluate",
            raise_it,
        )
    return "", ""


def _check_personal(components: Components) -> None:
    """Refuse personal models of layers that the model does not have."""
    personal = components.personal()
    if personal is not None and personal.layers:
        own_layers(components.make_model, personal)


def _check_model(components: Components) -> None:
    """Refuse a model that cannot take the data or gives no logits for them."""
    some = components.data.client(int(components.known_sizes.argmax())).train
    if not len(some):
        some = components.data.test
    x, y = as_tensor(some.x[:2]).clone(), some.y[:2]  # A model may change them.
    if not len(x):
        return
    name, data = components.configuration["model"]["name"], components.data.name
    module = components.make_model().eval()
    takes = f"[{', '.join(map(str, x.shape[1:]))}] of {x.dtype}"
    try:
        with torch.no_grad():
            shape = list(module(x).shape)
    except Exception as error:
        hint = ""
        if x.dtype == torch.int64:
            hint = ". Whole numbers are tokens; for features give floating ones"
        elif channels_last(components.data.input_shape):
            hint = ". Images are [n, c, h, w]: x.transpose(0, 3, 1, 2)"
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise ConfigurationError(
            f"model.name: '{name}' cannot take an example of data '{data}', "
            f"{takes}: {type(error).__name__}: {reason}{hint}."
        ) from None
    wanted = list(components.task.output_shape(components.data.num_classes, y.shape))
    if shape != wanted:
        raise ConfigurationError(
            f"model.name: '{name}' gives shape {shape} for {len(x)} examples of "
            f"data '{data}'; it must be {wanted}, {components.task.outputs}."
        )


def _check_schedule(
    components: Components, strategy: Strategy, *, simulated: bool
) -> None:
    """Refuse what does not go with a schedule that is not the synchronous one."""
    schedule = components.schedule()
    if schedule is None:
        return
    name = components.configuration["schedule"]["name"]
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
            f"{own_loop(components.configuration)}. Choose 'synchronous'."
        )
    with strategy.following(Clock(schedule)):  # It says what does not go.
        pass
    if schedule.chooses:
        _check_ignored(strategy, schedule, name)
    if not isinstance(schedule, Buffered):
        return
    clients = components.data.num_clients
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


def _check_ignored(strategy: WeightingStrategy, schedule: Schedule, name: str) -> None:
    """Refuse what a strategy says of who trains, where the schedule says it."""
    most, instead = 0, "the schedule says whose updates make a model"
    if isinstance(schedule, Buffered):
        most = schedule.buffer_size
        instead = (
            "schedule.concurrency says how many clients train at a time, and "
            "schedule.buffer-size how many make a model"
        )
    # Its default in Python asks for nothing.
    most = max(most, WeightingStrategy.min_train_nodes)
    ignored = {
        "stragglers": strategy.stragglers > 0,
        "fraction-train": strategy.fraction_train != 1,
        "min-train-nodes": strategy.min_train_nodes > most,
    }
    for key, told in ignored.items():
        if told:
            raise ConfigurationError(
                f"strategy.{key} does not go with schedule '{name}', where {instead}. "
                "Leave it out."
            )
