"""Gaps between groups, held against fairlearn on the predictions themselves."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fairlearn import metrics as fairlearn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from fedweight import Comparison, Run, compare, run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.rng import Purpose, generator
from fedweight.data import DataSet, Examples, FederatedData
from fedweight.studies.endings import warnings_of
from fedweight.studies.gaps import group_gaps

SETTINGS: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "model.name": "softmax",
    "training.epochs": 1,
    "engine.name": "local",
    "groups.attributes": ["sex", "race"],
    "groups.intersections": True,
}


def people(n: int = 900, classes: int = 2) -> DataSet:
    rng = np.random.default_rng(0)
    sex, race = rng.choice(["f", "m"], n), rng.choice(["R & D", "b", "c"], n)
    x = rng.normal(size=(n, 4))
    score = x[:, 0] + 0.8 * (sex == "m") + 0.5 * (race == "b") + rng.normal(size=n)
    y = np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))
    # A model sees the sex, as most do by what goes with it.
    x[:, 1] = (sex == "m") + 0.1 * x[:, 1]
    every = Examples(x.astype(np.float32), y, {"sex": sex, "race": race})
    train, test = every.take(slice(0, 600)), every.take(slice(600, n))
    return DataSet("people", train, test, classes)


DATA = people()


def start(folder: Path, data: DataSet = DATA, **more: Any) -> Run:
    return run(
        dataset=data,
        settings={**SETTINGS, **more},
        out=folder,
        report=False,
        progress=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(tmp_path_factory.mktemp("gaps") / "run")


GAPS = {
    "demographic_parity_difference": fairlearn.demographic_parity_difference,
    "demographic_parity_ratio": fairlearn.demographic_parity_ratio,
    "equal_opportunity_difference": fairlearn.equal_opportunity_difference,
    "equal_opportunity_ratio": fairlearn.equal_opportunity_ratio,
    "equalized_odds_difference": fairlearn.equalized_odds_difference,
    "equalized_odds_ratio": fairlearn.equalized_odds_ratio,
}


@pytest.mark.parametrize("part", ["test", "held-out"])
@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
@pytest.mark.parametrize("agg", ["worst_case", "mean"])
@pytest.mark.parametrize("attribute", ["sex", "race", ["race", "sex"]])
def test_gaps_are_those_of_fairlearn(
    made: Run, part: Any, method: Any, agg: Any, attribute: Any
) -> None:
    found = made.gaps(attribute, part=part, method=method, agg=agg, resamples=0)
    frame = made.predictions(part, dataset=DATA)
    columns = {
        "y_true": frame["target"],
        "y_pred": frame["prediction"],
        "sensitive_features": frame[attribute].astype(str),
    }
    for name, gap in GAPS.items():
        more = {"agg": agg} if name.startswith("equalized") else {}
        wanted = gap(**columns, method=method, **more)
        assert found.loc[name, "value"] == pytest.approx(wanted, abs=1e-12), name
    right = fairlearn.MetricFrame(metrics=accuracy_score, **columns)
    for kind in ("difference", "ratio"):
        wanted = getattr(right, kind)(method=method)
        assert found.loc[f"accuracy_{kind}", "value"] == pytest.approx(wanted)
    assert found[["low", "high"]].isna().all(axis=None)
    assert len(found) == 8


def test_a_comparison_goes_on_where_a_group_is_nobodys(tmp_path: Path) -> None:
    """There is no gap then, and that is all."""
    alone = np.zeros(len(DATA.train), np.int64)
    train = Examples(DATA.train.x, DATA.train.y, {"sex": alone})
    test = Examples(DATA.test.x, DATA.test.y, {"sex": alone[: len(DATA.test)]})
    data = DataSet("p", train, test, 2, attribute_names={"sex": ("f", "m")})
    given = {**SETTINGS, "run.rounds": 1, "groups.attributes": ["sex"]}
    given["groups.intersections"] = False
    more: dict[str, Any] = {"dataset": data, "progress": False, "out": tmp_path / "c"}
    found = compare(strategies="fedavg,afl", seeds=[0], settings=given, **more)
    assert found.cells["status"].eq("complete").all()
    assert not [m for m in found.summary["metric"] if m.endswith("_gap")]
    assert found.warnings == [
        "all strategies (seed 0): sex: only f has examples on the test set; only f has "
        "examples in the held-out data; a gap needs two groups",
        "all strategies (seed 0): no training example is of group sex: m",
    ]
    run = found.run("afl", 0)
    assert [line for line in run.warnings if "sex" in line] == [
        "sex: only f has examples on the test set; only f has examples in the held-out "
        "data; a gap needs two groups",
        "no training example is of group sex: m",
    ]
    with pytest.raises(DataError, match="have no attribute 'sx'"):
        compare(
            strategies="fedavg,afl",
            settings={**given, "groups.attributes": ["sx"]},
            **{**more, "out": tmp_path / "d"},
        )
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("client", range(3))  # Client 3 holds nothing out.
def test_a_clients_gaps_are_those_of_fairlearn(made: Run, client: int) -> None:
    frame = made.predictions("held-out", dataset=DATA)
    frame = frame[frame["client"] == client]
    columns = {
        "y_true": frame["target"],
        "y_pred": frame["prediction"],
        "sensitive_features": frame["sex"].astype(str),
    }
    found = made.gaps("sex", client=client, resamples=20)
    # Fairlearn takes a rate of no example for 0; a group without one is left out here.
    both = frame.groupby("sex", observed=True)["target"].nunique() == 2
    for name, gap in GAPS.items():
        if not (both.all() or name.startswith("demographic")):
            continue
        assert found.loc[name, "value"] == pytest.approx(gap(**columns), abs=1e-12)
    known = found.dropna()
    assert (known["low"] <= known["high"]).all()
    assert len(known) == 8 or not both.all()
    controlled = made.gaps("sex", client=client, control_features="race", resamples=0)
    rates = fairlearn.MetricFrame(
        metrics=fairlearn.selection_rate,
        **columns,
        control_features=frame["race"].astype(str),
    ).difference()
    sexes = frame.groupby("race", observed=True)["sex"].nunique()
    for group, value in rates.items():
        value = value if sexes[group] > 1 else np.nan  # Fairlearn has 0 of one group.
        own = controlled.loc[("demographic_parity_difference", group), "value"]
        assert own == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_a_client_that_lacks_a_group_has_the_gaps_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 0 holds out no woman of race c; client 1 holds out men only."""
    rng = np.random.default_rng(2)
    client = np.repeat(["a", "b"], 150)
    sex, race = rng.choice(["f", "m"], 300), rng.choice(["b", "c"], 300)
    sex = np.where(client == "b", "m", np.where(race == "c", "m", sex))
    x = rng.normal(size=(300, 2)).astype(np.float32)
    every = Examples(x, (x[:, 0] > 0).astype(int), {"sex": sex, "race": race})
    data = DataSet(
        *("p", every, every.take(slice(0, 60)), 2),
        natural_clients=(client == "b").astype(int),
        natural_names=("a", "b"),
    )
    settings = {"partition.name": "natural", "partition.clients": 0, "data.proxy": 0.0}
    made = start(tmp_path / "a", data, **settings)
    crossed = made.gaps(["sex", "race"], client="a", resamples=0)
    assert crossed["value"].notna().all()
    within = made.gaps("sex", client="a", control_features="race", resamples=0)
    within = within.loc["accuracy_difference", "value"]
    frame = made.predictions("held-out", dataset=data, clients=[0])
    frame = frame[frame["race"] == "b"]
    right = (frame["target"] == frame["prediction"]).groupby(frame["sex"]).mean()
    assert within["b"] == pytest.approx(abs(right["f"] - right["m"]))
    assert np.isnan(within["c"])  # Men alone.
    assert "sex within race c: only m has examples at client a" in caplog.text
    with pytest.raises(DataError, match="only m has examples at client b; a gap needs"):
        made.gaps("sex", client="b")
    with pytest.raises(DataError, match="no groups of client 'c' were measured"):
        made.gaps("sex", client="c")
    with pytest.raises(ConfigurationError, match="the test data are the server's"):
        made.gaps("sex", client=0, part="test")


