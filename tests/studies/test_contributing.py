"""What clients contribute, by runs in which others are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fedweight
from fedweight.core.errors import ConfigurationError
from fedweight.data import DataSet, federate, load
from fedweight.metrics import collaborative_fairness, leave_one_out, shapley
from fedweight.studies import contribution, contribution_runs

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
    "engine.plan": "loop",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all sets of three clients."""
    out = tmp_path_factory.mktemp("made") / "c"
    contribution(settings=QUICK, out=out)
    return out


def test_it_is_the_shapley_value_of_ordinary_runs(made: Path, tmp_path: Path) -> None:
    worth = {frozenset[int](): 0.0}
    for name in sorted(made.glob("clients-*")):
        some = [int(c) for c in name.name.split("-")[1:]]
        others = [c for c in range(3) if c not in some]
        run = fedweight.run(
            settings={**QUICK, "partition.leave-out": others},
            out=tmp_path / name.name,
            report=False,
            progress=False,
        )
        worth[frozenset(some)] = run.summary()["test_accuracy"]
        same = [folder / "model.safetensors" for folder in (name, run.folder)]
        assert same[0].read_bytes() == same[1].read_bytes()
        trained = run.clients[run.clients["status"] == "ok"]
        assert set(trained["client"]) == set(some)
    assert len(worth) == 8 == contribution_runs(settings=QUICK) + 1
    worth[frozenset()] = float(run.measured("test_accuracy").loc[0])
    found = contribution(settings=QUICK, out=made)
    assert found == shapley(range(3), worth.__getitem__)
    table = pd.read_csv(made / "contributions.csv")
    assert table["contribution"].tolist() == list(found.values.values())
    assert table["standard_error"].tolist() == [0.0] * 3
    whole = worth[frozenset(range(3))]
    assert sum(found.values.values()) == pytest.approx(whole - worth[frozenset()])
    alone = contribution(settings=QUICK, out=made, method="leave-one-out")
    assert alone == leave_one_out(range(3), worth.__getitem__)


def test_what_was_run_is_not_run_again(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.glob("clients-*/*")}
    contribution(settings=QUICK, out=made)
    after = {path: path.stat().st_mtime_ns for path in made.glob("clients-*/*")}
    assert before == after
    with pytest.raises(ConfigurationError, match=r"another run: its run\.rounds is 2"):
        contribution(settings={**QUICK, "run.rounds": 3}, out=made)


def test_what_it_costs_is_told_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        """Ends it as the first run begins."""

    def stop(*arguments: Any, **more: Any) -> None:
        raise Stopped

    module = "fedweight.studies.contributing"
    monkeypatch.setattr(f"{module}.run_configured", stop)
    for watched, said in (("", ""), ("terminal", "shapley of 3 clients: 7 runs at")):
        monkeypatch.setattr(f"{module}.watched", lambda seen=watched: seen)
        with pytest.raises(Stopped):
            contribution(settings=QUICK, out=tmp_path / "c")
        err = capsys.readouterr().err
        assert (said in err) if said else "runs at most" not in err


def test_what_clients_get_of_a_fair_incentive_is_how_often_they_took_part(
    tmp_path: Path,
) -> None:
    run = fedweight.run(
        settings={
            **{**QUICK, "run.rounds": 12, "partition.clients": 8},
            **{"strategy.name": "fair-incentive", "strategy.explore-at-most": 3},
            **{"strategy.fraction-train": 0.5, "strategy.beta": 20.0},
        },
        out=tmp_path / "run",
        report=False,
        progress=False,
    )
    took_part = run.clients[run.clients["status"] == "ok"]
    last = took_part.groupby("client").last()
    assert last["syncs"].tolist() == took_part.groupby("client").size().tolist()
    assert last["syncs"].sum() == 3 * 8 + 9 * 4
    found = collaborative_fairness(last["contribution"], last["syncs"])
    assert found == pytest.approx(
        np.corrcoef(last["contribution"], last["syncs"])[0, 1]
    )


def test_who_is_left_out_has_nothing_and_others_what_they_had() -> None:
    data = load("digits")
    for options in (
        {"partition": "dirichlet", "alpha": 0.5},
        {"partition": "dirichlet-sampled"},
    ):
        whole = federate(data, num_clients=4, seed=1, **options)
        less = federate(data, num_clients=4, seed=1, leave_out=[2], **options)
        assert less.sizes[2] == 0 == len(less.client(2).train)
        assert len(less.client(2).held_out) == 0
        for k in (0, 1, 3):
            for part in ("train", "held_out"):
                one, other = (getattr(d.client(k), part) for d in (whole, less))
                np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(whole.proxy.x, less.proxy.x)
    with pytest.raises(ConfigurationError, match="client 4, but there are clients 0"):
        federate(data, num_clients=4, leave_out=[4])


def test_bad_input(tmp_path: Path) -> None:
    many = {**QUICK, "partition.clients": 11}
    with pytest.raises(ConfigurationError, match="permutations must be said"):
        contribution(settings=many, out=tmp_path / "c")
    assert contribution_runs(settings=many, permutations=3) == 31
    data = load("digits")
    untested = DataSet("own", data.train, data.test.take(slice(0, 0)), data.num_classes)
    with pytest.raises(ConfigurationError, match="'own' has none"):
        contribution(dataset=untested, settings=QUICK, out=tmp_path / "c")
    assert not (tmp_path / "c").exists()
