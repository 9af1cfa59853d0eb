import math
import tomllib
from pathlib import Path

import pytest

from fedweight import models
from fedweight.clients.objectives import OBJECTIVES
from fedweight.core.errors import ConfigurationError
from fedweight.core.options import Option, options_of
from fedweight.core.settings import parse_setting
from fedweight.data import DATA_SETS
from fedweight.data.partitions import PARTITIONS
from fedweight.strategies import STRATEGIES
from fedweight.studies.configuration import Configuration
from fedweight.studies.tables import SCHEMA

ROOT = Path(__file__).parents[2]


def refused(given, *texts):
    """Return the message, which must be one line that has the texts."""
    with pytest.raises(ConfigurationError) as caught:
        Configuration.of(given)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message, message
    return message


def test_every_default_resolves_and_is_the_one_in_the_schema():
    configuration = Configuration.of({})
    for table, keys in SCHEMA.items():
        for key, rule in keys.items():
            assert configuration[table][key] == rule.default
            assert type(configuration[table][key]) is type(rule.default)


def test_the_defaults_are_the_quick_start():
    written = Configuration.read(ROOT / "simulations" / "quickstart.toml")
    assert written == Configuration.read()


@pytest.mark.parametrize(
    "file",
    [
        path
        for path in sorted((ROOT / "simulations").glob("**/*.toml"))
        if "[compare]" not in path.read_text("utf-8")  # See test_axes.
    ],
    ids=lambda p: p.stem,
)
def test_what_ships_is_valid(file):
    Configuration.read(file)


@pytest.mark.parametrize(
    ("table", "registry"),
    [
        ("data", DATA_SETS),
        ("partition", PARTITIONS),
        ("model", models.MODELS),
        ("objective", OBJECTIVES),
        ("strategy", STRATEGIES),
    ],
)
def test_whatever_is_picked_resolves_and_can_be_written_and_read(
    table, registry, tmp_path
):
    for name in registry.entries:
        given = {table: {"name": name}}
        configuration = Configuration.of(given)
        assert configuration[table]["name"] == name
        file = tmp_path / "config.toml"
        file.write_text(configuration.to_toml())
        assert Configuration.read(file) == configuration
        assert tomllib.loads(configuration.to_toml()) == configuration.tables


def test_a_resolved_file_gives_the_same_configuration_from_anywhere(
    tmp_path, monkeypatch
):
    (tmp_path / "study").mkdir()
    (tmp_path / "run").mkdir()
    file = tmp_path / "study" / "a.toml"
    file.write_text(
        """
        [run]
        name = "été, 'x' \\"y\\""
        [data]
        name = "csv"
        path = "mine.csv"
        test = "../test.csv"
        label = "class"
        sensitive = ["sex", "age"]
        [training]
        learning-rate = 1
        [strategy]
        name = "ida"
        """
    )
    monkeypatch.chdir(tmp_path)
    configuration = Configuration.read("study/a.toml")
    assert configuration["data"]["path"] == str(tmp_path / "study" / "mine.csv")
    assert configuration["data"]["test"] == str(tmp_path / "test.csv")
    assert configuration["training"]["learning-rate"] == 1.0
    resolved = tmp_path / "run" / "config.toml"
    resolved.write_text(configuration.to_toml(), encoding="utf-8")
    monkeypatch.chdir("/")
    assert Configuration.read(resolved) == configuration


