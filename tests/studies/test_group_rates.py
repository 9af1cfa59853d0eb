"""How groups fare in a comparison: means over its seeds, and who does worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedweight.core.errors import DataError
from fedweight.studies.comparison import PLAN, Comparison
from fedweight.studies.comparison_report import render
from fedweight.studies.plots import comparing
from fedweight.studies.summarizing import reached, write_comparison

from .test_comparison_report import figures, table_of

HEADER = (
    "round,part,client,attribute,group,examples,accuracy,positives,selection_rate,tpr,"
    "fpr,loss"
)
# Accuracy and true positive rate of f and m, by strategy and seed.
RATES = {
    "fedavg": [((0.6, 0.8), (0.5, 0.9)), ((0.7, 0.8), (0.6, 0.6)), ((0.8, 0.5), None)],
    "ida": [((0.7, 0.7), (0.5, 0.6)), ((0.6, 0.8), (0.6, 0.5)), ((0.5, 0.6), None)],
}


def table(accuracies: Any, tprs: Any) -> str:
    lines = [HEADER]
    for k, group in enumerate("fm"):
        tpr = "" if tprs is None else tprs[k]
        # The clients', a client's and an earlier round's are others.
        lines += [
            f"{number},{part},{client},sex,{group},10,{own},5,0.5,{tpr},{fpr},0.5"
            for number, part, client, own, fpr in (
                (1, "test", "", 0.1, 0.1),
                (3, "held-out", "", 0.2, 0.2),
                (3, "held-out", 0, 0.3, 0.3),
                (3, "test", "", accuracies[k], 0.4 - 0.1 * k),
            )
        ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def found(make_run: Any, tmp_path: Path) -> Comparison:
    cells = []
    for strategy, several in RATES.items():
        for seed, rates in enumerate(several):
            folder = make_run(f"{strategy}-seed{seed}")
            (folder / "groups.csv").write_text(table(*rates))
            path = folder / "environment.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            known["data"] = {**known.get("data", {}), "clients": 7}
            known["data"] |= {"grouped_by": ["sex"], "class_names": ["no", "yes"]}
            path.write_text(json.dumps(known))
            cell = {"strategy": strategy, "data": "digits", "seed": seed}
            cell |= {"candidate": "", "folder": folder.name}
            cells.append(cell | reached(folder))
    plan = {"strategies": [*RATES], "data-sets": ["digits"], "seeds": [0, 1, 2]}
    (tmp_path / PLAN).write_text(tomli_w.dumps({"comparison": plan}))
    write_comparison(tmp_path, cells)
    return Comparison(tmp_path)


def test_groups_have_means_over_the_seeds(found: Comparison) -> None:
    rows = found.groups.set_index(["rate", "strategy", "group"])
    assert set(found.groups["attribute"]) == {"sex"}
    own = rows.loc[("accuracy", "fedavg", "f")]
    assert (own["n"], own["mean"]) == (3, pytest.approx(0.7))
    # Student's interval of 0.6, 0.7 and 0.8, as scipy.stats has it.
    assert own["low"] == pytest.approx(0.7 - 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    assert own["high"] == pytest.approx(0.7 + 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    worst = rows["worst"].to_dict()
    # Women with two seeds, men with the third; where both are alike nobody is.
    assert worst["accuracy", "fedavg", "f"] == 2
    assert worst["accuracy", "fedavg", "m"] == 1
    assert worst["accuracy", "ida", "f"] == 2
    assert worst["accuracy", "ida", "m"] == 0
    # A rate that is not there is not 0.
    assert rows.loc[("tpr", "fedavg", "f"), "n"] == 2
    assert worst["tpr", "fedavg", "f"] == 1
    assert worst["tpr", "fedavg", "m"] == 0
    # Of false positives more is worse.
    assert worst["fpr", "ida", "f"] == 3
    assert worst["fpr", "ida", "m"] == 0


def test_the_report_says_who_is_worse_off(found: Comparison) -> None:
    text = render(found)
    header, fedavg, ida = table_of(text, "Accuracy by sex")
    assert header == ["strategy", "lowest", "f", "95% interval", "m", "95% interval"]
    assert fedavg[:4] == ["fedavg", "f, in 2 of 3", "0.7000", "0.4516 to 0.9484"]
    assert ida[:3] == ["ida", "f, in 2 of 3", "0.6000"]
    header, *_ = table_of(text, "False positive rate of class yes by sex")
    assert header[1] == "highest"
    assert "<dt>clients</dt><dd>7</dd>" in text


def test_a_gap_says_between_whom_and_of_which_class(found: Comparison) -> None:
    text = render(found)
    for shown in (str(found), text):
        title = "ap in accuracy between groups of sex (less is better)"
        assert title in shown
        assert "Gaps in rates are of class yes: " in shown
    assert "Accuracy against the gap in accuracy by sex" in figures(text)


def test_without_groups_it_says_what_to_name(found: Comparison) -> None:
    for folder in found.cells["folder"]:
        (found.folder / folder / "groups.csv").unlink()
    with pytest.raises(DataError, match=r"data\.sensitive or groups\.attributes"):
        _ = found.groups
    assert "who is worse off" not in render(found)


def test_names_are_broken_where_their_parts_meet() -> None:
    assert comparing._wrapped("fedavg+plain") == ["fedavg+plain"]
    assert comparing._wrapped("global-group-dro:group=sex+plain") == [
        "global-group-dro:",
        "group=sex+plain",
    ]
    long = "a-name-of-its-own-without-any-part"
    assert comparing._wrapped(long) == [long]
