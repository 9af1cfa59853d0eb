"""Groups of sensitive attributes, from the data to groups.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedweight import Run, resume, run
from fedweight.clients import TrainingApp
from fedweight.clients.evaluation import sums_of_each
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, DataSet, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.metrics import Groups, Statistics, task_named

from .test_resume import written

QUICK: dict[str, Any] = {
    "run.rounds": 4,
    "run.checkpoint-rounds": 2,
    "data.name": "csv",
    "data.label": "label",
    "data.client": "site",
    "data.sensitive": ["sex", "old"],
    "partition.name": "natural",
    "partition.clients": 0,
    "model.name": "softmax",
    "training.epochs": 1,
    "engine.name": "local",
    "groups.intersections": True,
}
TESTED = ["round", "part", "attribute", "group"]


def write(path: Path, rows: int = 240, women_at_last_site: bool = True) -> Path:
    rng = np.random.default_rng(0)
    lines = ["dose,age,sex,old,site,label"]
    for k in range(rows):
        dose, site = rng.normal(), f"s{k % 4}"
        sex = "f" if rng.random() < 0.4 else "m"
        if site == "s3" and not women_at_last_site:
            sex = "m"
        old = int(rng.random() < 0.5)
        label = "yes" if dose + (sex == "m") + 0.3 * rng.normal() > 0.4 else "no"
        lines.append(f"{dose:.3f},{rng.normal():.3f},{sex},{old},{site},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "own.csv")


def start(file: Path, out: Path, **more: Any) -> Run:
    settings = {**QUICK, "data.path": str(file), **more}
    settings = {key: value for key, value in settings.items() if value is not None}
    return run(settings=settings, out=out, report=False, progress=False)


def test_a_csv_files_groups_are_recorded(file: Path, tmp_path: Path) -> None:
    result = start(file, tmp_path / "run")
    groups = result.groups
    assert set(groups["part"]) == {"held-out", "test"}
    assert groups["attribute"].unique().tolist() == ["sex", "old", "sex & old"]
    last = groups[groups["round"] == 4]
    rounds, clients = result.rounds.iloc[-1], result.clients
    clients = clients[clients["round"] == 4].set_index("client")
    test = last[(last["part"] == "test") & (last["attribute"] == "sex")]
    assert test["group"].tolist() == ["f", "m"]
    n = test["examples"].astype(float)
    assert (test["accuracy"] * n).sum() / n.sum() == pytest.approx(
        rounds["test_accuracy"]
    )
    assert (test["loss"] * n).sum() / n.sum() == pytest.approx(rounds["test_loss"])
    own = last[(last["part"] == "held-out") & (last["attribute"] == "sex & old")]
    each = own[own["client"].notna()]
    assert each["name"].tolist()[0] == "s0"
    for client, rows in each.groupby("client"):
        n = rows["examples"].astype(float)
        assert n.sum() == clients.loc[client, "held_out_examples"]
        mean = (rows["accuracy"] * n).sum() / n.sum()
        assert mean == pytest.approx(clients.loc[client, "accuracy"])
    everybody = own[own["client"].isna()].set_index("group")
    assert len(everybody) == 4
    for group, rows in each.groupby("group"):
        whole = everybody.loc[group]
        assert whole["examples"] == rows["examples"].sum()
        right = (rows["accuracy"] * rows["examples"].astype(float)).sum()
        assert whole["accuracy"] == pytest.approx(right / whole["examples"])


def test_one_text_names_several_columns(file: Path, tmp_path: Path) -> None:
    want = start(file, tmp_path / "want").groups
    by_text = {"data.sensitive": "sex,old"}
    pd.testing.assert_frame_equal(start(file, tmp_path / "a", **by_text).groups, want)
    named = {"groups.attributes": "sex, old"}
    found = start(file, tmp_path / "b", **named)
    pd.testing.assert_frame_equal(found.groups, want)
    assert found.config["groups"]["attributes"] == ["sex", "old"]
    one = {"groups.attributes": "sex", "groups.intersections": None}
    groups = start(file, tmp_path / "c", **one).groups
    assert groups["attribute"].unique().tolist() == ["sex"]


def test_a_column_with_a_comma_in_its_name_is_one(file: Path, tmp_path: Path) -> None:
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace("sex", '"sex,m"'), *lines[1:]]) + "\n")
    settings = {"data.sensitive": "sex,m", "groups.intersections": None}
    groups = start(file, tmp_path / "run", **settings).groups
    assert groups["attribute"].unique().tolist() == ["sex,m"]


def test_nothing_changes_where_no_groups_are_asked_for(
    file: Path, tmp_path: Path
) -> None:
    asked = start(file, tmp_path / "asked")
    without = start(
        file,
        tmp_path / "without",
        **{"data.sensitive": None, "groups.intersections": None},
    )
    assert not (without.folder / "groups.csv").exists()
    for name in ("rounds.csv", "clients.csv", "model.safetensors"):
        one, other = (r.folder / name for r in (asked, without))
        assert one.read_bytes() == other.read_bytes(), name
    with pytest.raises(DataError, match=r"groups\.csv is missing.*groups\.attributes"):
        _ = without.groups


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.parametrize(
    "more",
    [
        {"engine.plan": "batched-3"},
        {"engine.threads": 2},
        {"strategy.name": "flwr.serverapp.strategy:FedMedian"},
        pytest.param(
            {"engine.name": "ray", "engine.workers": 2}, marks=pytest.mark.ray
        ),
    ],
    ids=["at once", "threads", "Flower's", "ray"],
)
@pytest.mark.filterwarnings("ignore")  # Flower's own.
def test_groups_do_not_depend_on_who_adds_them_up(
    file: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    plain = {k: v for k, v in more.items() if k.startswith("strategy")}
    one, other = (
        start(file, tmp_path / "a", **plain),
        start(file, tmp_path / "b", **more),
    )
    if plain:
        assert len(one.groups) > 100
        assert one.groups["client"].notna().any()
    if "engine.plan" in more:  # The model is the same to rounding.
        pd.testing.assert_frame_equal(one.groups, other.groups, rtol=1e-4)
        return
    texts = [(r.folder / "groups.csv").read_bytes() for r in (one, other)]
    assert texts[0] == texts[1]


class Stopped(Exception):
    """Ends a run between two rounds."""


def test_a_run_that_was_stopped_goes_on_with_the_same_groups(
    file: Path, tmp_path: Path
) -> None:
    def stop(progress: Any) -> None:
        if progress.round == 3:
            raise Stopped

    settings = {**QUICK, "data.path": str(file)}
    with pytest.raises(Stopped):
        run(settings=settings, out=tmp_path / "run", report=False, progress=stop)
    before = Run(tmp_path / "run").groups
    assert before["round"].max() == 3  # More than the checkpoint has.
    resume(tmp_path / "run", report=False, progress=False)
    whole = start(file, tmp_path / "whole")
    there = (tmp_path / "run" / "groups.csv").read_bytes()
    assert there == (whole.folder / "groups.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # Flower's own.
@pytest.mark.parametrize(
    "engine", ["local", pytest.param("ray", marks=[pytest.mark.ray])]
)
@pytest.mark.parametrize("method", ["fedavg", "global-group-dro"])
def test_a_run_that_was_killed_goes_on_with_the_same_groups(
    file: Path, tmp_path: Path, killed: Any, method: str, engine: str
) -> None:
    settings = {**QUICK, "data.path": str(file), "run.rounds": 60}
    settings |= {"engine.name": engine, "strategy.name": method}
    if method == "global-group-dro":
        settings["strategy.group"] = "sex"
    if engine == "ray":
        settings["engine.workers"] = 2
    killed(tmp_path / "run", settings, 0.05)
    before = Run(tmp_path / "run")
    assert not before.complete
    assert before.groups["round"].max() < 60
    resume(tmp_path / "run", report=False, progress=False)
    whole = run(settings=settings, out=tmp_path / "whole", report=False, progress=False)
    assert written(tmp_path / "run") == written(whole.folder)
    assert "groups.csv" in written(whole.folder)


def test_the_model_of_a_run_that_ends_early_is_tested_by_group(
    file: Path, tmp_path: Path
) -> None:
    found = run(
        settings={**QUICK, "data.path": str(file), "run.evaluate-every": 4},
        out=tmp_path / "run",
        report=False,
        progress=False,
        callbacks=[lambda state: state.round == 2],
    )
    rows = found.groups
    assert rows[rows["part"] == "test"]["round"].unique().tolist() == [0, 2]
    n = rows[(rows["part"] == "test") & (rows["round"] == 2)]
    assert len(n) == 8
    assert not n.duplicated(TESTED).any()


# --------------------------------------------------------- what leaves the client


def reply_of(own: Mapping[str, Any], groups: Groups | None) -> dict[str, Any]:
    """Return the metrics of a client's reply to an evaluate message."""
    n = len(next(iter(own.values())))
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, n)
    part = Examples(rng.normal(size=(n, 2)).astype(np.float32), y, own)
    app = TrainingApp(
        lambda: torch.nn.Linear(2, 2),
        lambda context: ClientData(part, part),
        num_classes=2,
        groups=groups,
    )
    start = FlatRecord(FlatModule(torch.nn.Linear(2, 2)).save())
    with _flower.task_identity(run_id=0):
        context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
        content = RecordDict(
            {keys.ARRAYS: start, keys.CONFIG: ConfigRecord({keys.ROUND: 1})}
        )
        message = Message(content, dst_node_id=2, message_type="evaluate")
        reply = app(message, context)
    assert not reply.has_error(), reply.error
    [metrics] = reply.content.metric_records.values()
    return dict(metrics)


