"""Thousands of configurations that nobody would write: each is resolved or refused.

What is resolved is made ready as for a run, data, model and strategy; what is
refused is refused in one line. Nothing else may come out.
"""

from __future__ import annotations

import math
import random
import tomllib
from typing import Any

import numpy as np
import pytest

from fedweight.core.errors import FedweightError
from fedweight.core.options import options_of
from fedweight.data import DataSet, Examples
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import make_ready, prepare
from fedweight.studies.tables import PICKS, SCHEMA


def nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    20,
    -1,
    10**6,
    10**9,
    10**18,
    2**63,
    10**30,
    10**400,
    -(10**30),
]
NUMBERS += [0.5, 0.0, 1.0, -0.0, -0.1, 1e-300, 1e300, math.inf, -math.inf, math.nan]
TEXTS = ["", "a", "auto", "loop", "batched-3", "batched-0", "batched-\u00b2", "cpu"]
TEXTS += [
    "batched-" + "9" * 5000,
    "cuda",
    "local",
    "x\0y",
    "\ud800",
    "x" * 5000,
    "a\nb",
]
TEXTS += ["/no/such", "~nobody/x", "sgd", "adam", "e", "exp", "quad"]
LISTS = [[], [1], [64], [0], [1, 2], [10**9], ["a"], [[1]], [1] * 2000]
LISTS += [nested(40), nested(900)]
OTHERS = [True, False, None, {}, {"a": 1}, (1, 2), np.int64(3), np.float32(0.5)]
OTHERS += [np.zeros(2), object(), b"x", 1 + 2j]
VALUES = [*NUMBERS, *TEXTS, *LISTS, *OTHERS]

NAMES = ["builtins:dict", "math:sqrt", "math:pi", "os:getcwd", "json:dumps", "a:b:c"]
NAMES += ["nowhere:x", ":", "x:", "numpy:float64", "collections:OrderedDict", "a:b"]
NAMES += ["torch.nn:Linear", "y" * 5000 + ":z", "torch:zeros", "builtins:object"]
NAMES += [f"flwr.serverapp.strategy:{name}" for name in ("FedAvg", "FedMedian", "Krum")]


def small() -> DataSet:
    x = np.random.default_rng(0).normal(size=(60, 1, 8, 8)).astype(np.float32)
    y = np.arange(60) % 3
    test = Examples(x[:9], y[:9])
    return DataSet("small", Examples(x, y), test, 3, np.arange(60) % 7)


def some_table(rng: random.Random, name: str) -> dict[str, Any]:
    """Draw a table: mostly values of the right type, some of any."""
    table: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if name in PICKS:
        known = list(PICKS[name].registry.entries)
        if rng.random() < 0.7:
            table["name"] = rng.choice([*known * 4, *NAMES])
        try:
            chosen = table.get("name", SCHEMA[name]["name"].default)
            options = dict(options_of(PICKS[name].registry.resolve(chosen)))
        except (FedweightError, TypeError, ValueError):
            pass
    defaults = {key: rule.default for key, rule in SCHEMA[name].items()}
    defaults |= {key.replace("_", "-"): o.default for key, o in options.items()}
    defaults |= {"seed": 0, "no-such-key": 0, "": 0}
    for _ in range(rng.choice([0, 0, 1, 2])):
        key = rng.choice([key for key in defaults if key != "name"])
        alike = [v for v in VALUES if type(v) is type(defaults[key])] or NUMBERS + LISTS
        rule = SCHEMA[name].get(key)
        if rule is not None and rule.choices:
            alike = list(rule.choices)
        table[key] = rng.choice(alike if rng.random() < 0.85 else VALUES)
    return table


def outcome(rng: random.Random, given: dict[str, Any], dataset: DataSet) -> str:
    """Resolve and make ready; return why not, in the words of an error of ours."""
    try:
        if rng.random() < 0.5:
            configuration = Configuration.of(given)
        else:
            dotted = {
                f"{name}.{key}": value
                for name, table in given.items()
                if isinstance(table, dict)
                for key, value in table.items()
                if key
            }
            configuration = Configuration.read(None, dotted)
        assert Configuration.of(tomllib.loads(configuration.to_toml()))
        make_ready(prepare(configuration, dataset))
    except FedweightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("part", range(10))
@pytest.mark.filterwarnings("ignore")  # Flower's strategies and torch have their own.
def test_a_configuration_is_resolved_or_refused_in_one_line(part):
    rng = random.Random(part)
    dataset = small()
    refused = 0
    for _ in range(300):
        given: dict[str, Any] = {}
        for name in rng.sample(list(SCHEMA), rng.choice([1, 1, 2, 9])):
            whole = rng.random() < 0.97
            given[name] = some_table(rng, name) if whole else rng.choice(VALUES)
        reason = outcome(rng, given, dataset)
        refused += bool(reason)
        assert "\n" not in reason, reason
        assert len(reason) < 1500, reason
    assert 100 < refused < 270  # Neither all of them nor none.
