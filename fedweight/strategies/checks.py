"""What a method gives, looked at before it becomes the next global model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError, closest
from ..core.layout import FlatModel
from ..core.texts import clients_called, shown
from ..messages import keys
from ..messages.records import MOST_NUMBERS, as_measured, fits_config
from ..messages.shared import Long
from ..server.sampling import Draw
from .round import PerParameter, Round, Selection, Vector

if TYPE_CHECKING:
    from .base import WeightingStrategy

# A model with larger values is no model to start training from: a few layers multiply
# them beyond what float32 holds.
LARGEST_VALUE = 2.0**32

# So many global models may a method keep; each is as large as the model.
MOST_MODELS = 10_000


def check_weights(strategy: WeightingStrategy, round: Round) -> None:
    """Refuse weights that are not finite, all 0, or not one for each client."""
    name = type(strategy).__name__
    weights = round.logged_clients.get("weight")
    if weights is None:
        raise ConfigurationError(
            f"{name}.aggregate must record the weights it used: "
            'round.log("weight", weights), one for each client.'
        )
    values = weights.tolist()
    if len(values) != round.num_clients or not all(map(math.isfinite, values)):
        raise AggregationError(
            f"{name} gave weights {_shortened(weights)} for {round.num_clients} "
            "clients; they must be finite, one each"
        )
    if not any(values):
        raise AggregationError(f"{name} gave every client the weight 0")


def check_values(
    round: Round, parameters: Tensor, name_of: Callable[[int], str]
) -> None:
    """Refuse a model from which training cannot start."""
    largest = _largest(parameters)
    if not math.isfinite(largest):
        raise AggregationError(f"the aggregated model has {keys.NOT_FINITE}")
    if largest > LARGEST_VALUE and largest > _largest(round.model.parameters):
        raise AggregationError(
            f"the aggregated model has values of up to {largest:.3g}, from which "
            f"training cannot start (at most {LARGEST_VALUE:.3g})"
            f"{_longest(round, name_of)}"
        )


def _longest(round: Round, name_of: Callable[[int], str]) -> str:
    """Say whose update is the longest, where the updates are at hand."""
    try:
        norms = round.updates.norms()
    except AggregationError:  # They were added up as they came.
        return ""
    k = int(norms.argmax())
    whose = clients_called([round.clients[k]], name_of)
    return (
        f"; {whose} has the longest update, of norm {float(norms[k]):.3g} where "
        f"the median is {float(norms.median()):.3g}"
    )


def _largest(values: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one, 0 if there is none."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _shortened(values: Tensor, most: int = 5) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values.tolist()[:most])
    return f"[{shown}, ...]" if len(values) > most else f"[{shown}]"


def as_parameters(strategy: WeightingStrategy, made: Any, round: Round) -> Tensor:
    """Return what ``aggregate(round)`` gave, if it is a vector of parameters."""
    shape = list(round.model.parameters.shape)
    if isinstance(made, Tensor) and made.is_floating_point():
        if list(made.shape) == shape:
            return made
        got = f"shape {list(made.shape)}"
    else:
        got = str(made.dtype) if isinstance(made, Tensor) else type(made).__name__
    raise ConfigurationError(
        f"{type(strategy).__name__}.aggregate must return the next global parameters, "
        f"a floating tensor of shape {shape}, got {got}."
    )


def as_weights(strategy: WeightingStrategy, weights: Any, round: Round) -> Tensor:
    """Return what ``weights(round)`` gave as a tensor, if it is one weight each."""
    try:
        tensor = torch.as_tensor(weights)
        if tensor.is_complex():
            raise TypeError("complex numbers are no weights")
        tensor = tensor.double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(strategy).__name__}.weights must return numbers, got "
            f"{type(weights).__name__}: {error}."
        ) from None
    clients, tensors = round.num_clients, round.updates.num_tensors
    if tensor.shape not in ((clients,), (clients, tensors)):
        raise ConfigurationError(
            f"{type(strategy).__name__}.weights must return one weight for each of "
            f"the {clients} clients, shape [{clients}] (or [{clients}, {tensors}], one "
            f"for each named tensor), got shape {list(tensor.shape)}."
        )
    return tensor


class ToldApart(NamedTuple):
    """What ``tell`` gives.

    Attributes
    ----------
    plain : dict
        By name a number or a text for all.
    columns : dict
        By name a value for each client.
    long : dict
        By name several numbers for all.
    """

    plain: dict[str, Any]
    columns: dict[str, Sequence[Any]]
    long: dict[str, Long]


def told_apart(
    strategy: WeightingStrategy, selection: Selection, model: FlatModel
) -> ToldApart:
    """Return what ``tell`` gives, by how it travels; refuse what fits no message."""
    whose = f"{type(strategy).__name__}.tell"
    told_to = ToldApart({}, {}, {})
    for name, told in _by_name(strategy, "tell", strategy.tell(selection)):
        if name in keys.OF_THE_SERVER:
            raise ConfigurationError(
                f"{whose} gave '{name}', which the server tells clients itself. Choose "
                "another name."
            )
        if isinstance(told, Vector | PerParameter):
            told_to.long[name] = checked_long(whose, name, told, model)
            continue
        told = _scalar(told)
        if not isinstance(told, Iterable) or isinstance(told, str | bytes):
            several = [told]
            told_to.plain[name] = told
        else:
            column = _column(strategy, "tell", name, told, selection)
            several = [one for one in column if one is not None]
            told_to.columns[name] = column
        for one in several:
            if not fits_config(one):
                raise ConfigurationError(
                    f"{whose} gave {shown(one)} for '{name}'. Give a number of at most "
                    "64 bits or a text, one for all or a list of one for each client."
                )
    return told_to


def check_heard(strategy: WeightingStrategy, told: Collection[str]) -> None:
    """Refuse a round in which clients are not told what their objective hears."""
    for name in strategy.hears:
        if name not in told and not (name == keys.MASK and strategy.overrides("mask")):
            raise ConfigurationError(
                f"{type(strategy).__name__}.tell gives no '{name}', which the clients' "
                f"objective hears.{closest(name, told)} Choose the strategy that the "
                "objective belongs to, or another objective."
            )


def checked_long(
    whose: str, name: str, told: Vector | PerParameter, model: FlatModel
) -> Long:
    """Return several numbers for all clients as a record carries them."""
    if isinstance(told, Vector):
        found = as_measured(told.values)
        if not isinstance(found, list) or not found or not np.isfinite(found).all():
            raise ConfigurationError(
                f"{whose} gave {shown(told)} for '{name}'. Give a Vector of 1 to "
                f"{MOST_NUMBERS:,} finite numbers."
            )
        return [float(value) for value in found]
    values: Any = told.values
    if isinstance(values, Tensor) and values.shape == model.parameters.shape:
        if values.dtype == torch.bool:
            return values
        if values.is_floating_point():
            return values.to(model.layout.dtype)
    raise ConfigurationError(
        f"{whose} gave {shown(values)} for '{name}'. Give a PerParameter of a floating "
        f"or bool tensor of shape [{model.parameters.numel()}]."
    )


def mask_of(
    strategy: WeightingStrategy, state: Any, parameters: Tensor
) -> Tensor | None:
    """Return what ``mask`` gives, if it says of each of the parameters yes or no."""
    given: Any = strategy.mask(state)
    if given is None:
        return None
    mask = given if isinstance(given, Tensor) else None
    if mask is None or mask.shape != parameters.shape or mask.dtype != torch.bool:
        raise ConfigurationError(
            f"{type(strategy).__name__}.mask must return a bool tensor of shape "
            f"[{parameters.numel()}], or None, got {shown(given)}."
        )
    return mask


def masked(strategy: WeightingStrategy, parameters: Tensor, state: Any) -> Tensor:
    """Return parameters, 0 where the method's mask says that there are none."""
    mask = mask_of(strategy, state, parameters)
    return parameters if mask is None else parameters * mask


