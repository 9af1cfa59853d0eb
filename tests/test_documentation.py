"""What cards, docstrings and the README say, held against the code.

Tables of options, ranges, names and commands are read from the text; whether what they
say of a method is true is tested beside the method.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import math
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedweight
from fedweight import Comparison
from fedweight.cli import parser
from fedweight.clients import Objective, TrainingApp, TrainingSettings
from fedweight.clients.objectives import OBJECTIVES, SAM, Proximal
from fedweight.clients.optimizers import OPTIMIZERS
from fedweight.clients.personal import PERSONAL
from fedweight.clients.rate_schedules import RATE_SCHEDULES
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.module import FlatModule
from fedweight.core.options import options_of
from fedweight.core.updates import StackedUpdates, Updates
from fedweight.data import ClientData, DataSet, Examples, FederatedData
from fedweight.data.fetch import BY_HAND, SOURCES
from fedweight.data.lazy import dirichlet_sampled
from fedweight.data.partitions import PARTITIONS
from fedweight.data.skews import attribute_skew
from fedweight.messages import keys
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.codecs import CODECS, codec
from fedweight.server.admission import FAR_LONGER
from fedweight.server.reported import OWN_METRICS
from fedweight.server.schedules import make_schedule
from fedweight.simulations import LocalGrid, Plan
from fedweight.strategies import (
    SERVER_OPTIMIZERS,
    STRATEGIES,
    Round,
    WeightingStrategy,
    strategy_class,
)
from fedweight.strategies.checks import LARGEST_VALUE
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.round import REPORTED, REQUESTED
from fedweight.strategies.server_optimizers import ServerAdam, ServerMomentum
from fedweight.studies.axes import Asked
from fedweight.studies.configuration import Configuration
from fedweight.studies.methods import methods_of
from fedweight.studies.tables import options_in_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OF_FAIRNESS = [f"strategies/{n}.md" for n in ("global-group-dro", "agnostic-fair")]
METHODS = sorted(STRATEGIES.entries)
PAGES = sorted(
    p
    for p in ROOT.glob("**/*.md")
    if not p.relative_to(ROOT).parts[0].startswith(".venv")  # .venv-oldest, too
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

Row = dict[str, str]


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def tables(name: str) -> list[list[Row]]:
    """Read the tables of a page: rows by their headings."""
    found: list[list[Row]] = []
    heading: list[str] = []
    for line in text_of(name).splitlines():
        if not line.startswith("|"):
            heading = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not heading:
            heading = cells
            found.append([])
        elif set(line) - set("|-: "):
            found[-1].append(dict(zip(heading, cells, strict=True)))
    return found


def table(name: str, *headings: str) -> list[Row]:
    """Read the one table of a page that has these headings."""
    [found] = [rows for rows in tables(name) if rows[0].keys() >= {*headings}]
    return found


def names(cell: str) -> list[str]:
    """Return what stands in back quotes in a cell."""
    return re.findall(r"`([^`]*)`", cell)


def code_blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(name), re.DOTALL)


def build(name: str, **options: Any) -> WeightingStrategy:
    """Make a strategy of a registered name, with what it needs of the server."""
    cls: Any = strategy_class(name)
    inputs = {
        "model": nn.Linear(2, 3),
        "proxy": SimpleNamespace(x=np.ones((4, 2), np.float32), y=np.arange(4) % 3),
    }
    made: WeightingStrategy = cls(**{k: inputs[k] for k in cls.needs}, **options)
    return made


# Ranges.


class Range:
    """An interval as the documentation writes it: "[0, 1)", "above 0", "1 or more"."""

    WRITTEN = re.compile(
        r"(?P<left>[\[(])(?P<from>[\d.]+), (?P<to>[\d.]+)(?P<right>[\])])"
        r"|(?:[Aa]bove|greater than) (?P<above>[\d.]+)"
        r"|(?P<least>[\d.]+) or more"
    )

    def __init__(self, match: re.Match[str], whole: bool) -> None:
        self.whole = whole
        self.low = float(match["from"] or match["above"] or match["least"])
        self.high = float(match["to"] or math.inf)
        self.low_open = match["above"] is not None or match["left"] == "("
        self.high_open = match["right"] == ")"

    @classmethod
    def find(cls, text: str, whole: bool) -> Range | None:
        match = cls.WRITTEN.search(text)
        return match and cls(match, whole)

    def allowed(self) -> Iterator[float]:
        step = 1 if self.whole else 1e-3
        ends = [self.low + self.low_open * step, self.low + step]
        if math.isfinite(self.high):
            ends.append(self.high - self.high_open * step)
        else:
            ends.append(self.low + 1000)
        yield from (int(end) if self.whole else end for end in ends)

    def refused(self) -> Iterator[float]:
        step = 1 if self.whole else 1e-3
        yield from [self.low] if self.low_open else []
        yield from [self.high] if self.high_open else []
        ends = [self.low - step, self.high + step]
        yield from (int(e) if self.whole else e for e in ends if math.isfinite(e))
        yield from [] if self.whole else [math.nan, math.inf]


def check(take: Callable[[Any], Any], allowed: Any, refused: Any) -> None:
    for value in allowed:
        take(value)
    for value in refused:
        try:
            take(value)
        except ConfigurationError:
            continue
        pytest.fail(f"{value!r} is taken, though it is out of the range")


# Options in the cards.

OPTIONS = [
    (name, row)
    for name in METHODS
    for rows in tables(f"strategies/{name}.md")
    for row in rows
    if "option" in row
]
WORDS = {"false": False, "true": True, "none": None, "uniform": None}


def default_of(cell: str) -> Any:
    word = cell.strip("`")
    return WORDS[word] if word in WORDS else json.loads(word)


@pytest.mark.parametrize(
    ("name", "row"), OPTIONS, ids=[f"{n}-{names(r['option'])[0]}" for n, r in OPTIONS]
)
def test_an_option_is_as_its_card_says(name: str, row: Row) -> None:
    [key] = names(row["option"])
    option, default = key.replace("-", "_"), default_of(row["default"])
    made = build(name)
    assert getattr(made, option) == default
    if default is not None:
        Configuration.of({"strategy": {"name": name, key: default}})

    def take(value: Any) -> Any:
        return build(name, **{option: value})

    choices = [json.loads(c) if c[0] == '"' else c for c in names(row["range"])]
    whole = type(getattr(made, option)) is int or "whole" in row["range"]
    limits = Range.find(row["range"], whole)
    if row["range"].startswith("`[C]`"):
        check(take, [[1, 2, 3], [0.2, 0.8]], [[0, 0], [-1, 2], [0, 1], []])
    elif row["range"]:
        assert choices or limits
        check(take, choices, ["another"] if choices else [])
        if limits:
            check(take, limits.allowed(), limits.refused())
    else:
        assert isinstance(default, bool | str)


@pytest.mark.parametrize("name", METHODS)
def test_a_card_has_every_option_of_its_method(name: str) -> None:
    cls: Any = strategy_class(name)
    own = {name for name, option in options_of(cls).items() if not option.given}
    own -= options_of(WeightingStrategy).keys()
    listed = {names(row["option"])[0] for n, row in OPTIONS if n == name}
    assert {o.replace("_", "-") for o in own} <= listed


def test_the_options_of_every_strategy_are_those_that_the_page_lists() -> None:
    page = text_of("strategies/README.md")
    [said] = re.findall(r"its own options:(.*?);\s+from Python", page, re.DOTALL)
    options = options_of(WeightingStrategy)
    common = {name for name, option in options.items() if not option.given}
    assert {name.replace("-", "_") for name in names(said)} == common


# Ranges in docstrings.


def documented(subject: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the parameters of a docstring: name, type, and what is said of it."""
    doc = inspect.cleandoc(subject.__doc__)
    section = doc.partition("Parameters\n----------\n")[2]
    section = re.split(r"^\w+\n-+$", section, flags=re.MULTILINE)[0]
    item = r"^(\w+(?:, \w+)*) : (.*)\n((?:    .*\n|\n)+)"
    for listed, kind, said in re.findall(item, section + "\n", re.MULTILINE):
        for name in listed.split(", "):
            yield name, kind, " ".join(said.split())


