"""What Python gives in place of names: classes, functions and made objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.nn import functional

from fedweight import compare, run
from fedweight.clients import Objective, TrainingSettings, objective
from fedweight.clients.objectives import SAM
from fedweight.clients.optimizers import SGD
from fedweight.core.errors import ConfigurationError
from fedweight.server.schedules import Buffered
from fedweight.strategies import IDA, FedDisco, WeightingStrategy
from fedweight.strategies.server_optimizers import ServerAdam
from fedweight.studies.configuration import Configuration
from fedweight.studies.given import as_settings, of_main, whole_tables
from fedweight.studies.methods import methods_of

QUICK = {"run.rounds": 1, "training.epochs": 1, "partition.clients": 4}


class Uniform(WeightingStrategy):
    """Weigh clients alike."""

    extra: float = 1.0

    def weights(self, round: Any) -> Any:
        return [1 / round.num_clients] * round.num_clients


def net(input_shape: tuple[int, ...], num_classes: int, *, hidden: int = 4) -> Any:
    size = 1
    for n in input_shape:
        size *= n
    return nn.Sequential(nn.Flatten(), nn.Linear(size, num_classes))


def test_names_classes_and_objects_say_the_same() -> None:
    assert as_settings({"strategy": "ida"}) == {"strategy.name": "ida"}
    assert as_settings({"strategy": IDA}) == {"strategy.name": "ida"}
    made = as_settings({"strategy": IDA(fedavg=True)})
    assert made["strategy.name"] == "ida"
    assert made["strategy.fedavg"] is True
    table = Configuration.read(None, made)["strategy"]
    assert table["fedavg"] is True
    assert as_settings({"strategy": {"name": "ida", "fedavg": True}}) == {
        "strategy.name": "ida",
        "strategy.fedavg": True,
    }


def test_what_has_no_name_goes_by_its_module() -> None:
    path = f"{__name__}:Uniform"
    assert as_settings({"strategy": Uniform})["strategy.name"] == path
    found = as_settings({"strategy": Uniform(extra=2.0)})
    assert found["strategy.name"] == path
    assert found["strategy.extra"] == 2.0


def test_every_table_that_picks_takes_objects() -> None:
    found = as_settings(
        {
            "server": ServerAdam(learning_rate=0.5),
            "schedule": Buffered(buffer_size=3),
            "objective": objective("proximal", mu=0.25),
            "training": TrainingSettings(epochs=3),
            "model": net,
        }
    )
    configuration = Configuration.read(
        None, {k: v for k, v in found.items() if k != "model.name"}
    )
    assert configuration["server"] == {
        **configuration["server"],
        "name": "adam",
        "learning-rate": 0.5,
    }
    assert configuration["schedule"]["buffer-size"] == 3
    assert configuration["objective"]["mu"] == 0.25
    assert configuration["training"]["epochs"] == 3
    # All of it is the object's: the quick start's momentum does not stand.
    assert configuration["training"]["momentum"] == 0.0
    assert found["model.name"] == f"{__name__}:net"


def test_an_object_replaces_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text('[strategy]\nname = "feddisco"\na = 0.3\nmetric = "l2"\n')
    settings = {"strategy": FedDisco(b=0.2)}
    found = Configuration.read(
        file, as_settings(settings), whole=whole_tables(settings)
    )
    assert found["strategy"]["a"] == 0.5
    assert found["strategy"]["b"] == 0.2
    assert found["strategy"]["metric"] == "kl"
    by_class = Configuration.read(file, as_settings({"strategy": FedDisco}))
    assert by_class["strategy"]["a"] == 0.3


def test_what_the_run_fills_in_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="seed of FedDisco is filled in"):
        as_settings({"strategy": FedDisco(seed=3)})
    with pytest.raises(ConfigurationError, match="server_optimizer of FedDisco"):
        as_settings({"strategy": FedDisco(server_optimizer=ServerAdam())})


def test_what_no_file_can_name_is_refused() -> None:
    class Inner(Uniform):
        """Weigh clients alike."""

    with pytest.raises(ConfigurationError, match="inside a function or a class"):
        as_settings({"strategy": Inner})
    with pytest.raises(ConfigurationError, match="does not say what it was made with"):
        as_settings({"model": nn.Linear(2, 2)})
    with pytest.raises(ConfigurationError, match="training: 3 does not say"):
        as_settings({"training": 3})


def test_a_notebooks_own_class_is_said_not_to_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Uniform, "__module__", "__main__")
    assert of_main(as_settings({"strategy": Uniform})) == ["strategy.name"]
    assert of_main(as_settings({"strategy": "ida"})) == []
    monkeypatch.setattr(Smooth, "__module__", "__main__")
    for made in (SAM(0.1, Smooth()), SAM(0.1, SAM(0.1, Smooth()))):
        assert of_main(as_settings({"objective": made})) == ["objective.inner"]


def test_a_run_takes_them_and_its_file_repeats_it(tmp_path: Path) -> None:
    settings = {**QUICK, "server": ServerAdam(learning_rate=0.05)}
    first = run(
        strategy=IDA(fedavg=True), settings=settings, out=tmp_path / "a", report=False
    )
    again = run(tmp_path / "a" / "config.toml", out=tmp_path / "b", report=False)
    assert first.clients.equals(again.clients)
    assert first.config["strategy"]["fedavg"] is True
    assert first.config["server"]["learning-rate"] == 0.05


def test_an_object_and_an_option_of_its_table_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="the object that is given for"):
        run(strategy=FedDisco(a=0.5), settings={"strategy.a": 0.2})


def test_another_strategy_keeps_the_options_that_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file.toml"
    file.write_text('[strategy]\nname = "feddisco"\na = 0.3\nfraction-train = 0.5\n')
    found = Configuration.read(file, {"strategy.name": "fedavg"})
    assert found["strategy"]["fraction-train"] == 0.5
    assert "strategy.a of the file is left out: 'fedavg' takes no such" in caplog.text
    file.write_text('[strategy]\nname = "feddisco"\nspeed = 0.3\n')
    with pytest.raises(ConfigurationError, match="no key 'speed'"):
        Configuration.read(file, {"strategy.name": "fedavg"})
    with pytest.raises(ConfigurationError, match="no key 'a'"):
        Configuration.read(None, {"strategy.name": "fedavg", "strategy.a": 0.3})


class Asks(Uniform):
    """Weigh clients alike, and ask for what there is not."""

    request = ("held-out-loss-befor",)


def test_what_clients_do_not_measure_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="mean 'held-out-loss-before'"):
        run(strategy=Asks, settings=QUICK)


class Limited(Uniform):
    """Weigh clients alike."""

    limit: float | None = 0.5


def test_what_no_file_can_say_is_refused() -> None:
    assert as_settings({"strategy": Limited()})["strategy.limit"] == 0.5
    with pytest.raises(ConfigurationError, match="limit of Limited is None"):
        as_settings({"strategy": Limited(limit=None)})


class Smooth(Objective):
    """Keep the argument under its own name."""

    def __init__(self, smoothing: float = 0.1, limit: float | None = None) -> None:
        self.smoothing, self.limit = smoothing, limit
        self.table = np.arange(3) * smoothing

    def example_losses(self, outputs: Any, batch: Any, facts: Any) -> Any:
        return functional.cross_entropy(
            outputs, batch.y, reduction="none", label_smoothing=self.smoothing
        )


class Halved(Smooth):
    """Keep something else under it."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__(smoothing / 2)