def test_a_path_in_a_setting_is_relative_to_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"data.name": "csv", "data.path": Path("a/b.csv"), "data.test": "c.csv"}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "f.toml").write_text("[data]\npath = 'x.csv'\n")
    for given in (settings, [f"{k}={v}" for k, v in settings.items()]):
        data = Configuration.read("deep/f.toml", given)["data"]
        assert data["path"] == str(tmp_path / "a" / "b.csv")
        assert data["test"] == str(tmp_path / "c.csv")
    only = Configuration.read("deep/f.toml", ["data.name=csv"])["data"]
    assert only["path"] == str(tmp_path / "deep" / "x.csv")


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"runs": {}}, ["[runs]", "Did you mean 'run'?", "strategy"]),
        ({"run": 3}, ["'run'", "got 3", "[run]"]),
        ({"run": {"round": 3}}, ["'round'", "Did you mean 'rounds'?", "seed"]),
        ({"run": {"rounds": "many"}}, ["run.rounds", "a whole number", "'many'"]),
        ({"run": {"rounds": 2.5}}, ["run.rounds", "a whole number", "2.5"]),
        ({"run": {"rounds": True}}, ["run.rounds", "a whole number", "True"]),
        ({"run": {"rounds": 0}}, ["run.rounds", "[1, inf)", "got 0"]),
        ({"run": {"seed": -1}}, ["run.seed", "[0, inf)", "-1"]),
        ({"run": {"name": 7}}, ["run.name", "a text", "7"]),
        ({"data": {"held-out": 1.0}}, ["data.held-out", "[0, 1)", "1.0"]),
        ({"data": {"held_out": 0.1}}, ["'held_out'", "Did you mean 'held-out'?"]),
        ({"data": {"proxy": 1}}, ["data.proxy", "[0, 1)", "1"]),
        ({"training": {"momentum": 1}}, ["training.momentum", "[0, 1)"]),
        (
            {"training": {"learning-rate-decay": 0.0}},
            ["training.learning-rate-decay", "(0, 1]"],
        ),
        ({"training": {"learning-rate": math.inf}}, ["training.learning-rate", "inf"]),
        ({"training": {"learning-rate": math.nan}}, ["training.learning-rate", "nan"]),
        (
            {"training": {"optimizer": "adm"}},
            ["training.optimizer", "sgd", "'adm'", "Did you mean 'adam'?"],
        ),
        (
            {"training": {"optimizer": "adam", "nesterov": True}},
            ["training", "'nesterov'", "beta-1"],
        ),
        (
            {"training": {"nestrov": True}},
            ["'nestrov'", "Did you mean 'nesterov'?", "dampening"],
        ),
        (
            {"training": {"learning-rate-schedule": "cosin"}},
            ["training.learning-rate-schedule", "Did you mean 'cosine'?"],
        ),
        (
            {"training": {"schedule-length": 5}},
            ["training", "'schedule-length'", "learning-rate-schedule"],
        ),
        (
            {"training": {"learning-rate-schedule": "step", "schedule-every": 0}},
            ["training.schedule-every", "[1, inf)"],
        ),
        ({"training": {"optimizer": 3}}, ["training.optimizer", "a text", "3"]),
        ({"training": {"optimizer": "no_such:Thing"}}, ["no_such", "training"]),
        ({"engine": {"name": "rai"}}, ["engine.name", "Did you mean 'ray'?"]),
        ({"partition": {"alpha": "low"}}, ["partition.alpha", "a number", "'low'"]),
        ({"partition": {"alhpa": 1}}, ["'alhpa'", "Did you mean 'alpha'?"]),
        (
            {"strategy": {"name": "fedce", "mode": "pluss"}},
            ["strategy.mode", "'plus', 'times'", "'pluss'", "Did you mean 'plus'?"],
        ),
        ({"strategy": {"seed": 3}}, ["no key 'seed'"]),
        ({"model": {"hidden": ["wide"]}}, ["model.hidden", "a list", "wide"]),
        ({"server": {"name": "adam", "beta": 0.1}}, ["'beta'", "beta-1"]),
        ({"strategy": {"name": 3}}, ["strategy.name", "a text", "3"]),
        ({"strategy": {"name": "no_such:Thing"}}, ["no_such", "package.module:name"]),
        ({"strategy": {"name": "math:sqr"}}, ["math", "'sqr'", "'sqrt'"]),
        ({"strategy": {"name": "math:pi"}}, ["strategy.name", "math:pi", "function"]),
        ({"strategy": {"name": ":FedAvg"}}, [":FedAvg", "package.module:name"]),
        ({"strategy": {"name": ".a:B"}}, [".a:B", "package.module:name"]),
        ({"strategy": {"name": "math:"}}, ["math:", "package.module:name"]),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_wrong_and_allowed(given, texts):
    refused(given, *texts)


@pytest.mark.parametrize(
    ("table", "wrong", "right"),
    [
        ("data", "digit", "digits"),
        ("partition", "dirichelet", "dirichlet"),
        ("model", "mpl", "mlp"),
        ("objective", "plane", "plain"),
        ("strategy", "fed_avg", "fedavg"),
        ("server", "adamm", "adam"),
    ],
)
def test_an_unknown_name_is_met_with_the_closest_and_all(table, wrong, right):
    message = refused({table: {"name": wrong}}, f"'{wrong}'", f"Did you mean '{right}'")
    assert "module:name" in message