def masked_model(
    strategy: WeightingStrategy, model: FlatModel, state: Any
) -> FlatModel:
    """Return a global model that is 0 where the method's mask says so."""
    given = masked(strategy, model.parameters, state)
    same = given is model.parameters or torch.equal(given, model.parameters)
    return model if same else model.with_parameters(given)


def asked_names(
    strategy: WeightingStrategy, selection: Selection
) -> list[tuple[str, ...]]:
    """Return what ``ask`` gives as the names that each client is asked for."""
    columns = {}
    for name, asked in _by_name(strategy, "ask", strategy.ask(selection)):
        asked = _scalar(asked)
        if isinstance(asked, bool):
            columns[name] = [asked] * len(selection.clients)
            continue
        columns[name] = _column(strategy, "ask", name, asked, selection)
        odd = [one for one in columns[name] if not _is_yes_or_no(one)]
        if odd:
            raise ConfigurationError(
                f"{type(strategy).__name__}.ask gave {shown(odd[0])} for '{name}'. "
                "Give True or False, one for all or a list of one for each client."
            )
    if not columns:
        return [()] * len(selection.clients)
    return [
        tuple(name for name, column in columns.items() if column[k])
        for k in range(len(selection.clients))
    ]


def _is_yes_or_no(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _by_name(
    strategy: WeightingStrategy, hook: str, given: Any
) -> Iterable[tuple[str, Any]]:
    """Return the items of what ``tell`` or ``ask`` gives, if it is a dictionary."""
    if not isinstance(given, Mapping) or not all(isinstance(n, str) for n in given):
        raise ConfigurationError(
            f"{type(strategy).__name__}.{hook} must return a dictionary by names, "
            f"which are texts, got {shown(given)}."
        )
    return given.items()


def assigned(strategy: WeightingStrategy, selection: Selection) -> list[int] | None:
    """Return what ``assign`` gives, if it is a model's number for each client."""
    given = strategy.assign(selection)
    if given is None:
        return None
    which = _column(strategy, "assign", "the models", given, selection)
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in which)
    if not whole or not all(0 <= one < MOST_MODELS for one in which):
        raise ConfigurationError(
            f"{type(strategy).__name__}.assign must give whole numbers from 0, below "
            f"{MOST_MODELS}, got {shown(which)}."
        )
    return which