class Forgetful(Smooth):
    """Keep it under another name."""

    def __init__(self, amount: float = 0.1) -> None:
        super().__init__(amount)


class Raising(Smooth):
    """Take nothing twice."""

    made = 0

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__(smoothing)
        Raising.made += 1
        if Raising.made > 1:
            raise ValueError("once is enough")


class Random(Smooth):
    """Hold more than it was given."""

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__(smoothing)
        self.noise = object()


SMOOTH = f"{__name__}:Smooth"


def test_an_object_of_a_plain_class_says_its_options_where_it_keeps_them() -> None:
    found = as_settings({"objective": Smooth(0.2)})
    assert found == {"objective.name": SMOOTH, "objective.smoothing": 0.2}
    found = as_settings({"objective": SAM(0.1, Smooth(limit=3.0))})
    inner = {"name": SMOOTH, "smoothing": 0.1, "limit": 3.0}
    assert found == {
        **{"objective.name": "sam", "objective.rho": 0.1},
        "objective.inner": inner,
    }


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (Halved, r"Halved\(smoothing=0.1\) is another"),
        (Forgetful, "it has no 'amount'"),
        (Raising, r"Raising\(smoothing=0.2\) raises ValueError"),
        (Random, r"Random\(smoothing=0.2\) is another"),
    ],
)
def test_one_that_does_not_keep_them_is_told_how(made: Any, why: str) -> None:
    Raising.made = 0
    with pytest.raises(ConfigurationError, match=why) as caught:
        as_settings({"objective": made(0.2)})
    name = "amount" if made is Forgetful else "smoothing"
    assert f"as self.{name} = {name}, or give the class" in str(caught.value)
    assert f"{{'name': {made.__name__}, '{name}': ...}}" in str(caught.value)


def test_a_class_stands_where_a_name_does() -> None:
    want = {"objective.name": SMOOTH, "objective.smoothing": 0.2}
    table = {"name": Smooth, "smoothing": 0.2}
    assert as_settings({"objective": table}) == want
    assert as_settings({"objective.name": Smooth, "objective.smoothing": 0.2}) == want
    found = as_settings({"strategy.name": IDA, "training.optimizer": SGD})
    assert found == {"strategy.name": "ida", "training.optimizer": "sgd"}
    with pytest.raises(ConfigurationError, match="Give a number, a text, true or"):
        Configuration.read(None, {"strategy.a": Smooth, "strategy.name": "feddisco"})


def test_objects_and_classes_are_compared(tmp_path: Path) -> None:
    found = compare(
        strategies="fedavg",
        objectives=["plain", Smooth(0.2), {"name": Smooth, "smoothing": 0.3}],
        seeds=1,
        settings={**QUICK, "model.name": "softmax"},
        out=tmp_path / "c",
        workers=1,
    )
    assert found.strategies == [
        *("fedavg+plain", "fedavg+smooth:smoothing=0.2", "fedavg+smooth:smoothing=0.3")
    ]
    table = found.run("fedavg+smooth:smoothing=0.3", 1).config["objective"]
    assert table == {"name": SMOOTH, "smoothing": 0.3}
    by_table = methods_of({"mine": {"strategy": "fedavg", "objective": Smooth(0.2)}})
    assert by_table[0].settings["objective.smoothing"] == 0.2
    # As where it stands alone: what a file says of its table does not stand.
    assert by_table[0].whole == ("objective",)
