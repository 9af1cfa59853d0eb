"""Objectives around others: said in a file, as objects, and in a comparison."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedweight import run
from fedweight.clients.objectives import (
    RENT,
    SAM,
    Focal,
    GroupDRO,
    Objective,
    Plain,
    Proximal,
    objective,
)
from fedweight.core.errors import ConfigurationError, FedweightError
from fedweight.studies.catalogue import json_schema, options_page
from fedweight.studies.configuration import Configuration
from fedweight.studies.given import as_settings
from fedweight.studies.methods import methods_of

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.name": "local",
}


def resolved(**table: Any) -> dict[str, Any]:
    return dict(Configuration.of({"objective": {"name": "sam", **table}})["objective"])


def test_the_inner_objective_is_plain_unless_said() -> None:
    assert resolved() == {"name": "sam", "rho": 0.05, "inner": {"name": "plain"}}


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("focal", {"name": "focal", "gamma": 2.0}),
        ({"name": "focal", "gamma": 1}, {"name": "focal", "gamma": 1.0}),
        (
            {"name": "proximal", "mu": 0.5, "inner": {"name": "focal"}},
            {"name": "proximal", "mu": 0.5, "inner": {"name": "focal", "gamma": 2.0}},
        ),
        (
            {"name": "ldam", "reweight_from": 3},
            {
                **{"name": "ldam", "margin": 0.5, "scale": 30.0, "counts": "all"},
                **{"reweight-from": 3, "beta": 0.9999},
            },
        ),
    ],
)
def test_its_options_are_filled_in(inner: Any, expected: dict[str, Any]) -> None:
    assert resolved(inner=inner)["inner"] == expected


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("focl", "objective.inner: there is no objective 'focl'. Did you mean 'focal'"),
        ({"name": "focal", "gama": 1.0}, "objective.inner has no key 'gama'. Did you"),
        (
            {"name": "focal", "gamma": -1.0},
            r"objective.inner.gamma must be in \[0, inf\), got -1.0",
        ),
        ({"gamma": 1.0}, "objective.inner must be the name of one"),
        (3, "objective.inner must be the name of one"),
        (
            {"name": "sam", "inner": {"name": "sam", "inner": "x"}},
            "objective.inner.inner.inner: there is no objective 'x'",
        ),
        ("nowhere:Own", "objective.inner: .*there is no module 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_told_by_its_key(inner: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        resolved(inner=inner)


def test_it_is_made_by_name_by_table_and_as_an_object() -> None:
    made: list[Any] = [
        SAM(0.1, Focal(1.0)),
        SAM(0.1, {"name": "focal", "gamma": 1.0}),  # type: ignore[arg-type]
        objective("sam", rho=0.1, inner={"name": "focal", "gamma": 1.0}),
    ]
    for one in made:
        assert type(one.inner) is Focal
        assert (one.rho, one.inner.gamma) == (0.1, 1.0)
    assert type(SAM().inner) is Plain
    nested: Any = SAM(inner={"name": "proximal", "inner": "rent"})  # type: ignore[arg-type]
    assert type(nested.inner) is Proximal
    assert type(nested.inner.inner) is RENT
    with pytest.raises(ConfigurationError, match="inner must be"):
        SAM(0.1, 3)  # type: ignore[arg-type]


def test_the_page_of_sam_tells_of_it() -> None:
    row = options_page("objective", "sam")["inner"]
    assert row["default"] == {"name": "plain"}
    assert "a table with 'name'" in row["allowed"]
    assert "other objective" in row["meaning"]
    cases = json_schema()["properties"]["objective"]["allOf"]
    (sam,) = [c for c in cases if c["if"]["properties"]["name"]["const"] == "sam"]
    kinds = [one["type"] for one in sam["then"]["properties"]["inner"]["anyOf"]]
    assert kinds == ["string", "object"]


def start(folder: Path, given: Any) -> Any:
    return run(settings={**QUICK, **given}, out=folder, report=False)


def test_an_object_and_a_file_give_the_same_run_which_repeats(tmp_path: Path) -> None:
    file = tmp_path / "sam.toml"
    file.write_text(
        '[objective]\nname = "sam"\nrho = 0.1\n'
        'inner = {name = "balanced-softmax", counts = "own"}\n'
    )
    made = SAM(0.1, objective("balanced-softmax", counts="own"))
    runs = [
        start(tmp_path / "object", {"objective": made}),
        run(file, settings=QUICK, out=tmp_path / "file", report=False),
    ]
    again = tmp_path / "object" / "config.toml"
    runs.append(run(again, out=tmp_path / "again", report=False))
    tables = [one.rounds["test_loss"].tolist() for one in runs]
    assert tables[0] == tables[1] == tables[2]
    with again.open("rb") as opened:
        written = tomllib.load(opened)["objective"]
    inner = {"name": "balanced-softmax", "tau": 1.0, "counts": "own"}
    assert written == {"name": "sam", "rho": 0.1, "inner": inner}
    plain = start(tmp_path / "plain", {"objective": SAM(0.1)})
    assert plain.rounds["test_loss"].tolist() != tables[0]


def test_what_the_inner_one_wants_is_asked_for(tmp_path: Path) -> None:
    made = start(
        tmp_path / "totals",
        {"objective.name": "sam", "objective.inner": "balanced-softmax"},
    )
    assert made.rounds["ok"].tolist()[1:] == [4] * 2
    with pytest.raises(FedweightError, match=r"objective.group"):
        start(tmp_path / "groups", {"objective": SAM(0.1, GroupDRO("sex"))})


class Own(Objective):
    """Does not say what it was made with."""

    def __init__(self, how: int = 1) -> None:
        self.made_with = how

    def example_losses(self, outputs: Any, batch: Any, facts: Any) -> Any:
        return outputs.sum(1)


def test_an_inner_object_that_no_file_could_say_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not say what it was made with"):
        as_settings({"objective": SAM(0.1, Own(3))})


def test_a_comparison_names_it_briefly() -> None:
    listed = methods_of(
        "fedavg", ["plain", SAM(), SAM(0.1, Focal(1.0)), "sam:inner=focal"]
    )
    assert [one.label for one in listed] == [
        "fedavg+plain",
        "fedavg+sam",
        "fedavg+sam:rho=0.1:inner=focal(gamma=1.0)",
        "fedavg+sam:inner=focal",
    ]
    (table,) = methods_of("fedavg", "sam:inner={name='focal', gamma=1.0}")
    assert table.settings["objective.inner"] == {"name": "focal", "gamma": 1.0}