def test_a_small_group_does_not_leave_the_client() -> None:
    race = np.repeat([0, 1, 2], [4, 20, 30])
    groups = Groups({"race": ("a", "b", "c")}, min_size=10)
    metrics = reply_of({"race": race}, groups)
    assert set(metrics) == {"num-examples", "loss", "accuracy", "statistics"}
    which = Statistics(task_named("classification"), 2, groups=groups)
    sums, odd = which.read([metrics["statistics"]])
    assert not odd
    # Not even as what is left of all examples: 54 - 30 - 20 would be 4.
    assert sums["group-examples"].tolist() == [[0, 0, 30]]
    assert sums["group-loss"][0, :2].tolist() == [0, 0]
    assert not sums["group-confusion"][0, :2].any()
    assert sums["group-confusion"][0, 2].sum() == 30
    assert sums["examples"].tolist() == [54]
    open_groups = reply_of({"race": race}, groups.untold)
    sums, _ = which.read([open_groups["statistics"]])
    assert sums["group-examples"].tolist() == [[4, 20, 30]]


def test_a_client_sends_no_groups_unasked() -> None:
    metrics = reply_of({"race": np.array([0, 1])}, None)
    assert set(metrics) == {"num-examples", "loss", "accuracy"}


def test_the_least_size_holds_in_a_run(tmp_path: Path) -> None:
    file = write(tmp_path / "own.csv", rows=1200)
    settings = {"groups.min-size": 20, "groups.intersections": False}
    rows = start(file, tmp_path / "run", **settings).groups
    each = rows[rows["client"].notna()]
    assert len(each)
    assert each["examples"].min() >= 20
    free = start(file, tmp_path / "free", **{"groups.intersections": False}).groups
    assert free[free["client"].notna()]["examples"].min() < 20
    tested = [f[f["part"] == "test"].reset_index(drop=True) for f in (rows, free)]
    assert tested[0].equals(tested[1])


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({"groups.attributes": ["sx"]}, ["groups.attributes", "'sx'", "'sex'"]),
        ({"groups.attributes": ["dose"]}, ["'dose'", "no attribute"]),
        (
            {"data.sensitive": ["sex", "dose"], "groups.attributes": ["dose"]},
            ["'dose'", "different numbers", "ranges"],
        ),
        (
            {"groups.attributes": ["sex"]},
            ["groups.intersections crosses two", "'sex'"],
        ),
        (
            {
                "data.sensitive": None,
                "groups.intersections": None,
                "groups.min-size": 3,
            },
            ["groups.min-size is 3", "groups.attributes names no"],
        ),
        (
            {
                "data.sensitive": None,
                "groups.intersections": None,
                "strategy": {"name": "global-group-dro", "group": "sex"},
            },
            ["strategy.group: data 'own' have no attribute 'sex'", "data.sensitive"],
        ),
        (
            {
                "data.sensitive": "dose",
                "groups.intersections": None,
                "objective": {"name": "group-dro", "group": "dose"},
            },
            ["objective.group: ", "different numbers", "Put it into ranges"],
        ),
        (
            {"groups.intersections": None, "objective.name": "group-dro"},
            ["objective.group must name a sensitive attribute", "have old and sex"],
        ),
        ({"data.sensitive": "sex,odl"}, ["no column 'odl'", "Did you mean 'old'"]),
        ({"groups.positive": "maybe"}, ["no class 'maybe'", "no and yes"]),
        ({"groups.min-size": 0}, ["groups.min-size", "1"]),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    file: Path, tmp_path: Path, more: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises((ConfigurationError, DataError)) as caught:
        start(file, tmp_path / "run", **more)
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in texts), message
    assert not (tmp_path / "run").exists()