LABELS = np.repeat(np.arange(4), 50)
TOY = DataSet(
    "toy",
    Examples(np.zeros((200, 1), np.float32), LABELS),
    Examples(np.zeros((4, 1), np.float32), np.arange(4)),
    4,
)


PEOPLE = DataSet(
    "people",
    Examples(TOY.train.x, LABELS, {"sex": LABELS % 2}),
    TOY.test,
    4,
    attribute_names={"sex": ("female", "male")},
)


def of_a_partition(function: Any) -> Callable[..., Any]:
    return lambda **o: function(LABELS, 5, np.random.default_rng(0), **o)


# What takes the parameters that a docstring describes.
TAKERS: dict[str, tuple[Any, Callable[..., Any]]] = {
    **{
        name: (strategy_class(name), lambda name=name, **o: build(name, **o))
        for name in METHODS
    },
    "every strategy": (WeightingStrategy, FedAvg),
    "momentum": (ServerMomentum, ServerMomentum),
    "adam": (ServerAdam, ServerAdam),
    "proximal": (Proximal, Proximal),
    "training": (TrainingSettings, TrainingSettings),
    **{
        name: (registry.resolve(name), registry.resolve(name))
        for registry in (OPTIMIZERS, RATE_SCHEDULES)
        for name in registry.entries
        if name != "adam"  # The server's has the name; adamw has the same options.
    },
    **{
        name: (PARTITIONS.resolve(name), of_a_partition(PARTITIONS.resolve(name)))
        for name in ("dirichlet", "quantity")
    },
    "attribute": (
        attribute_skew,
        lambda **o: attribute_skew(
            PEOPLE, 5, np.random.default_rng(0), **{"attribute": "sex", **o}
        ),
    ),
    "dirichlet-sampled": (
        dirichlet_sampled,
        lambda **o: dirichlet_sampled(LABELS, 5, 0, **o),
    ),
    "federated data": (
        FederatedData,
        lambda **o: FederatedData(TOY, [np.arange(200)], **o),
    ),
}
RANGES = [
    (who, name, found)
    for who, (subject, _) in TAKERS.items()
    for name, kind, said in documented(subject)
    if kind.startswith(("int", "float"))
    and (found := Range.find(said, whole=kind.startswith("int"))) is not None
]


