"""What a table offers where several of its keys pick something: [training]."""

from __future__ import annotations

from typing import Any

import pytest

from fedweight.core.errors import ConfigurationError
from fedweight.studies.catalogue import catalogue, json_schema, options_page
from fedweight.studies.configuration import Configuration
from fedweight.studies.tables import SCHEMA, picks_of


@pytest.mark.parametrize(
    ("kind", "name", "brought"),
    [
        ("training", "sgd", {"dampening", "nesterov"}),
        ("training", "adam", {"beta-1", "beta-2", "epsilon"}),
        ("local optimisers", "rmsprop", {"alpha", "epsilon", "centered"}),
        ("training", "torch.optim:Rprop", {"etas", "step-sizes"}),
        ("training", "constant", set()),
        ("training", "cosine", {"schedule-length", "schedule-least"}),
        ("learning-rate schedules", "step", {"schedule-factor", "schedule-every"}),
    ],
)
def test_a_page_has_the_options_of_one_choice_only(
    kind: str, name: str, brought: set[str]
) -> None:
    page, always = options_page(kind, name), options_page("training")
    foreign = {"maximize", "foreach", "capturable", "differentiable"}
    found = page.keys() - always.keys() - foreign - {"schedule-over"}
    assert found == brought
    assert len(always.keys() - page.keys()) == 1  # The key that has the name.
    assert all(row["meaning"] for key, row in page.items() if ":" not in name)


CHOICES = [
    (table, pick, name)
    for table in SCHEMA
    for pick in picks_of(table).values()
    for name in pick.registry.entries
]


@pytest.mark.parametrize("table", SCHEMA)
def test_each_option_has_a_text_of_its_own_and_no_marks(table: str) -> None:
    for name in ["", *(name for of, _, name in CHOICES if of == table)]:
        texts = {key: row["meaning"] for key, row in options_page(table, name).items()}
        assert all(texts.values()), (name, texts)
        assert len(set(texts.values())) == len(texts), (name, sorted(texts.values()))
        marked = [text for text in texts.values() if "`" in text or "::" in text]
        assert not marked, (name, marked)


def test_no_line_of_the_catalogue_has_marks() -> None:
    lines = [line for lines in catalogue().values() for line in lines.values()]
    assert len(lines) > 150
    assert not [line for line in lines if "`" in line]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no optimizer 'adm'"):
        options_page("training", "adm")


def test_the_catalogue_has_optimisers_and_schedules_of_the_rate() -> None:
    found = catalogue()
    assert "nesterov" not in found["keys of a simulation file"]
    assert {"sgd", "adamw"} <= found["local optimisers"].keys()
    assert {"constant", "warm-up"} <= found["learning-rate schedules"].keys()


TABLES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5, "nesterov": True},
    {"optimizer": "sgd", "beta-1": 0.9},
    {"beta-1": 0.9},
    {"optimizer": "adam", "beta-1": 0.9},
    {"optimizer": "adam", "nesterov": True},
    {"optimizer": "adagrad", "epsilon": 1e-3},
    {"optimizer": "adagrad", "epsilon": 0.0},
    {"optimizer": "torch.optim:NAdam", "momentum-decay": 0.1},
    {"optimizer": "none"},
    {"learning-rate-schedule": "cosine", "schedule-length": 3},
    {"schedule-length": 3},
    {"learning-rate-schedule": "step", "schedule-over": "steps"},
    {"learning-rate-schedule": "step", "schedule-over": "epochs"},
    {"optimizer": "rmsprop", "learning-rate-schedule": "warm-up", "centered": True},
    {"no-such-key": 1},
]


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_an_editor_is_told_what_a_run_is_told(table: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json_schema())
    try:
        Configuration.of({"training": table})
        fits = True
    except ConfigurationError:
        fits = False
    assert validator.is_valid({"training": table}) == fits