def test_a_group_that_a_client_or_everybody_lacks(tmp_path: Path) -> None:
    file = write(tmp_path / "own.csv", women_at_last_site=False)
    rows = start(file, tmp_path / "run", **{"groups.intersections": False}).groups
    own = rows[(rows["round"] == 4) & (rows["attribute"] == "sex")]
    assert own[own["name"] == "s3"]["group"].tolist() == ["m"]
    assert own[own["client"].isna() & (own["part"] == "held-out")][
        "group"
    ].tolist() == [*("f", "m")]

    everybody = np.zeros(40, np.int64)
    x = np.random.default_rng(0).normal(size=(40, 2))
    part = Examples(x, (x[:, 0] > 0).astype(int), {"sex": everybody})
    data = DataSet("p", part, part, 2, attribute_names={"sex": ("f", "m")})
    settings = {"run.rounds": 1, "partition.clients": 2, "groups.attributes": ["sex"]}
    found = run(
        dataset=data,
        settings=settings,
        out=tmp_path / "b",
        report=False,
        progress=False,
    )
    men = found.groups[(found.groups["group"] == "m") & (found.groups["round"] == 1)]
    assert men["part"].tolist() == ["held-out", "test"]
    assert (men["examples"] == 0).all()
    assert (
        men[["accuracy", "loss", "selection_rate", "tpr", "fpr"]].isna().all(axis=None)
    )
    assert "sex: m" in " ".join(found.warnings)