@pytest.mark.parametrize(
    ("who", "name", "limits"), RANGES, ids=[f"{w}-{n}" for w, n, _ in RANGES]
)
def test_a_parameter_is_checked_as_its_docstring_says(
    who: str, name: str, limits: Range
) -> None:
    take = TAKERS[who][1]
    check(lambda v: take(**{name: v}), limits.allowed(), limits.refused())


def test_no_range_was_overlooked() -> None:
    found = {(who, name) for who, name, _ in RANGES}
    assert found >= {
        ("every strategy", "max_share"),
        ("every strategy", "stragglers"),
        ("every strategy", "fraction_evaluate"),
        ("fedce", "floor"),
        ("feddisco", "a"),
        ("fedlaw", "shrink"),
        ("fedprox", "proximal_mu"),
        ("ida", "epsilon"),
        ("adam", "beta_2"),
        ("training", "learning_rate_decay"),
        ("training", "clip_norm"),
        ("sgd", "dampening"),
        ("adagrad", "initial_sum"),
        ("cosine", "schedule_least"),
        ("dirichlet", "alpha"),
        ("dirichlet-sampled", "size_sigma"),
        ("federated data", "held_out"),
    }


# Names in the pages.


@pytest.mark.parametrize("page", ["README.md", "strategies/README.md"])
def test_the_tables_of_strategies_have_all_of_them(page: str) -> None:
    counts = next(h for h in tables(page)[0][0] if "client counts" in h)
    listed = [names(row["name"])[0] for row in table(page, "name", counts)]
    assert sorted(listed) == METHODS


def test_what_a_strategy_asks_for_and_needs_is_as_its_table_says() -> None:
    said = {
        "label-counts": "label counts",
        "loss-before": "a loss",
        "normaliser": "a normaliser",
        "minus-error": "an evaluation a round",
        "agnostic-sums": "sums over kernels",
    }
    for row in table("strategies/README.md", "name", "asks of clients"):
        [name] = names(row["name"])
        made: Any = build(name)
        asks = row["asks of clients"]
        for metric in made.request:
            assert said[metric] in asks
        assert bool(made.request) == any(words in asks for words in said.values())
        assert ("proxy" in made.needs) == ("proxy" in row["needs on the server"])
        as_they_come = "as they come" in row["passes over the updates"]
        assert made.weighs_by_size == as_they_come


def test_what_a_round_has_is_listed() -> None:
    rows = table("strategies/README.md", "name", "what it is")
    listed = {re.split(r"\W", n)[0] for row in rows for n in names(row["name"])}
    assert all(hasattr(Round, n) or n in Round.__dataclass_fields__ for n in listed)
    [metric] = [row["what it is"] for row in rows if "metric(" in row["name"]]
    listed = {n.strip('"') for n in names(metric) if n.startswith('"')}
    assert listed == set(REPORTED) - {keys.NUM_EXAMPLES}


def test_what_a_request_may_name_is_listed() -> None:
    rows = table("strategies/README.md", "name", "what a client measures")
    listed = {name.strip('"') for row in rows for name in names(row["name"])}
    assert listed == set(REQUESTED)


