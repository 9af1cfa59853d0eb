"""`fedweight check`: what a run would say of a file, before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedweight import data
from fedweight.cli import main
from fedweight.core.errors import (
    ConfigurationError,
    DataError,
    FedweightError,
    OutputError,
)
from fedweight.studies import check_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def patients(tmp_path):
    path = tmp_path / "patients.csv"
    lines = ["age,dose,sex,site,outcome"]
    for i in range(60):
        site = ("a", "b", "b", "c", "c", "c")[i % 6]
        lines.append(f"{20 + i % 50},{i % 7 * 0.5},{'fm'[i % 2]},{site},{i % 3}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_a_csv_file_holds(patients):
    checked = check_file(
        patients,
        {"data.client": "site", "data.sensitive": "sex", "data.label": "outcome"},
    )
    facts = checked.facts
    assert checked.refused == checked.notes == []
    assert (facts["kind"], facts["rows"]) == ("CSV", 60)
    assert facts["classes"] == {"0": 20, "1": 20, "2": 20}
    assert facts["clients"] == {
        **{"column": "site", "number": 3, "smallest": 10, "largest": 30},
        **{"median": 20.0, "sizes": {"a": 10, "b": 20, "c": 30}},
    }
    assert facts["groups"] == {"sex": {"f": 30, "m": 30}}
    assert facts["inputs"] == "[4] of float32"
    columns = {column["name"]: column for column in facts["columns"]}
    assert columns["age"] == {
        **{"name": "age", "role": "feature", "type": "whole numbers", "different": 50},
        **{"missing": 0, "from": 20.0, "to": 69.0, "std": columns["age"]["std"]},
    }
    assert columns["sex"]["role"] == "feature, sensitive"
    assert columns["sex"]["most"] in ("f", "m")
    assert (columns["site"]["role"], columns["outcome"]["role"]) == ("client", "label")
    text = "\n".join(checked.lines())
    assert "clients: column 'site', 3 clients of 10 to 30 examples, median 20" in text
    assert "label 'outcome': 3 classes; 0: 20, 1: 20 and 2: 20" in text
    assert "groups by 'sex'; f: 30 and m: 30" in text
    assert text.endswith("nothing here would be refused")


def test_only_what_makes_groups_is_shown_as_groups(patients):
    frame = patients.read_text().splitlines()
    old = ["old", *(f"{float(k % 2)}" for k in range(len(frame) - 1))]
    lines = [f"{a},{b}" for a, b in zip(frame, old, strict=True)]
    patients.write_text("\n".join(lines) + "\n")
    named = {"data.label": "outcome", "data.sensitive": "sex,age,old"}
    checked = check_file(patients, named)
    sizes = {"sex": {"f": 30, "m": 30}, "old": {"0": 30, "1": 30}}
    assert checked.facts["groups"] == sizes
    text = "\n".join(checked.lines())
    assert "groups by 'old'; 0: 30 and 1: 30" in text
    assert "groups by 'age'" not in text
    assert "column 'age' has 50 different values, which make no groups" in text


def test_what_a_run_refuses_is_refused_with_the_same_words(patients):
    with pytest.raises(DataError) as run:
        data.load("csv", patients, label="age")
    checked = check_file(patients, ["data.label=age"])
    assert checked.refused == [str(run.value)]
    assert checked.facts["columns"][0]["different"] == 50
    assert f"refused: {run.value}" in "\n".join(checked.lines())


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    path = tmp_path / "own.csv"
    body = "".join(f"{i}.5,id{i},{i * 0.37}\n" for i in range(40))
    path.write_text("a,id,y\n?,idx,1\n" + body)
    refused = check_file(path).refused
    assert len(refused) == 3
    assert ["'a'" in refused[0], "'id'" in refused[1], "'y'" in refused[2]] == [
        True
    ] * 3


def test_missing_values_are_counted_where_they_are_refused(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("a,b,y\n,1,0\n1,,1\n,inf,0\n" + "1,2,1\n3,4,0\n2,2,1\n" * 3)
    checked = check_file(path)
    assert "column 'a' has no finite value in data row 1" in checked.refused[0]
    missing = {c["name"]: c["missing"] for c in checked.facts["columns"]}
    assert missing == {"a": 2, "b": 2, "y": 0}
    dropped = check_file(path, {"data.drop-missing": True, "data.drop": ["b"]})
    assert dropped.refused == []
    assert dropped.facts["dropped_rows"] == 2
    assert "left out 2 of 12 rows" in dropped.notes[0]


def test_the_scale_is_noted(tmp_path):
    path = tmp_path / "own.csv"
    body = "".join(f"{i % 7},{i * 90001 % 99991}.5,{i % 2}\n" for i in range(150))
    path.write_text("a,b,y\n" + body)
    assert check_file(path).notes == []
    (note,) = check_file(path, {"data.standardise": False}).notes
    assert "feature 'b' is" in note


def test_arrays(tmp_path):
    path = tmp_path / "own.npz"
    x, y = np.ones((30, 1, 4, 4)), np.arange(30) % 3
    np.savez(path, x=x, y=y, client=np.repeat(["north", "south"], [20, 10]))
    facts = check_file(path).facts
    assert facts["inputs"] == "[1, 4, 4] of float32"
    assert facts["classes"] == {"0": 10, "1": 10, "2": 10}
    assert facts["clients"]["sizes"] == {"north": 20, "south": 10}
    np.savez(path, x=x, y=y - 1)
    assert "labels reach from -1" in check_file(path).refused[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["run.rounds=3"], r"read by the keys of \[data\], got 'run.rounds'"),
        (["data.lable=age"], "data has no key 'lable'. Did you mean 'label'"),
        (["data.header=3"], "data.header must be true or false"),
        (["data"], r"must be written table.key=value"),
        (["data.label=a\0"], "must not hold NUL"),
    ],
)
def test_a_wrong_setting_is_refused_as_in_a_file(patients, settings, reason):
    with pytest.raises(ConfigurationError, match=reason):
        check_file(patients, settings)


def test_settings_of_a_run_that_are_not_about_the_file_are_passed_over(patients):
    settings = {"data.name": "csv", "data.held-out": 0.1, "data.proxy": 0.5}
    assert check_file(patients, settings).refused == []


# ------------------------------------------------------------------- one site's file


def test_keys_that_are_not_of_a_file_may_be_written_in_pythons_way():
    given = {"data.label": "diagnosis", "data.held_out": 0.1}
    assert check_file("simulations/own_data.csv", given).refused == []


def test_a_schema_goes_from_site_to_site(tmp_path, patients):
    server = tmp_path / "server.csv"
    server.write_text("age,dose,outcome\n50,1,0\n60,2,1\n70,3,2\n")
    schema = tmp_path / "schema.json"
    written = check_file(server, write_schema=schema)
    assert written.facts["schema"] == str(schema)
    assert json.loads(schema.read_text()) == {
        "source": "server.csv",
        "label": "outcome",
        "classes": ["0", "1", "2"],
        "columns": {"age": "number", "dose": "number"},
        "shape": [2],
        "groups": {},
    }
    site = tmp_path / "site.csv"
    site.write_text("outcome,dose,age\n1,2,60\n0,1,50\n")
    checked = check_file(site, schema=schema)
    assert checked.refused == []
    assert checked.facts["classes"] == {"0": 1, "1": 1, "2": 0}
    roles = [column["role"] for column in checked.facts["columns"]]
    assert roles == ["label", "feature", "feature"]
    (refusal,) = check_file(patients, schema=schema).refused
    assert "it has 'sex' and 'site' besides" in refusal
    site.write_text("outcome,dose,age\n1,2,60\n3,1,50\n")
    assert "holds 3, which is none of" in check_file(site, schema=schema).refused[0]


def test_a_sites_file_is_read_as_a_node_reads_it(tmp_path, patients):
    (refusal,) = check_file(patients, write_schema=tmp_path / "s.json").refused
    assert "column 'sex' is not numeric" in refusal
    assert not (tmp_path / "s.json").exists()
    settings = {"data.drop": ["sex", "site"], "data.standardise": False}
    checked = check_file(patients, settings, write_schema=tmp_path / "s.json")
    assert checked.refused == []


def test_a_schema_of_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((4, 1, 8, 8)), y=np.array([0, 1, 2, 1]))
    check_file(path, write_schema=tmp_path / "s.json")
    assert check_file(path, schema=tmp_path / "s.json").refused == []
    np.savez(path, x=np.ones((4, 1, 9, 9)), y=np.array([0, 1, 2, 1]))
    assert "has shape" in check_file(path, schema=tmp_path / "s.json").refused[0]


def test_where_no_schema_can_be(tmp_path, patients):
    for wrong in (tmp_path / "none" / "s.json", tmp_path):
        with pytest.raises(OutputError, match=r"cannot be written: [A-Z]"):
            check_file(patients, {"data.drop": ["sex", "site"]}, write_schema=wrong)
    with pytest.raises(ConfigurationError, match="a schema is of one data file"):
        check_file(ROOT / "simulations" / "quickstart.toml", schema="s.json")
    with pytest.raises(DataError, match="it does not exist"):
        check_file(patients, schema=tmp_path / "none.json")


# ---------------------------------------------------------------- simulation files


def test_a_simulation_file(tmp_path):
    checked = check_file(ROOT / "simulations" / "quickstart.toml")
    assert checked.refused == checked.notes == []
    assert checked.facts["clients"]["number"] == 20
    assert checked.facts["run"]["parameters"] == 9610
    assert {"objective: plain", "personal: none"} <= {*checked.lines()}
    assert not list(tmp_path.iterdir())


def test_a_simulation_file_of_a_csv_file_tells_its_columns():
    checked = check_file(
        ROOT / "simulations" / "own_data.toml", ["partition.clients=5"]
    )
    assert checked.refused == []
    assert checked.facts["kind"] == "simulation file"
    assert len(checked.facts["columns"]) == 31
    assert checked.facts["classes"] == {"benign": 357, "malignant": 212}
    assert checked.facts["clients"]["number"] == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[partition]\nclients = 100000\n", "at most 14080"),
        ("[strategy]\nmin-train-nodes = 5000\n", "strategy.min-train-nodes is 5000"),
        ("[engine]\nname = 'local'\naddress = 'auto'\n", "address is 'auto'"),
        ("[engine]\nplan = 'batched-1'\n", "engine.plan must be"),
        ("[model]\nname = 'char-gru'\n", "cannot take an example|takes texts"),
        ("[data]\nname = 'csv'\npath = 'none.csv'\n", "none.csv does not exist"),
        ("[server]\nname = 'collections:OrderedDict'\n", "server.name"),
    ],
)
def test_what_a_run_of_a_simulation_file_would_refuse(tmp_path, text, reason):
    file = tmp_path / "own.toml"
    file.write_text(text)
    try:
        refused = check_file(file).refused
    except FedweightError as error:
        refused = [str(error)]
    assert len(refused) == 1
    assert any(words in refused[0] for words in reason.split("|")), refused


# -------------------------------------------------------------------- the command


def test_the_command_prints_and_refuses_in_one_line(patients, capsys):
    assert main(["check", str(patients)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"{patients}: CSV, 60 rows, 5 columns\n")
    assert main(["check", str(patients), "--set", "data.label=age", "--json"]) == 2
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == f"fedweight: {printed['refused'][0]}\n"
    assert main(["check", "none.csv"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "fedweight: none.csv does not exist. Give the path of a .csv file.\n"


def test_the_command_reads_and_writes_schemas(patients, tmp_path, capsys):
    schema = str(tmp_path / "s.json")
    drop = ["--set", 'data.drop=["sex", "site"]']
    assert main(["check", str(patients), "--write-schema", schema, *drop]) == 0
    assert main(["check", str(patients), "--schema", schema, *drop]) == 0
    capsys.readouterr()
    assert main(["check", str(patients), "--schema", schema]) == 2
    assert "'sex' and 'site' besides" in capsys.readouterr().err


def test_a_data_file_is_looked_at_without_torch_and_flower(patients):
    code = (
        "import sys; from fedweight.cli import main; "
        f"main(['check', {str(patients)!r}]); "
        "print([m for m in ('torch', 'flwr', 'ray') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