@pytest.mark.parametrize(("attribute", "control"), [("sex", "race"), ("race", "sex")])
def test_gaps_within_control_groups_are_those_of_fairlearn(
    made: Run, attribute: str, control: str
) -> None:
    found = made.gaps(attribute, control_features=control, resamples=0)
    frame = made.predictions("test", dataset=DATA)
    rates = fairlearn.MetricFrame(
        metrics={
            "demographic_parity": fairlearn.selection_rate,
            "equal_opportunity": fairlearn.true_positive_rate,
        },
        y_true=frame["target"],
        y_pred=frame["prediction"],
        sensitive_features=frame[attribute].astype(str),
        control_features=frame[control].astype(str),
    )
    for name in ("demographic_parity", "equal_opportunity"):
        for kind in ("difference", "ratio"):
            wanted = getattr(rates, kind)()[name]
            assert len(wanted) == frame[control].nunique()
            for group, value in wanted.items():
                own = found.loc[(f"{name}_{kind}", group), "value"]
                assert own == pytest.approx(value, abs=1e-12)


def test_intervals_are_those_of_examples_drawn_anew(made: Run) -> None:
    found = made.gaps("sex", resamples=600, confidence=0.9, seed=1)
    few, again, others = (made.gaps("sex", resamples=40, seed=k) for k in (1, 1, 2))
    assert few.equals(again)
    assert not few.equals(others)
    frame = made.predictions("test", dataset=DATA)
    rng = np.random.default_rng(5)
    y, guess = frame["target"].to_numpy(), frame["prediction"].to_numpy()
    women = (frame["sex"] == "f").to_numpy()
    gaps = []
    for _ in range(4000):
        rows = rng.integers(0, len(y), len(y))
        of_women, of_men = guess[rows][women[rows]], guess[rows][~women[rows]]
        gaps.append(abs(of_women.mean() - of_men.mean()))
    low, high = np.quantile(gaps, [0.05, 0.95])
    row = found.loc["demographic_parity_difference"]
    assert row["low"] == pytest.approx(low, abs=0.015)
    assert row["high"] == pytest.approx(high, abs=0.015)
    assert row["low"] < row["value"] < row["high"]