def test_what_may_be_overridden_is_listed_as_it_is_called() -> None:
    for row in table("strategies/README.md", "method"):
        for call in names(row["method"]):
            name, _, arguments = call.partition("(")
            member = inspect.getattr_static(WeightingStrategy, name)
            if isinstance(member, classmethod):
                member = member.__func__
            if arguments:
                _, *taken = inspect.signature(member).parameters
                assert arguments.strip(")").split(", ") == (taken or [""])


def test_the_operations_that_the_readme_lists_are_there() -> None:
    page = text_of("README.md")
    [said] = re.findall(r"of local updates: (.*?) \(\[all of it\]", page, re.DOTALL)
    assert len(names(said)) > 5
    assert all(hasattr(Updates, name) for name in names(said))


@pytest.mark.parametrize(
    ("package", "registry"),
    [
        ("fedweight.strategies", STRATEGIES),
        ("fedweight.strategies", SERVER_OPTIMIZERS),
        ("fedweight.clients.objectives", OBJECTIVES),
        ("fedweight.clients.personal", PERSONAL),
    ],
)
def test_what_has_a_name_is_imported_from_where_its_page_says(
    package: str, registry: Any
) -> None:
    page = text_of("docs/runs.md")
    [said] = re.findall(r"Wherever a file has a name,.*?\n\n", page, re.S)
    assert f"`{package}`" in said
    for made in map(registry.resolve, registry.entries):
        if isinstance(made, type):
            assert getattr(importlib.import_module(package), made.__name__) is made


def test_numbers_in_the_pages_are_those_in_the_code() -> None:
    page = " ".join(text_of("strategies/README.md").split())
    assert f"The first {OWN_METRICS} such names" in page
    assert f"values beyond {LARGEST_VALUE:.1e}".replace("e+09", "e9") in page
    assert "an update a thousand times as long as the median" in page
    assert FAR_LONGER == 1000


@pytest.mark.parametrize("name", ["deadline", "buffered"])
def test_the_options_of_a_schedule_are_as_their_page_says(name: str) -> None:
    page = text_of("docs/schedules.md")
    before = page[: page.index(f"Options of `{name}`")].count("| key |")
    rows = [t for t in tables("docs/schedules.md") if "key" in t[0]][before]
    options = options_in_file("schedule", name)
    listed = [names(row["key"])[0] for row in rows]
    assert listed == [key.replace("_", "-") for key in options]
    for row, (option, rule) in zip(rows, options.items(), strict=True):
        assert json.loads(names(row["default"])[0]) == rule.default
        choices = [json.loads(c) for c in names(row["range"])]
        limits = Range.find(row["range"], whole=type(rule.default) is int)

        def take(value: Any, option: str = option) -> Any:
            return make_schedule(name, **{option: value})

        check(take, choices, ["another"] if choices else [])
        if limits:
            check(take, limits.allowed(), limits.refused())


def test_the_local_methods_are_those_of_the_registry() -> None:
    listed = [names(row["name"])[0] for row in table("clients/README.md", "name")]
    assert sorted(listed) == sorted(OBJECTIVES.entries)
    rows = table("clients/README.md", "personal model")
    kept = [names(row["personal model"])[0] for row in rows]
    assert sorted(kept) == sorted(PERSONAL.entries)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.entries))
def test_a_local_method_has_a_card_with_its_options(name: str) -> None:
    own = options_of(OBJECTIVES.resolve(name))
    listed = {
        names(row["option"])[0]: default_of(row["default"])
        for rows in tables(f"clients/{name}.md")
        for row in rows
        if "option" in row
    }
    assert listed.keys() == {option.replace("_", "-") for option in own}
    for option, rule in own.items():
        usual = "plain" if option == "inner" else rule.default
        assert listed[option.replace("_", "-")] == usual
    card = text_of(f"clients/{name}.md")
    for part in ("**Idea.**", "**Equation.**", "**Assumes", "**When.**"):
        assert part in card
    assert card.index("**When not.**") < card.index("## What we measured")
    assert f"[`{name}`]({name}.md)" in text_of("clients/README.md")


@pytest.mark.parametrize(
    ("registry", "key"),
    [(OPTIMIZERS, "optimizer"), (RATE_SCHEDULES, "learning-rate-schedule")],
)
def test_optimizers_and_schedules_are_those_of_the_registry(
    registry: Any, key: str
) -> None:
    rows = {names(row[key])[0]: row for row in table("clients/README.md", key)}
    assert list(rows) == list(registry.entries)
    for name, row in rows.items():
        if not row["its own keys"].startswith("as "):
            own = {*options_in_file("training", name, key=key)} - {"schedule_over"}
            said = {*names(row["its own keys"])}
            assert said == {option.replace("_", "-") for option in own}


