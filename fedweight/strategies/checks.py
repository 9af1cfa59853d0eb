"""What a method gives, looked at before it becomes the next global model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import AggregationError, ConfigurationError
from ..core.layout import FlatModel
from ..core.texts import clients_called, shown
from ..messages import keys
from ..messages.records import MOST_NUMBERS, as_measured, fits_config
from ..server.sampling import Draw
from .round import Round, Selection, Vector

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
        raise AggregationError("the aggregated model has NaN or infinite values")
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


def told_columns(
    strategy: WeightingStrategy, selection: Selection
) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Return what ``tell`` gives: what all are told, and a column for other names."""
    shared: dict[str, Any] = {}
    columns: dict[str, Sequence[Any]] = {}
    for name, told in _by_name(strategy, "tell", strategy.tell(selection)):
        if name in keys.OF_THE_SERVER:
            raise ConfigurationError(
                f"{type(strategy).__name__}.tell gave '{name}', which the server tells "
                "clients itself. Choose another name."
            )
        if isinstance(told, Vector):
            shared[name] = _numbers(strategy, name, told)
            continue
        told = _scalar(told)
        if not isinstance(told, Iterable) or isinstance(told, str | bytes):
            several = [told]
        else:
            columns[name] = _column(strategy, "tell", name, told, selection)
            several = [one for one in columns[name] if one is not None]
        for one in several:
            if not fits_config(one):
                raise ConfigurationError(
                    f"{type(strategy).__name__}.tell gave {shown(one)} for '{name}'. "
                    "Give a number of at most 64 bits or a text, one for all or a list "
                    "of one for each client."
                )
        if name not in columns:
            shared[name] = told
    return shared, columns


def _numbers(strategy: WeightingStrategy, name: str, told: Vector) -> list[float]:
    """Return several numbers for all clients as a record carries them."""
    found = as_measured(told.values)
    if not isinstance(found, list) or not found or not np.isfinite(found).all():
        raise ConfigurationError(
            f"{type(strategy).__name__}.tell gave {shown(told)} for '{name}'. Give a "
            f"Vector of 1 to {MOST_NUMBERS:,} finite numbers."
        )
    return [float(value) for value in found]


def checked_vectors(
    strategy: WeightingStrategy, state: Any, model: FlatModel
) -> dict[str, Tensor]:
    """Return what ``tell_parameters`` gives: by name a value for each parameter."""
    found = dict(_by_name(strategy, "tell_parameters", strategy.tell_parameters(state)))
    for name, vector in found.items():
        good = isinstance(vector, Tensor) and vector.shape == model.parameters.shape
        if good and vector.dtype == torch.bool:
            continue
        if not good or not vector.is_floating_point():
            raise ConfigurationError(
                f"{type(strategy).__name__}.tell_parameters must give floating or bool "
                f"tensors of shape [{model.parameters.numel()}], got {shown(vector)} "
                f"for '{name}'."
            )
        found[name] = vector.to(model.layout.dtype)
    return found


def constrained(strategy: WeightingStrategy, parameters: Tensor, state: Any) -> Tensor:
    """Return what ``constrain`` makes of parameters, if it is as many."""
    if not strategy.overrides("constrain"):
        return parameters
    given: Any = strategy.constrain(parameters, state)
    if not isinstance(given, Tensor) or given.shape != parameters.shape:
        raise ConfigurationError(
            f"{type(strategy).__name__}.constrain must return parameters, shape "
            f"[{parameters.numel()}], got {shown(given)}."
        )
    return given


def constrained_model(
    strategy: WeightingStrategy, model: FlatModel, state: Any
) -> FlatModel:
    """Return a global model as the method allows it to be."""
    if not strategy.overrides("constrain"):
        return model
    given = constrained(strategy, model.parameters, state)
    same = torch.equal(given, model.parameters)
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