def test_gaps_of_an_earlier_round(made: Run) -> None:
    before = made.gaps("sex", round=0, resamples=0)
    assert not before.equals(made.gaps("sex", resamples=0))
    with pytest.raises(ConfigurationError, match=r"round must be .* 0, 1 and 2, got 7"):
        made.gaps("sex", round=7)


def test_predictions_and_data_have_the_attributes(made: Run) -> None:
    frame = made.predictions("held-out", dataset=DATA)
    data = made.data(DATA)
    assert isinstance(data, FederatedData)
    assert data.attribute_names["sex"] == ("f", "m")
    own = data.client(2).held_out
    rows = frame[frame["client"] == 2]
    names = [data.attribute_names["sex"][code] for code in own.attributes["sex"]]
    assert rows["sex"].tolist() == names
    with pytest.raises(ConfigurationError, match=r"dataset=\.\.\."):
        made.data()


def test_with_more_classes_the_positive_one_is_named(tmp_path: Path) -> None:
    data = people(classes=3)
    without = start(tmp_path / "a", data).gaps("sex", resamples=10)
    assert without.index.tolist() == ["accuracy_difference", "accuracy_ratio"]
    named = start(tmp_path / "b", data, **{"groups.positive": "2"})
    found = named.gaps("sex", resamples=0)
    frame = named.predictions("test", dataset=data)
    wanted = fairlearn.equalized_odds_difference(
        frame["target"] == 2,
        frame["prediction"] == 2,
        sensitive_features=frame["sex"].astype(str),
    )
    assert found.loc["equalized_odds_difference", "value"] == pytest.approx(wanted)