def test_the_app_has_the_keys_that_its_page_says() -> None:
    config = PROJECT["tool"]["flwr"]["app"]["config"]
    own = {key: value for key, value in config.items() if not isinstance(value, dict)}
    said = {
        names(row["key"])[0]: json.loads(names(row["default"])[0])
        for row in table("docs/flower.md", "key")
    }
    assert said == own


def test_python_versions_and_markers_are_those_of_the_project() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "Python 3.11, 3.12 or 3.13" in text_of(page)
    declared = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    listed = [names(row["marker"])[0] for row in table("CONTRIBUTING.md", "marker")]
    assert sorted(listed) == sorted(line.split(":")[0] for line in declared)


def test_the_example_data_are_what_their_file_says() -> None:
    header, *rows = text_of("simulations/own_data.csv").splitlines()
    assert len(rows) == 569
    assert len(header.split(",")) == 30 + 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


# Commands.


def commands() -> Iterator[tuple[str, str]]:
    """Yield the commands of ours in pages and simulation files."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in code_blocks(name, "bash"):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if line.startswith("fedweight "):
                    yield name, line
    for file in sorted((ROOT / "simulations").glob("*.toml")):
        for line in re.findall(r"^# +(fedweight .*)$", file.read_text("utf-8"), re.M):
            yield file.name, line.split("  ")[0]


@pytest.mark.parametrize(("where", "line"), list(commands()))
def test_a_command_means_something(
    where: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(line, comments=True)
    given = parser().parse_args(words)
    if given.command == "data":
        assert given.name in SOURCES | BY_HAND
    if given.command == "run":
        settings = [s for s in given.settings if "my_module" not in s]
        settings = [s for s in settings if not s.startswith("objective.smoothing")]
        if given.strategy:
            settings.append(f"strategy.name={given.strategy}")
        Configuration.read(given.file, settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tables_of_the_pages_are_those_of_a_simulation_file(page: Path) -> None:
    for block in code_blocks(page.relative_to(ROOT).as_posix(), "toml"):
        written = tomllib.loads(block)
        # One says what 'fedweight compare' runs, the other belongs to Flower.
        ours = {k: v for k, v in written.items() if k not in ("compare", "superlink")}
        Configuration.of(ours)


# Examples.


def local_round(rng: np.random.Generator, k: int) -> Round:
    start = torch.zeros(4, dtype=torch.float64)
    layout = Layout.of({"w": ((4,), "float64")}, ())
    rows = torch.from_numpy(rng.normal(size=(k, 4)))
    return Round(
        number=1,
        clients=tuple(range(k)),
        model=FlatModel(layout, start, start[:0]),
        updates=StackedUpdates(rows, start),
        num_examples=torch.from_numpy(rng.integers(1, 50, k).astype(float)),
        metrics=({},) * k,
        profiles=({},) * k,
    )


def test_the_readmes_way_to_the_gaps_between_groups_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["dose,age,sex,site,outcome"]
    for k in range(300):
        dose, sex = rng.normal(), "f" if rng.random() < 0.4 else "m"
        outcome = "well" if dose + (sex == "m") > 0.5 else "ill"
        lines.append(f"{dose:.3f},{rng.normal(50, 9):.1f},{sex},s{k % 3},{outcome}")
    Path("patients.csv").write_text("\n".join(lines) + "\n")
    [first] = [b for b in code_blocks("README.md", "python") if "gaps" in b]
    third, second = code_blocks("docs/groups.md", "python")
    assert len([line for line in first.splitlines() if line]) <= 10
    space: dict[str, Any] = {}
    exec(first, space)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if " " not in line] == [
        *("fedavg", "qfedavg")
    ]
    gaps = space["run"].gaps("sex", resamples=0)
    for row in table("docs/groups.md", "gap"):
        [name] = names(row["gap"])
        assert {name, name.replace("difference", "ratio")} <= {*gaps.index}
        assert printed.count(name) == 2
    exec(second, space)
    by_group = eval(second[second.index("MetricFrame(\n") :], space)
    rates = by_group.to_numpy(np.float64)
    assert rates.max() - rates.min() == pytest.approx(
        gaps.loc["demographic_parity_difference", "value"]
    )
    own = pd.read_csv("patients.csv").iloc[space["said"]["file_row"]]
    assert own["sex"].tolist() == space["said"]["sex"].tolist()
    # To the comparison, of two seeds here.
    assert len([line for line in third.splitlines() if line]) <= 10
    exec(third.replace("range(10)", "range(2)"), space)
    printed = capsys.readouterr().out
    assert printed.count("demographic_parity_gap") == 2
    found = space["found"]
    assert found.cells["demographic_parity_gap"].notna().all()
    assert found.folder == Path("runs/patients-comparison")
    assert Comparison(found.folder).run(found.strategies[1], 1).groups is not None


def test_the_keys_of_groups_are_those_of_their_page() -> None:
    rows = {names(r["key"])[0]: r["default"] for r in table("docs/groups.md", "key")}
    own = Configuration.of({})["groups"]
    assert {key: json.loads(names(rows[key])[0]) for key in rows} == own


def test_the_readmes_strategy_is_the_worked_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    [code] = [b for b in code_blocks("README.md", "python") if "MedianDistance" in b]
    space: dict[str, Any] = {}
    exec(code, space)
    short = space["MedianDistance"](tolerance=1.5)
    cls: Any = strategy_class("strategies.median_distance:MedianDistance")
    rng = np.random.default_rng(0)
    for k in range(3, 9):
        given = local_round(rng, k)
        assert torch.equal(short.weights(given), cls(tolerance=1.5).weights(given))


def test_the_readmes_script_runs_an_app_that_reads_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the apps of Flower's templates read them, on the server and on clients."""
    [code] = [b for b in code_blocks("README.md", "python") if "my_app" in b]
    folder = tmp_path / "my_app"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "client_app.py").write_text("""
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    told = MetricRecord({"epochs": context.run_config["local-epochs"]})
    return Message(RecordDict({"m": told}), reply_to=message)
""")
    (folder / "server_app.py").write_text("""
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    some = nodes[: int(context.run_config["fraction-train"] * len(nodes))]
    for _ in range(context.run_config["num-server-rounds"]):
        grid.send_and_receive([Message(RecordDict(), node, "train") for node in some])
""")
    monkeypatch.syspath_prepend(tmp_path)
    # The same in one process, which takes a second less.
    here = functools.partial(fedweight.simulate, isolation="none")
    monkeypatch.setattr(fedweight, "simulate", here)
    space: dict[str, Any] = {}
    exec(code, space)
    assert len(space["done"].metrics["train"]) == 3 * 50
    assert {told["epochs"] for told in space["done"].metrics["train"]} == {1}