def test_a_client_with_one_class_has_the_rates_that_there_are(tmp_path: Path) -> None:
    y = np.repeat([0, 1], 30)
    x = np.random.default_rng(0).normal(size=(60, 2))
    own = {"sex": np.array(["f", "m"] * 30)}
    part = Examples(x, y, own)
    data = DataSet("p", part, part, 2, natural_clients=y)
    settings = {
        "run.rounds": 1,
        "partition.name": "natural",
        "partition.clients": 0,
        "groups.attributes": ["sex"],
        "data.proxy": 0.0,
    }
    found = run(
        dataset=data,
        settings=settings,
        out=tmp_path / "a",
        report=False,
        progress=False,
    )
    rows = found.groups[found.groups["client"].notna()].set_index("client")
    assert rows.loc[0, "tpr"].isna().all()
    assert rows.loc[0, "fpr"].notna().all()
    assert rows.loc[1, "fpr"].isna().all()
    assert rows.loc[1, "tpr"].notna().all()


def test_a_client_whose_sums_cannot_be_has_no_row() -> None:
    """See tests/metrics/test_groups.py for what cannot be."""
    which = Statistics(
        task_named("classification"), 2, groups=Groups({"s": ("f", "m")})
    )
    part = Examples(np.zeros((2, 2), np.float32), np.arange(2), {"s": np.arange(2)})
    module = FlatModule(torch.nn.Linear(2, 2))
    sums = sums_of_each(module, module.save(), [part, part], which)
    rows = which.rows(sums)
    rows[0, -1] = 1e6
    found, odd = which.read(rows.tolist())
    assert set(odd) == {0}
    assert which.groups is not None
    assert {client for client, _ in which.groups.rows(found)} == {1}


# ---------------------------------------------------------------- bias on purpose


def test_labels_flipped_on_purpose_are_recorded_as_clients_have_them(
    file: Path, tmp_path: Path
) -> None:
    bias = {"bias.attribute": "sex", "bias.flip-rates": [0.9, 0.0]}
    one, other = start(file, tmp_path / "a"), start(file, tmp_path / "b", **bias)
    found = [r.groups.query("round == 4 and attribute == 'sex'") for r in (one, other)]
    plain, wrong = (f[f["part"] == "test"].set_index("group") for f in found)
    assert wrong["positives"].equals(plain["positives"])
    plain, wrong = (
        f[(f["part"] == "held-out") & f["client"].isna()].set_index("group")
        for f in found
    )
    assert wrong.loc["m", "positives"] == plain.loc["m", "positives"]
    assert wrong.loc["f", "positives"] != plain.loc["f", "positives"]
    assert not one.partition.equals(other.partition)


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ({"bias.attribute": "sex"}, ["[bias]", "no flip-rates"]),
        (
            {"bias.flip-rates": [0.1, 0.0]},
            ["must be 1", "all examples", "name their attribute"],
        ),
        ({"bias.strength": 0.5}, ["[bias]", "no flip-rates"]),
        ({"bias.attribute": "sex", "bias.flip-rates": [0.1]}, ["must be 2", "f and m"]),
        ({"bias.attribute": "sx", "bias.flip-rates": [0.1]}, ["Did you mean 'sex'"]),
        ({"bias.attribute": "sex", "bias.flip-rates": [1.1, 0]}, ["bias.flip-rates"]),
    ],
)
def test_a_bias_that_cannot_be_is_one_line(
    file: Path, tmp_path: Path, more: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises((ConfigurationError, DataError)) as caught:
        start(file, tmp_path / "run", **more)
    message = str(caught.value)
    assert "\n" not in message
    assert all(text in message for text in texts), message