def test_a_rate_that_is_not_defined_leaves_its_group_out(tmp_path: Path) -> None:
    data = people()
    y = np.where(data.test.attributes["race"] == "c", 0, data.test.y)
    test = Examples(data.test.x, y, data.test.attributes)
    made = start(tmp_path / "a", DataSet("people", data.train, test, 2))
    rates = made.groups.query("part == 'test' and round == 2 and attribute == 'race'")
    rates = rates.set_index("group")["tpr"]
    assert np.isnan(rates["c"])
    found = made.gaps("race", resamples=0).loc["equal_opportunity_difference", "value"]
    assert found == pytest.approx(abs(rates["b"] - rates["R & D"]))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"attribute": "sx"}, ConfigurationError, "groups of 'sx' were not measured"),
        ({"attribute": ["sex", "age"]}, ConfigurationError, "groups.intersections"),
        ({"attribute": "sex", "client": 3}, DataError, "no groups of client 3 were"),
        ({"attribute": "sex", "method": "x"}, ConfigurationError, "between_groups"),
        ({"attribute": "sex", "agg": "x"}, ConfigurationError, "worst_case"),
        ({"attribute": "sex", "part": "train"}, ConfigurationError, "held-out"),
        ({"attribute": "sex", "confidence": 1.0}, ConfigurationError, "confidence"),
    ],
)
def test_gaps_that_there_are_not_are_one_line(
    made: Run, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        made.gaps(**arguments)
    assert "\n" not in str(caught.value)


CELLS = st.tuples(*[st.integers(0, 6)] * 4)  # tp, fn, fp, tn


@settings(max_examples=25, deadline=None)
@given(
    st.lists(CELLS.filter(any), min_size=2, max_size=4),
    st.sampled_from(["between_groups", "to_overall"]),
    st.sampled_from(["worst_case", "mean"]),
)
def test_gaps_of_any_counts_are_those_of_fairlearn(
    counts: list[tuple[int, ...]], method: Any, agg: Any
) -> None:
    table = np.array(counts)
    tp, fn, fp, tn = table.T
    n = table.sum(1)
    with np.errstate(all="ignore"):
        frame = pd.DataFrame(
            {
                **{"round": 1, "part": "test", "client": np.nan, "attribute": "s"},
                **{"group": [f"g{k}" for k in range(len(counts))], "examples": n},
                **{"accuracy": (tp + tn) / n, "positives": tp + fn},
                **{"selection_rate": (tp + fp) / n, "tpr": tp / (tp + fn)},
            }
        )
    run: Any = SimpleNamespace(groups=frame, folder=Path("run"))
    found = group_gaps(run, "s", None, None, None, method, agg, None, 0, 0.95, 0)[
        "value"
    ]
    who = np.repeat(frame["group"], n)
    y = np.concatenate([np.repeat([1, 1, 0, 0], own) for own in counts])
    guess = np.concatenate([np.repeat([1, 0, 1, 0], own) for own in counts])
    columns = {"y_true": y, "y_pred": guess, "sensitive_features": who.to_numpy()}
    metrics = {
        "accuracy": accuracy_score,
        "demographic_parity": fairlearn.selection_rate,
    }
    frames = fairlearn.MetricFrame(metrics=metrics, **columns)
    for kind in ("difference", "ratio"):
        wanted = getattr(frames, kind)(method=method)
        for name in metrics:
            assert found[f"{name}_{kind}"] == pytest.approx(wanted[name], nan_ok=True)
    # Fairlearn takes a rate of no example for 0; a group without one is left out here.
    rates = {"tpr": (fairlearn.true_positive_rate, tp + fn)}
    rates["fpr"] = (fairlearn.false_positive_rate, fp + tn)
    defined = [of > 0 for _, of in rates.values()]
    for kind in ("difference", "ratio"):
        each = []
        for (rate, _), has in zip(rates.values(), defined, strict=True):
            rows = np.repeat(has, n)
            own = {key: np.asarray(column)[rows] for key, column in columns.items()}
            one = fairlearn.MetricFrame(metrics=rate, **own) if rows.any() else None
            each.append(getattr(one, kind)(method=method) if has.sum() > 1 else np.nan)
        value = found[f"equal_opportunity_{kind}"]
        assert value == pytest.approx(each[0], nan_ok=True)
        value = found[f"equalized_odds_{kind}"]
        if min(has.sum() for has in defined) < 2:
            assert np.isnan(value)
        elif agg == "mean":
            # A ratio of 0 to 0 is none: then the other rate's counts here, and with
            # fairlearn it depends on their order.
            assert value == pytest.approx(pd.Series(each).mean(), nan_ok=True)
        else:
            worst = pd.Series(each).agg("max" if kind == "difference" else "min")
            assert value == pytest.approx(worst, nan_ok=True)
    if np.all(defined):
        for kind in ("difference", "ratio"):
            gap = GAPS[f"equalized_odds_{kind}"]
            wanted = gap(**columns, method=method, agg=agg)
            if not np.isnan(wanted):
                assert found[f"equalized_odds_{kind}"] == pytest.approx(wanted)


@pytest.mark.parametrize("method", ["between_groups", "to_overall"])
def test_an_interval_is_that_of_fairlearns_gaps_of_the_same_draws(method: Any) -> None:
    right, examples, group = (
        np.array([9, 20, 7]),
        np.array([12, 22, 20]),
        ["a", "b", "c"],
    )
    frame = pd.DataFrame(
        {
            **{"round": 1, "part": "test", "client": np.nan, "attribute": "s"},
            **{"group": group, "examples": examples, "accuracy": right / examples},
        }
    )
    run: Any = SimpleNamespace(groups=frame, folder=Path("run"))
    found = group_gaps(run, "s", None, None, None, method, "mean", None, 9, 0.8, 4)
    cells = np.stack([right, examples - right], 1)
    shares = cells.ravel() / cells.sum()
    draws = generator(4, Purpose.BOOTSTRAP).multinomial(cells.sum(), shares, size=9)
    for kind in ("difference", "ratio"):
        gaps = []
        for counts in draws:
            hits = np.repeat(np.tile([1, 0], 3), counts)
            rates = fairlearn.MetricFrame(
                metrics=accuracy_score,
                **{"y_true": np.ones(len(hits)), "y_pred": hits},
                sensitive_features=np.repeat(np.repeat(group, 2), counts),
            )
            gaps.append(getattr(rates, kind)(method=method))
        expected = np.quantile(gaps, [0.1, 0.9])
        own = found.loc[f"accuracy_{kind}", ["low", "high"]]
        assert own.to_numpy(float) == pytest.approx(expected)


def only_men_are_positive(n: int = 240) -> DataSet:
    rng = np.random.default_rng(3)
    sex = np.arange(n) % 2
    x = rng.normal(size=(n, 2)).astype(np.float32)
    every = Examples(x, ((x[:, 0] > 0) & (sex == 1)).astype(int), {"sex": sex})
    train, test = every.take(slice(0, n - 80)), every.take(slice(n - 80, n))
    return DataSet("p", train, test, 2, attribute_names={"sex": ("f", "m")})


def test_a_gap_that_one_group_has_alone_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sexes = {"groups.attributes": ["sex"], "groups.intersections": False}
    sexes |= {"partition.name": "iid"}
    made = start(tmp_path / "a", only_men_are_positive(), **sexes)
    found = made.gaps("sex", resamples=50)
    none = ("equal_opportunity", "equalized_odds")
    for row, (value, low, high) in found.iterrows():
        if row.rpartition("_")[0] in none:
            assert np.isnan([value, low, high]).all()
        else:
            assert low <= value <= high
    why = "only m has positive examples on the test set, so there is no gap in equal"
    assert caplog.text.count(why) == 1
    assert "a gap needs two groups" in caplog.text
    overall = made.gaps("sex", agg="mean", method="to_overall", resamples=9)
    assert overall.loc["equalized_odds_difference"].isna().all()
    at = made.gaps("sex", client=0, resamples=20)
    assert at.loc[[f"{name}_ratio" for name in none]].isna().all(axis=None)
    assert at.loc["demographic_parity_difference"].notna().all()
    assert "only m has positive examples at client 0" in caplog.text
    summary = made.summary()
    assert summary["accuracy_gap"] is not None
    assert summary["demographic_parity_gap"] is not None
    assert [summary[f"{name}_gap"] for name in none] == [None, None]
    [line] = [line for line in made.warnings if line.startswith("sex: ")]
    assert line.startswith(f"sex: {why}")
    assert line.endswith("equalised odds; a gap needs two groups")
    frame = made.groups
    women = (frame["group"] == "f") & (frame["part"] == "test")
    frame.loc[women, ["tpr", "positives"]] = [0.5, 4.0]
    assert "positive examples on the test set" not in "".join(warnings_of(made))


@pytest.mark.parametrize(
    ("sizes", "least", "notes", "wanted"),
    [
        # Examples of f and m: of the test set, of what all clients hold out.
        ([(5, 5), (5, 5)], 1, [], []),
        ([(5, 5), (0, 0)], 1, [], []),  # Nothing is held out.
        (
            *([(5, 5), (0, 0)], 20, []),
            [
                "sex: no group has examples in the held-out data; a gap needs two "
                "groups; clients tell of no group below groups.min-size = 20"
            ],
        ),
        (
            *([(0, 5), (0, 5)], 1, []),
            [
                "sex: only m has examples on the test set; only m has examples in the "
                "held-out data; a gap needs two groups"
            ],
        ),
        (
            *([None, (0, 0)], 1, []),
            ["sex: no group has examples in the held-out data; a gap needs two groups"],
        ),
        (
            *([None, (5, 0, 5)], 3, []),
            [
                "sex: no example of m in the held-out data, so that gaps there are "
                "between the other groups; clients tell of no group below "
                "groups.min-size = 3"
            ],
        ),
        ([(5, 0, 5), (5, 0, 5)], 1, ["no training example is of group sex: m"], []),
        ([None, None], 1, [], ["sex: no group was measured in any round"]),
    ],
)
def test_what_is_not_measured_of_groups_is_a_line(
    tmp_path: Path, sizes: Any, least: int, notes: list[str], wanted: list[str]
) -> None:
    known = {"notes": notes, "grouped_by": ["sex"]}
    (tmp_path / "environment.json").write_text(json.dumps({"data": known}))
    (tmp_path / "config.toml").write_text(f"[groups]\nmin-size = {least}\n")
    (tmp_path / "rounds.csv").write_text("round,status\n1,ok\n")
    rows = [
        {"round": number, "part": part, "client": math.nan, "attribute": "sex"}
        # What was measured before is not looked at.
        | {"group": group, "examples": 0 if number == 0 else n}
        for number in (0, 1)
        for part, own in zip(("test", "held-out"), sizes, strict=True)
        for group, n in zip("fmx", own or (), strict=False)
    ]
    if rows:
        pd.DataFrame(rows).to_csv(tmp_path / "groups.csv", index=False)
    assert Run(tmp_path).warnings == [*wanted, *notes]


def test_groups_too_small_for_any_client_to_tell_are_a_line(tmp_path: Path) -> None:
    more = {"groups.min-size": 500, "run.rounds": 1, "groups.intersections": False}
    lines = start(tmp_path / "a", **more).warnings
    assert [line for line in lines if "min-size" in line] == [
        f"{name}: no group has examples in the held-out data; a gap needs two groups; "
        "clients tell of no group below groups.min-size = 500"
        for name in ("sex", "race")
    ]


def test_one_group_has_no_gap(tmp_path: Path) -> None:
    part = Examples(np.zeros((30, 2)), np.arange(30) % 2, {"sex": np.zeros(30, int)})
    data = DataSet("p", part, part, 2, attribute_names={"sex": ("f", "m")})
    made = start(
        tmp_path / "a",
        data,
        **{"groups.attributes": ["sex"], "groups.intersections": False},
    )
    with pytest.raises(DataError, match="sex: only f has examples on the test set"):
        made.gaps("sex")


def test_numbers_to_predict_have_no_such_gaps(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 2))
    part = Examples(x, x[:, 0], {"sex": np.array(["f", "m"] * 30)})
    data = DataSet("p", part, part, task="regression")
    made = start(
        tmp_path / "a",
        data,
        **{
            "partition.name": "iid",
            "groups.attributes": ["sex"],
            "groups.intersections": False,
        },
    )
    assert {"loss", "examples"} < {*made.groups}
    assert not {"accuracy", "tpr"} & {*made.groups}
    with pytest.raises(DataError, match=r"which this task has not.*Run\.groups"):
        made.gaps("sex")