def test_an_objective_of_ones_own_is_compared_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = code_blocks("clients/README.md", "python")
    [module] = [block for block in blocks if "class LabelSmoothing" in block]
    [script] = [block for block in blocks if "compare(" in block]
    (tmp_path / "my_module.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    quick = {"run.rounds": 1, "training.epochs": 1, "partition.clients": 3}
    here = functools.partial(fedweight.compare, settings=quick, workers=1)
    monkeypatch.setattr(fedweight, "compare", here)
    exec(script.replace("range(10)", "range(1)"), {})
    found = Comparison(Path("runs/quickstart-comparison"))
    other = "fedavg+labelsmoothing:smoothing=0.2"
    assert found.strategies == ["fedavg+plain", other]
    table = found.run(other, 0).config["objective"]
    assert table == {"name": "my_module:LabelSmoothing", "smoothing": 0.2}
    del sys.modules["my_module"]


def test_the_pairs_that_a_page_leaves_out_are_those_that_are_refused() -> None:
    page = " ".join(text_of("strategies/README.md").split())
    [taken] = re.findall(r"mean of examples' losses \((.*?), also inside", page)
    mine = {name: OBJECTIVES.resolve(name) for name in OBJECTIVES.entries}
    for chosen in ("agnostic-fair", "global-group-dro"):
        cls = strategy_class(chosen)
        free: set[str] = set()
        for name, objective in mine.items():
            groups = {"group": "sex"} if "group" in options_of(objective) else {}
            made = objective(**groups)
            with contextlib.suppress(ConfigurationError):
                cls.objective(made, {"group": "sex", "penalty": 1.0})
                free.add(name)
        assert free - {"sam", "proximal"} == set(names(taken))
    for name in STRATEGIES.entries.keys() - {"agnostic-fair"}:
        for objective in mine.values():
            groups = {"group": "sex"} if "group" in options_of(objective) else {}
            strategy_class(name).objective(objective(**groups), {})


def test_a_table_of_methods_is_as_its_page_shows(tmp_path: Path) -> None:
    [block] = [
        one
        for one in code_blocks("docs/comparisons.md", "toml")
        if "local-group" in one
    ]
    (tmp_path / "one.toml").write_text(block)
    methods = Asked().beside(tmp_path / "one.toml").axes().methods
    assert [one.label for one in methods] == [
        *("fedavg", "local-group-dro", "agnostic-fair")
    ]
    assert methods[1].settings["objective.group"] == "sex"
    taken = methods_of({"a": {"strategy": "fedavg", "objective": SAM(0.1)}})
    assert taken[0].settings["objective.rho"] == 0.1


@pytest.mark.parametrize("name", ["LabelSmoothing", "Doubt"])
def test_the_examples_of_objectives_train_alone_and_at_once(name: str) -> None:
    space: dict[str, Any] = {}
    for code in code_blocks("clients/README.md", "python"):
        if "personal_models" not in code and "compare(" not in code:
            exec(code, space)
    assert space["settings"].rule.nesterov
    objective: Objective = space[name]()

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Linear(3, 4)

    def data(context: Any) -> ClientData:
        client = context.node_config["partition-id"]
        rng = np.random.default_rng(client)
        n = 5 + 4 * client
        x = rng.normal(size=(n, 3)).astype(np.float32)
        part = Examples(x, rng.integers(0, 4, n))
        return ClientData(part, part)

    settings = TrainingSettings(epochs=2, batch_size=4)
    found = []
    for chunk in (1, 3):
        app = TrainingApp(
            model, data, num_classes=4, objective=objective, settings=settings
        )
        start = FlatRecord(FlatModule(model()).save())
        grid = LocalGrid(app, 3, plan=Plan(chunk))
        result = FedAvg().start(grid, start, num_rounds=1)
        arrays = [a.numpy().reshape(-1) for a in result.arrays.values()]
        found.append(np.concatenate(arrays))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert not np.allclose(found[0], FlatModule(model()).parameters, atol=1e-3)


def test_the_example_of_a_personal_method_has_layers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [code] = [b for b in code_blocks("clients/README.md", "python") if "OwnHead" in b]
    (tmp_path / "own_heads.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {
        "personal.name": "own_heads:OwnHead",
        "personal.epochs": 1,
        "run.rounds": 1,
        "partition.clients": 3,
        "training.epochs": 1,
    }
    run = fedweight.run(settings=settings, out=tmp_path / "run", report=False)
    space: dict[str, Any] = {"run": run, "name": 1, "client": 1}
    for line in code_blocks("clients/README.md", "python"):
        if "personal_models" in line:
            exec(line, space)
    assert space["own"].keys() == run.model().keys()
    assert run.personal["personal_accuracy"].notna().all()
    assert any(not torch.equal(space["own"][n], t) for n, t in run.model().items())


# What we measured.

MEASURED = {
    "test accuracy": ("test_accuracy", "{:.3f}"),
    "clients' mean": ("client_accuracy_mean", "{:.3f}"),
    "clients' std": ("client_accuracy_std", "{:.3f}"),
    "worst tenth": ("client_accuracy_worst10", "{:.3f}"),
    "effective clients": ("effective_clients", "{:.2f}"),
}


def reached() -> dict[str, Any]:
    """Read what was measured of the strategies, on the date that the README says."""
    [date] = re.findall(r"seed 0, on (\S+) on two cores", text_of("README.md"))
    path = RESULTS / f"strategies-label_skew-{date}.json"
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {row["strategy"]: row for row in rows if row["seed"] == 0}


def test_the_readmes_results_are_the_recorded_ones() -> None:
    rows = {names(row["strategy"])[0]: row for row in table("README.md", "strategy")}
    recorded = reached()
    assert rows.keys() == recorded.keys()
    for name, row in rows.items():
        for heading, (key, form) in MEASURED.items():
            assert row[heading] == form.format(recorded[name][key]), (name, heading)


@pytest.mark.parametrize("name", METHODS)
def test_a_cards_results_are_the_recorded_ones(name: str) -> None:
    card = " ".join(text_of(f"strategies/{name}.md").split())
    if name not in reached():
        measured = "`benchmarks/fairness.py`" in card or "docs/studies.md" in card
        assert measured or card.endswith("## What we measured Nothing yet.")
        return
    card = card[card.index("## What we measured") :]
    row = reached()[name]
    for key, form in MEASURED.values():
        assert f" {form.format(row[key])}" in card, key


def test_what_cards_say_of_fairness_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last record of the program, and its date."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program = importlib.import_module("fairness")
    record = json.loads(sorted(RESULTS.glob("fairness-*.json"))[-1].read_text("utf-8"))
    assert record["settings"] == program.SETTINGS
    assert record["methods"] == program.METHODS
    seeds = {row["seed"] for row in record["rows"]}
    assert len(record["rows"]) == len(seeds) * len(program.METHODS)
    found = program.means(record["rows"])
    said = set()
    for page in ["strategies/afl.md", "clients/group-dro.md", *OF_FAIRNESS]:
        rows = table(page, "method", *program.COLUMNS.values())
        for row in rows:
            cells = {n: row[text] for n, text in program.COLUMNS.items()}
            assert cells == found[row["method"].replace("`", "")], (page, row)
            said.add(row["method"].replace("`", ""))
        card = " ".join(text_of(page).split())
        assert f"means over {len(seeds)} seeds" in card
        assert f"`benchmarks/fairness.py` on {record['date']}" in card
    assert said == found.keys()


@pytest.mark.parametrize("section", text_of("docs/studies.md").split("\n## ")[1:])
def test_the_tables_of_a_study_are_those_of_its_record(
    section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table of the page, as its program makes it of what was recorded."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program = importlib.import_module("studies")
    shown = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    records = re.findall(r"benchmarks/results/(studies-.*)\.json", section)
    rows = [
        row
        for name in dict.fromkeys(records)
        for row in json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
    ]
    known = {program.title(name): name for row in rows for name in row}
    made = []
    for text in shown:
        heads = [cell.strip() for cell in text.split("\n")[0].strip("|").split("|")]
        columns = [known[h] for h in heads if h in known and known[h] != "strategy"]
        swept = "candidate" in heads
        for data in dict.fromkeys(row["data"] for row in rows):
            own = [row for row in rows if row["data"] == data]
            if swept:
                made.append(program.candidates(own, columns[3:]))
            else:
                chosen = [row for row in own if row["chosen"]]
                made.append(program.table(chosen, columns, rows[0]["strategy"]))
                made.append(program.by_objective(chosen, columns))
    # A page may leave rows out, not change one, nor take them from several tables.
    for text in shown:
        lines = {*text.strip().split("\n")}
        assert any(lines <= {*table.split("\n")} for table in made), text


ENGINES = {
    "floor": "floor",
    "local": "local",
    "Ray": "ray",
    "Flower's runtime": "flwr",
    "pfl": "pfl",
    "BlazeFL": "blazefl",
}


def test_the_readmes_speeds_are_recorded_ones() -> None:
    """Each row of the table is one run of the program."""
    runs = []
    for path in sorted(RESULTS.glob("throughput-*.json")):
        by_work: dict[str, dict[str, Any]] = {}
        for row in json.loads(path.read_text("utf-8")):
            by_work.setdefault(row["work"], {})[row["engine"]] = row
        runs += by_work.values()
    for row in table("README.md", "4 SGD steps of"):
        assert any(is_of(run, row) for run in runs), row


def is_of(run: dict[str, Any], row: Row) -> bool:
    for heading, engine in ENGINES.items():
        found = run.get(engine)
        if not row[heading] or found is None:
            if bool(row[heading]) != (found is not None):
                return False
            continue
        speed, *ratio = re.findall(r"[\d.]+", row[heading])
        digits = len(speed.partition(".")[2])
        if f"{found['updates_per_second']:.{digits}f}" != speed:
            return False
        digits = len(ratio[0].partition(".")[2]) if ratio else 0
        if ratio and f"{found['ratio_to_floor']:.{digits}f}" != ratio[0]:
            return False
        if engine != "floor" and not found["agrees"]:
            return False
    return True


def test_codecs_are_those_of_the_registry() -> None:
    listed = [names(row["codec"])[0] for row in table("docs/codecs.md", "codec")]
    assert sorted(listed) == sorted(CODECS.entries)
    rows = table("docs/codecs.md", "key")
    options = options_in_file("codec", "low-bits")
    assert [names(row["key"])[0] for row in rows] == list(options)
    for row, (option, rule) in zip(rows, options.items(), strict=True):
        assert json.loads(names(row["default"])[0]) == rule.default
        choices = [json.loads(choice) for choice in names(row["range"])]
        limits = Range.find(row["range"], whole=True)

        def take(value: Any, option: str = option) -> Any:
            return codec("low-bits", **{option: value})

        check(take, choices, ["another"] if choices else [])
        if limits:
            check(take, limits.allowed(), limits.refused())


def test_the_options_of_lora_are_those_of_its_page() -> None:
    rows = table("docs/adapters.md", "key")
    options = options_in_file("model", "lora", key="adapters")
    assert [names(row["key"])[0] for row in rows] == list(options)
    for row, rule in zip(rows, options.values(), strict=True):
        said = json.loads(names(row["default"])[0])
        assert said == json.loads(json.dumps(rule.default))
