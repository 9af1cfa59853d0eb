"""What a comparison runs: axes of a call, of a command line and of a file."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import fedweight
from fedweight.cli import main
from fedweight.core.errors import ConfigurationError
from fedweight.studies.axes import Asked
from fedweight.studies.catalogue import json_schema
from fedweight.studies.configuration import Configuration
from fedweight.studies.study import Study
from fedweight.studies.tables import COMPARE

ROOT = Path(fedweight.__file__).parents[1]

FILE = """
[run]
rounds = 3

[compare]
strategies = ["fedavg", "feddisco:a=0.2"]
seeds = "0-2"
target = 0.8

[compare.vary]
training.learning-rate = [0.1, 0.01]
"partition.alpha" = [0.1, 1.0]

[compare.data-sets.small]
data.name = "digits"
partition.clients = 3

[compare.data-sets.mine]
data.name = "csv"
data.path = "own.csv"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(FILE)
    return path


def labels(several: Any) -> list[str]:
    return [one.label for one in several]


def test_a_file_says_all_axes(file: Path) -> None:
    axes = Asked().beside(file).axes()
    assert labels(axes.methods) == [
        "fedavg+training.learning-rate=0.1",
        "fedavg+training.learning-rate=0.01",
        "feddisco:a=0.2+training.learning-rate=0.1",
        "feddisco:a=0.2+training.learning-rate=0.01",
    ]
    assert labels(axes.data_sets) == [
        "small+partition.alpha=0.1",
        "small+partition.alpha=1.0",
        "mine+partition.alpha=0.1",
        "mine+partition.alpha=1.0",
    ]
    assert axes.data_sets[2].settings["data.path"] == str(file.parent / "own.csv")
    assert axes.data_sets[0].settings == {
        "data.name": "digits",
        "partition.clients": 3,
        "partition.alpha": 0.1,
    }
    assert axes.seeds == [0, 1, 2]
    assert axes.target == 0.8
    assert not axes.chooses


def test_what_is_given_holds_before_the_file(file: Path) -> None:
    axes = Asked("ida", seeds=7, vary=["run.rounds=1,2"]).beside(file).axes()
    assert labels(axes.methods) == ["ida+run.rounds=1", "ida+run.rounds=2"]
    assert labels(axes.data_sets) == ["small", "mine"]
    assert axes.seeds == [7]


def test_a_call_and_a_command_line_say_the_same() -> None:
    said: dict[str, Any] = {"training.learning_rate": [0.1, 0.2], "model.hidden": [[8]]}
    texts = ["training.learning-rate=0.1, 0.2", "model.hidden=[8]"]
    found = [Asked("ida", "plain", "digits,adult", v).axes() for v in (said, texts)]
    assert found[0] == found[1]
    assert labels(found[0].methods) == [
        "ida+plain+training.learning-rate=0.1+model.hidden=[8]",
        "ida+plain+training.learning-rate=0.2+model.hidden=[8]",
    ]
    assert labels(found[0].data_sets) == ["digits", "adult"]


def test_a_sweep_is_of_what_a_strategy_takes() -> None:
    sweep = ["strategy.a=0.1,0.5", "training.learning-rate=1,2"]
    axes = Asked("fedavg,feddisco,feddisco:a=0.3", sweep=sweep).axes()
    assert axes.chooses
    rates = ["training.learning-rate=1", "training.learning-rate=2"]
    assert labels(axes.candidates["fedavg"]) == rates
    assert labels(axes.candidates["feddisco:a=0.3"]) == rates
    assert labels(axes.candidates["feddisco"]) == [
        f"strategy.a={a}+{rate}" for a in (0.1, 0.5) for rate in rates
    ]