def test_the_file_is_named_where_there_is_one(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[run]\nround = 3\n")
    with pytest.raises(ConfigurationError, match=r"mine\.toml: run has no key 'round'"):
        Configuration.read(file)


def test_no_file_and_no_toml_are_one_line(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no simulation file"):
        Configuration.read(tmp_path / "none.toml")
    for name, content in (("a.toml", b"[run\n"), ("b.toml", b"\xff\xfe[run]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match="is not a TOML file") as caught:
            Configuration.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Configuration.read(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Configuration.read(tmp_path / "a.toml" / "b.toml")


def test_a_setting_on_a_broken_file_says_what_is_broken(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("run = 3\n")
    with pytest.raises(ConfigurationError, match="'run' is a table of keys, got 3"):
        Configuration.read(file, ["run.seed=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1", 1),
        ("a.b=0.5", 0.5),
        ("a.b=1e-3", 0.001),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ('a.b="1"', "1"),
        ("a.b=fedavg", "fedavg"),
        ("a.b=m:C", "m:C"),
        ("a.b=x=y", "x=y"),
        ("a.b=", ""),
        (" a.b = /tmp/x y ", "/tmp/x y"),
    ],
)
def test_settings_are_toml_or_else_text(text, value):
    table, key, read = parse_setting(text)
    assert (table, key) == ("a", "b")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["", "a", "a=1", "a.b", ".b=1", "a.=1", "=1"])
def test_a_setting_written_otherwise_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"written table\.key=value"):
        parse_setting(text)


def test_settings_override_the_file_and_later_ones_win(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[run]\nrounds = 3\nseed = 4\n[partition]\nalpha = 2.0\n")
    read = Configuration.read(file, ["run.rounds=5", "run.rounds=6"])
    assert (read["run"]["rounds"], read["run"]["seed"]) == (6, 4)
    assert read["partition"]["alpha"] == 2.0
    assert "[run]\nrounds = 3" in file.read_text()


def test_a_run_without_a_name_is_called_as_its_file(tmp_path):
    file = tmp_path / "label.skew.toml"
    file.write_text("[run]\nrounds = 3\n")
    assert Configuration.read(file)["run"] == {
        **Configuration.of({})["run"],
        **{"name": "label.skew", "rounds": 3},
    }
    assert Configuration.read(file, ["run.name=b"])["run"]["name"] == "b"
    file.write_text("[run]\nname = 'own'\n")
    assert Configuration.read(file)["run"]["name"] == "own"
    file.write_text("")
    assert Configuration.read(file)["run"]["name"] == "label.skew"
    assert Configuration.read()["run"]["name"] == "quickstart"
    file.write_text("run = 3\n")
    with pytest.raises(ConfigurationError, match="'run' is a table of keys, got 3"):
        Configuration.read(file)


def test_settings_may_be_values():
    given = {"run.name": "😀 null", "model.hidden": [3, 4], "partition.alpha": 2}
    read = Configuration.read(settings=given)
    assert read["run"]["name"] == "😀 null"
    assert read["model"]["hidden"] == [3, 4]
    assert read["partition"]["alpha"] == 2
    with pytest.raises(ConfigurationError, match="'rounds' must be written table"):
        Configuration.read(settings={"rounds": 3})


def test_a_flower_run_config_is_read():
    read = Configuration.unflatten(
        {
            "run.rounds": 3,
            "strategy.name": "ida",
            "settings": "model.hidden=[8] partition.alpha=0.5",
        }
    )
    assert read["run"]["rounds"] == 3
    assert read["strategy"]["name"] == "ida"
    assert read["model"]["hidden"] == [8]
    assert read["partition"]["alpha"] == 0.5
    with pytest.raises(ConfigurationError, match="run config: there is no table"):
        Configuration.unflatten({"rnu.rounds": 3})
    with pytest.raises(ConfigurationError, match="'rounds' must be written"):
        Configuration.unflatten({"rounds": 3})


def test_options_are_in_snake_case_and_without_the_fixed_keys():
    read = Configuration.of({"partition": {"min-size": 2, "alpha": 1.5}})
    assert read.options("partition") == {
        "alpha": 1.5,
        "min_size": 2,
        "balanced": False,
    }
    assert read.options("run") == {}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_things.py").write_text(
        """
from __future__ import annotations
from typing import TYPE_CHECKING, Any, Literal
from torch import nn
from flwr.serverapp.strategy import FedAvg
from fedweight.strategies import WeightingStrategy
if TYPE_CHECKING:
    from nowhere import Something

def load(seed, size: int = 3, how: Literal["a", "b"] = "a"): ...
def load_any(**options): ...
def net(input_shape, num_classes, activation=nn.ReLU, sizes=(1, (2, 3))): ...
def split(dataset, k, rng, extra: float = 0.5, table: dict[str, int] | None = None): ...
def typed(labels, k, rng, thing: Something, more: int = 1): ...

class Passes(FedAvg):
    def __init__(self, *args, own: int = 1, **kwargs): ...
class Ours(WeightingStrategy):
    own: float
    def weights(self, round): ...
class Bare(WeightingStrategy): ...
class Plain: ...
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("own_things", None)


@pytest.mark.usefixtures("own_module")
def test_ones_own_things_bring_their_own_options():
    read = Configuration.of(
        {
            "data": {"name": "own_things:load", "size": 9, "how": "b"},
            "partition": {"name": "own_things:split", "table": {"a": 1}},
            "model": {"name": "own_things:net"},
            "strategy": {"name": "own_things:Passes", "fraction-train": 0.5},
        }
    )
    assert read.options("data") == {"size": 9, "how": "b"}
    assert read.options("partition") == {"extra": 0.5, "table": {"a": 1}}
    # A default that TOML cannot hold is left to the function.
    assert read.options("model") == {"sizes": [1, [2, 3]]}
    assert read.options("strategy")["own"] == 1
    assert read.options("strategy")["fraction_train"] == 0.5
    assert tomllib.loads(read.to_toml()) == read.tables


@pytest.mark.usefixtures("own_module")
def test_ones_own_options_are_checked_likewise():
    def of(part, name, **given):
        return {part: {"name": f"own_things:{name}", **given}}

    refused(of("data", "load", size="x"), "data.size", "a whole number")
    refused(of("data", "load", how="c"), "data.how", "'a', 'b'")
    refused(of("data", "load", siez=3), "'siez'", "Did you mean 'size'?")
    refused(of("partition", "split", table=3), "partition.table", "a table", "3")
    refused(of("partition", "typed"), "partition needs the key 'thing'")
    refused(of("strategy", "Ours"), "strategy needs the key 'own'")
    refused(of("strategy", "Passes", fraction_trian=1), "'fraction_trian'")
    refused(of("strategy", "Plain", x=1), "no key 'x'", "It takes name.")
    Configuration.of(of("partition", "typed", thing="what the module says"))
    Configuration.of(of("strategy", "Ours", own=1, stragglers=0.5))
    Configuration.of(of("strategy", "Bare", stragglers=0.5))
    anything = Configuration.of(of("data", "load_any", x=[1, 2], y="z"))
    assert anything.options("data") == {"x": [1, 2], "y": "z"}


def test_flowers_own_strategies_show_their_options():
    from flwr.serverapp import strategy

    for name in ("FedMedian", "Krum", "FedTrimmedAvg", "FedAdam", "QFedAvg"):
        options = options_of(getattr(strategy, name))
        assert "fraction_train" in options, name
    given = {"name": "flwr.serverapp.strategy:Krum", "num-malicious-nodes": 1}
    assert (
        Configuration.of({"strategy": given}).options("strategy")["num_malicious_nodes"]
        == 1
    )


def test_types_are_checked_as_annotated():
    Option(None, int | None).checked("k", None)
    Option(None, float).checked("k", 3)
    Option(None, tuple[int, ...]).checked("k", [1, 2])
    for value, annotation in (
        (None, int),
        (True, float),
        ("x", list[str]),
        ([1, "x"], list[int]),
        ("x", int | None),
    ):
        with pytest.raises(ConfigurationError, match="k must be"):
            Option(None, annotation).checked("k", value)


# --------------------------------------------------------- seeds of their own


def test_partition_and_model_may_have_seeds_of_their_own():
    read = Configuration.of({"run": {"seed": 7}})
    assert (read.seed("partition"), read.seed("model")) == (7, 7)
    assert "seed" not in read["partition"]
    assert "seed" not in read["model"]
    given = {"run": {"seed": 7}, "partition": {"seed": 0}, "model": {"seed": 9}}
    read = Configuration.of(given)
    assert (read.seed("partition"), read.seed("model")) == (0, 9)
    assert "seed" not in read.options("partition")
    assert "seed" not in read.options("model")
    assert Configuration.of(tomllib.loads(read.to_toml())) == read
    refused({"partition": {"seed": -1}}, "partition.seed must be in [0, inf), got -1")
    refused({"model": {"seed": "x"}}, "model.seed must be a whole number")
    refused({"partition": {"sed": 1}}, "Did you mean 'seed'?")
    refused({"objective": {"seed": 1}}, "no key 'seed'")


def test_a_partition_drawn_client_by_client_has_a_seed_too():
    given = {"name": "dirichlet-sampled", "seed": 3}
    assert Configuration.of({"partition": given}).seed("partition") == 3


OWN_SEEDS = """
def net(shape, classes, seed=3): ...
def any_net(shape, classes, **options): ...
def split(dataset, k, rng, *, seed: int = 5): ...
def by_seed(dataset, k, seed, *, more=1): ...
"""


@pytest.fixture
def own_seeds(tmp_path, monkeypatch):
    (tmp_path / "own_seeds.py").write_text(OWN_SEEDS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import sys

    sys.modules.pop("own_seeds", None)


@pytest.mark.usefixtures("own_seeds")
def test_an_option_of_ones_own_that_is_called_seed_stays_ones_own():
    def of(table, name, **given):
        tables = {"run": {"seed": 7}, table: {"name": f"own_seeds:{name}", **given}}
        return Configuration.of(tables)

    for table, name, default in (("model", "net", 3), ("partition", "split", 5)):
        read = of(table, name)
        assert read.options(table) == {"seed": default}
        assert read.seed(table) == 7
        read = of(table, name, seed=11)
        assert read.options(table) == {"seed": 11}
        assert read.seed(table) == 7
    assert of("model", "any_net", seed=11).options("model") == {"seed": 11}
    read = of("partition", "by_seed", seed=11)
    assert (read.options("partition"), read.seed("partition")) == ({"more": 1}, 11)


# ------------------------------------------------------------ what none can be


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"run": {"rounds": 10**30}}, ["run.rounds", "2^63"]),
        ({"run": {"rounds": 2**31}}, ["run.rounds must be at most 2,147,483,647"]),
        ({"run": {"seed": 10**400}}, ["run.seed", "2^63"]),
        ({"run": {"timeout": 10**400}}, ["run.timeout", "2^63"]),
        ({"run": {"timeout": 1e300}}, ["run.timeout must be at most 300,000,000"]),
        ({"run": {"name": "a\0b"}}, ["run.name must not hold NUL"]),
        ({"run": {"name": "\ud800"}}, ["run.name must be Unicode text"]),
        ({"training": {"epochs": 10**12}}, ["training.epochs must be at most"]),
        ({"training": {"batch-size": 2**40}}, ["training.batch-size must be at most"]),
        (
            {"partition": {"clients": 10**9}},
            ["partition.clients must be at most 100,0"],
        ),
        ({"engine": {"threads": 10**6}}, ["engine.threads must be at most 1,024"]),
        ({"engine": {"workers": 10**6}}, ["engine.workers must be at most 10,000"]),
        ({"model": {"hidden": [10**30]}}, ["model.hidden", "2^63"]),
        (
            {"model": {"hidden": [[[1]]] * 3}},
            ["model.hidden must be a whole number or"],
        ),
        ({"partition": {"min-size": 1, "min_size": 2}}, ["'min-size' twice"]),
        ({"run": {3: 4}}, ["a key is a text, got 3"]),
        ({"run": {"seed": None}}, ["run.seed must be a whole number, got None"]),
        ({"model": {"hidden": {1, 2}}}, ["something that a simulation file can hold"]),
        ({"data": {"name": "builtins:dict"}}, ["does not say which options it takes"]),
        ({"model": {"name": "math:sqrt"}}, ["takes (x, /)", "input_shape"]),
        ({"partition": {"name": "builtins:len"}}, ["called as function(dataset"]),
        ({"strategy": {"name": "math:sqrt"}}, ["takes (x, /)", "Class(**options)"]),
        ({"server": {"name": "builtins:dict"}}, ["server.name"]),
        ({"x" * 5000: {}}, ["there is no table"]),
        ({"run": {"x" * 5000: 1}}, ["run has no key"]),
        ({"strategy": {"name": "y" * 5000}}, ["there is no strategy"]),
        ({"strategy": {"name": "y" * 5000 + ":z"}}, ["there is no module"]),
    ],
    ids=range(27),
)
def test_what_no_run_can_be_is_refused(given, texts):
    assert len(refused(given, *texts)) < 700


def test_none_is_as_if_it_were_not_given():
    read = Configuration.read(settings={"data.name": "csv", "data.classes": None})
    assert "classes" not in read["data"]
    tomllib.loads(read.to_toml())


def test_a_setting_overrides_a_key_however_its_hyphen_is_written(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[partition]\nmin-size = 1\n")
    for key in ("min-size", "min_size"):
        read = Configuration.read(file, [f"partition.{key}=3"])
        assert read.options("partition")["min_size"] == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xef\xbb\xbf[run]\n", "begins with a byte order mark"),
        (b'[data]\npath = "C:\\data\\own.csv"\n', "in single quotes: 'C:"),
        (b'[data]\npath = "C:\\Users\\x.csv"\n', "in single quotes: 'C:"),
        (b'[data]\npath = "C:\\x\\own.csv"\n', "in single quotes: 'C:"),
        ('[run]\nname = "é"\n'.encode("latin-1"), "Save it as UTF-8"),
        ('[run]\nname = "a"\n'.encode("utf-16"), "Save it as UTF-8"),
        ('[run]\nname = "a"\n'.encode("utf-16-le"), "Save it as UTF-8"),
        (b"[run]\nrounds = " + b"9" * 5000 + b"\n", "is not a TOML file"),
        (b"[model]\nhidden = " + b"[" * 5000 + b"\n", "is not a TOML file"),
        (b"[model]\nhidden = " + b"[" * 100 + b"1" + b"]" * 100, "more than 20 deep"),
        (b"# \n" * 2**21, "cannot be read: it has more than 4 MiB"),
        (b'[run]\nname = "a\\u0000b"\n', "must not hold NUL"),
        (b'[data]\npath = "C:\\new\\table.csv"\n', "in single quotes"),
    ],
    ids=range(13),
)
def test_a_file_that_is_none_is_one_line(tmp_path, content, reason):
    file = tmp_path / "own.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        Configuration.read(file)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_file_that_never_ends_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", "/dev/zero"):
        with pytest.raises(ConfigurationError, match="a pipe or a device, not a file"):
            Configuration.read(path)
    with pytest.raises(ConfigurationError, match="longer than a path can be"):
        Configuration.read("x" * 5000)
    with pytest.raises(ConfigurationError, match="must not hold NUL"):
        Configuration.read("a\0b")


def test_a_data_file_is_no_simulation_file(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="'fedweight check' looks at a file"):
        Configuration.read(file)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "~nobody-of-this-name/x"])
def test_a_path_that_none_can_be_is_refused(path):
    with pytest.raises(ConfigurationError, match=r"data\.path"):
        Configuration.read(settings={"data.name": "csv", "data.path": path})
    with pytest.raises(ConfigurationError, match=r"data\.test"):
        Configuration.read(settings={"data.name": "csv", "data.test": path})


def test_options_of_a_csv_file_may_stand_in_a_file(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        "[data]\nname = 'csv'\npath = 'own.csv'\nsep = ';'\ndecimal = ','\n"
        "encoding = 'cp1252'\nheader = false\nna-values = ['?', -9]\n"
        "drop-missing = true\ndrop = ['id']\ndtype = { zip = 'category' }\n"
    )
    read = Configuration.read(file)
    assert read.options("data")["na_values"] == ["?", -9]
    assert read.options("data")["dtype"] == {"zip": "category"}
    assert Configuration.of(tomllib.loads(read.to_toml())) == read
    refused({"data": {"name": "csv", "decimal": ";"}}, "data.decimal must be one of")
    refused({"data": {"name": "csv", "dtype": {"a": "int"}}}, "'category', 'number'")
    refused({"data": {"name": "digits", "sep": ";"}}, "data has no key 'sep'")