def test_the_summary_has_the_largest_gaps(made: Run, tmp_path: Path) -> None:
    summary = made.summary()
    each = [made.gaps(name, resamples=0)["value"] for name in ("sex", "race")]
    for name in ("accuracy", "demographic_parity", "equal_opportunity"):
        largest = max(gaps[f"{name}_difference"] for gaps in each)
        assert summary[f"{name}_gap"] == largest
    plain = run(
        settings={"run.rounds": 1, "partition.clients": 2, "training.epochs": 1},
        out=tmp_path / "a",
        report=False,
        progress=False,
    )
    assert not [key for key in plain.summary() if key.endswith("_gap")]


def test_a_comparison_has_the_gaps(tmp_path: Path) -> None:
    found = compare(
        strategies=["fedavg", "qfedavg"],
        seeds=[0, 1],
        dataset=DATA,
        settings={**SETTINGS, "run.rounds": 1},
        out=tmp_path / "c",
        progress=False,
    )
    rows = found.summary.set_index(["metric", "strategy"])
    for attribute in ("sex", "race"):
        gaps = [
            found.run("qfedavg", seed).gaps(attribute, resamples=0)["value"]
            for seed in (0, 1)
        ]
        for name in ("accuracy", "equalized_odds"):
            row = rows.loc[(f"{name}_gap of {attribute}", "qfedavg")]
            expected = [own[f"{name}_difference"] for own in gaps]
            assert row["mean"] == pytest.approx(np.mean(expected))
            assert row["pairs"] == 2
            assert math.isfinite(row["difference_low"])
    # The largest would be another attribute's at another seed.
    assert not found.summary["metric"].str.endswith("_gap").any()
    assert found.ranking("accuracy_gap of sex").data_sets == 1
    assert "gap in equalized odds between groups of race" in str(found)
    assert Comparison(found.folder).cells.equals(found.cells)
    text = found.report().read_text("utf-8")
    for title in ("accuracy by sex", "equalized odds by race"):
        assert f"<h3>Accuracy against the gap in {title}</h3>" in text