def as_draw(strategy: WeightingStrategy, selection: Selection) -> Draw:
    """Return what ``draw`` gives, if it is a share and chances to be drawn by."""
    given: Any = strategy.draw(selection)
    name = f"{type(strategy).__name__}.draw"
    if not isinstance(given, Draw):
        raise ConfigurationError(
            f"{name} must return a fedweight.strategies.Draw, got {shown(given)}."
        )
    fraction = _scalar(given.fraction)
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise ConfigurationError(
            f"{name}: the fraction must be a number in [0, 1], got {shown(fraction)}."
        )
    if given.chances is None:
        return Draw(fraction)
    chances = _column(strategy, "draw", "chances", given.chances, selection)
    good = [isinstance(one, int | float) and 0 <= one < math.inf for one in chances]
    if not all(good):
        raise ConfigurationError(
            f"{name}: chances must be finite and 0 or more, got "
            f"{shown(chances[good.index(False)])}."
        )
    if not any(chances):
        raise ConfigurationError(
            f"{name} gave every client the chance 0. Give some of them more."
        )
    return Draw(fraction, chances)


def _scalar(value: Any) -> Any:
    """Return NumPy's and PyTorch's single numbers as Python's."""
    single = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if single else value


def _column(
    strategy: WeightingStrategy, hook: str, name: str, given: Any, selection: Selection
) -> list[Any]:
    if isinstance(given, Mapping | str | bytes) or not isinstance(given, Iterable):
        raise ConfigurationError(
            f"{type(strategy).__name__}.{hook} must give a list, a value for each of "
            f"the {len(selection.clients)} clients in their order, got {shown(given)} "
            f"for '{name}'."
        )
    if isinstance(given, Tensor | np.ndarray):
        column = given.tolist()
    else:
        column = [_scalar(one) for one in given]
    if len(column) != len(selection.clients):
        raise ConfigurationError(
            f"{type(strategy).__name__}.{hook} gave {len(column)} values for '{name}' "
            f"and {len(selection.clients)} clients. Give one each, or one for all."
        )
    return column