def test_a_table_of_strategies_names_each(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        """
[compare.strategies]
fedavg = { strategy.name = "fedavg" }
ditto = { strategy.name = "fedavg", personal = { name = "ditto", weight = 0.5 } }
"my focal" = { strategy.name = "ida", objective.name = "focal" }
"""
    )
    axes = Asked(vary=["run.rounds=1,2"]).beside(path).axes()
    assert labels(axes.methods)[::2] == [
        f"{name}+run.rounds=1" for name in ("fedavg", "ditto", "my focal")
    ]
    assert axes.methods[2].settings == {
        "strategy.name": "fedavg",
        "personal.name": "ditto",
        "personal.weight": 0.5,
        "run.rounds": 1,
    }
    assert axes.methods[4].folder == "my-focal+run.rounds=1"


def test_objectives_are_crossed_with_a_table_of_strategies() -> None:
    mine = {"one": {"strategy.name": "ida"}, "two": {"training.epochs": 3}}
    axes = Asked(mine, "plain,focal").axes()
    assert labels(axes.methods) == ["one+plain", "one+focal", "two+plain", "two+focal"]
    assert axes.methods[3].settings == {
        "training.epochs": 3,
        "objective.name": "focal",
    }


@pytest.mark.parametrize(
    ("given", "objectives", "said"),
    [
        ({}, None, "strategies must name one or more"),
        ({"a": "ida"}, None, "strategies.a must be a table of settings, such as"),
        ({"a": {"run.seed": 1}}, None, "strategies.a: run.seed is what seeds say"),
        ({"a": {"data.name": "adult"}}, None, "Say it in data-sets"),
        ({"a": {"partition.clients": 3}}, None, "Say it in data-sets"),
        ({"a": {"objective.name": "sam"}}, "plain", "is what objectives say"),
    ],
    ids=str,
)
def test_a_table_of_strategies_that_cannot_be(
    given: dict[str, Any], objectives: str | None, said: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Asked(given, objectives).axes()
    assert said in str(caught.value)


STUDIES = {
    "adult_fairness": (7, 2, 10),
    "noisy_clients": (8, 2, 10),
    "label_skew_mlp": (16, 1, 10),
    "label_skew_cnn": (16, 1, 5),
    "label_skew_objectives": (10, 1, 10),
}


def test_no_file_of_a_comparison_is_left_out() -> None:
    files = (ROOT / "simulations").glob("**/*.toml")
    assert {p.stem for p in files if "[compare]" in p.read_text("utf-8")} == {*STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_that_comes_with_the_library_resolves(name: str) -> None:
    file = ROOT / "simulations" / f"{name}.toml"
    axes = Asked().beside(file).axes()
    found = (len(axes.methods), len(axes.data_sets), len(axes.seeds))
    assert found == STUDIES[name]
    # One seed of each way is resolved: others differ in that number only.
    study = Study(file, replace(axes, seeds=axes.seeds[:1]))
    study.read({}, None, False)
    assert len(study.wanted) >= found[0] * found[1]


def test_a_comparison_is_checked_as_it_would_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        """
[data]
proxy = 0.0
[compare]
strategies = "fedavg,ida,fedlaw"
seeds = "0,3"
[compare.data-sets]
few = { partition.clients = 3 }
more = { partition.clients = 5 }
"""
    )
    assert main(["check", str(path), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "comparison"
    assert said["run"]["runs"] == 12
    assert said["run"]["data sets"] == "few and more"
    assert [line.split(":")[0] for line in said["refused"]] == [
        "'fedlaw' on few",
        "'fedlaw' on more",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vary": {"run.seed": [1, 2]}}, "vary: run.seed is what seeds say"),
        ({"vary": ["strategy.name=ida"]}, "vary: strategy.name is what strategies say"),
        (
            {"vary": ["objective.name=plain"], "objectives": "plain"},
            "objective.name is what objectives say",
        ),
        ({"vary": ["run.rounds"]}, "vary: run.rounds has no value"),
        ({"vary": {"run.rounds": []}}, "vary: run.rounds has no value"),
        ({"vary": ["rounds=1,2"]}, "must be written table.key=value"),
        ({"vary": 3}, "vary: got 3. Write training.learning-rate=0.1,0.01"),
        (
            {"vary": ["run.rounds=1", "run.rounds=2"]},
            "vary: run.rounds is there twice. Give it once, with all its values",
        ),
        (
            {"sweep": {"training.clip_norm": [1.0], "training.clip-norm": [2.0]}},
            "sweep: training.clip-norm is there twice",
        ),
        ({"vary": ["run.rounds=1,1"]}, "'fedavg+run.rounds=1' is there twice"),
        ({"vary": ["partition.alpha=1,1"]}, "'partition.alpha=1' is there twice"),
        ({"vary": {"training.momentum": [float("nan")]}}, "must be numbers that are"),
        ({"sweep": ["data.held-out=0.1,0.2"]}, "which no accuracy can choose"),
        ({"sweep": ["personal.weight=0.1,1.0"]}, "judges the global one. Vary it."),
        ({"sweep": ["strategy.a=0.1,0.2"]}, "no strategy takes strategy.a"),
        (
            {"sweep": ["run.rounds=1,2"], "vary": ["run.rounds=3,4"]},
            "sweep: run.rounds is varied",
        ),
        ({"data_sets": "digits,digits"}, "data-sets: 'digits' is there twice"),
        ({"data_sets": {"a": 3}}, "data-sets.a must be a table of settings"),
        ({"data_sets": {"a": {}}}, "data-sets.a must be a table of settings"),
        ({"data_sets": {"a": {"run.seed": 1}}}, "data-sets.a: run.seed is what seeds"),
        ({"target": 0}, "target must be a test accuracy above 0 and up to 1, got 0"),
        ({"target": "high"}, "target must be a test accuracy"),
        ({"target": True}, "target must be a test accuracy"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Asked("fedavg", **given).axes()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("compare = 3", "compare is a table of keys, got 3"),
        ("[compare]\nseed = 3", "no key 'seed'. Did you mean 'seeds'?"),
        ("[compare]\ndata-sets = 'a'\ndata_sets = 'b'", "twice, also as 'data_sets'"),
        ("[compare]\nmethods = 3", "There are strategies, objectives, data-sets"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        Asked().beside(path)
    assert str(caught.value).startswith(f"{path}: compare")
    assert said in str(caught.value)


def test_keys_are_the_same_however_they_are_spelled() -> None:
    axes = Asked(
        "feddisco:num_classes=3",
        vary=["training.batch_size=8,16"],
        data_sets={"few": {"data.held_out": 0.1}},
    ).axes()
    assert axes.keys == {"training.batch-size", "data.held-out"}
    assert axes.methods[0].settings["strategy.num-classes"] == 3
    with pytest.raises(ConfigurationError, match=r"settings: training\.batch_size is"):
        fedweight.compare(
            strategies="fedavg",
            vary=["training.batch-size=8,16"],
            settings={"training.batch_size": 4},
        )


def test_other_commands_say_whose_file_it_is(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match="says what 'fedweight compare' runs"):
        Configuration.read(file)
    assert main(["run", str(file)]) == 2
    assert "Give the file to that" in capsys.readouterr().err


def test_the_pages_table_says_what_it_says() -> None:
    text = (ROOT / "docs" / "comparisons.md").read_text("utf-8")
    [table] = [t for t in re.findall(r"```toml\n(.*?)```", text, re.S) if "vary" in t]
    told = {k.replace("-", "_"): v for k, v in tomllib.loads(table)[COMPARE].items()}
    axes = Asked(**told).axes()
    assert len(axes.methods) == 3 * 2 * 2
    assert {len(several) for several in axes.candidates.values()} == {2}
    assert [one.label for one in axes.data_sets] == ["digits", "adult"]
    assert set(told) == {field.name for field in fields(Asked)}
    # Editors know the table, too.
    described = json_schema()["properties"][COMPARE]["properties"]
    assert {key.replace("-", "_") for key in described} == set(told)
    assert all(one["description"] for one in described.values())