def test_a_comparison_says_of_which_gaps_there_are_none(tmp_path: Path) -> None:
    found = compare(
        strategies=["fedavg", "qfedavg"],
        seeds=[0, 1],
        dataset=only_men_are_positive(),
        settings={
            **SETTINGS,
            "run.rounds": 1,
            "groups.attributes": ["sex"],
            "groups.intersections": False,
        },
        out=tmp_path / "c",
        progress=False,
    )
    gaps = [m for m in found.summary["metric"].unique() if m.endswith("_gap")]
    assert gaps == ["accuracy_gap", "demographic_parity_gap"]
    assert found.cells["equal_opportunity_gap"].isna().all()
    why = "sex: only m has positive examples on the test set, so there is no gap in"
    assert any(
        line.startswith(f"all strategies (all seeds): {why}") for line in found.warnings
    )
    rows = found.summary.set_index("metric")["note"]
    assert rows["accuracy_gap"].str.contains(f"seed 0: {why}", regex=False).all()
    assert (rows["test_accuracy"] == "").all()
    # Two seeds tell little of a mean, and of a share nothing is below 0 or above 1.
    wide = found.summary[["low", "high"]]
    assert (wide["low"] < 0).any()
    # The upper end of a difference has a sign.
    means = re.findall(r" (-?\d\S*) to (\d\S*)", str(found))
    assert len(means) == len(wide)
    assert all(0 <= float(low) <= float(high) <= 1 for low, high in means)
    assert "Intervals of shares are cut at 0 and 1; summary.csv has" in str(found)
