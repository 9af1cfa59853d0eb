"""Hundreds of data files and simulation files that nobody wrote by hand.

Each ends well, with a summary that says what was written, or in one line that says why
not: never in a traceback, in a file that never ends, or with half a folder.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight import data
from fedweight.cli import main
from fedweight.core.errors import FedweightError
from fedweight.studies import check_file

FILES = {"rounds.csv", "clients.csv", "timings.csv", "partition.csv", "config.toml"}
FILES |= {"environment.json", "model.safetensors", "report.html"}


@dataclass
class Made:
    """A file, the settings that read it, and what it holds."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    clients: dict[str, int] = field(default_factory=dict)
    columns: int = 0
    fault: str = ""
    odd: str = ""  # the key of a simulation file that is none, or does not fit
    sure: bool = True  # whether the fault must be found


TEXTS = ("red", "green", "blue", "très bon", "a b", 'say "x"', "None", "x;y", "x,y")
FAULTS = (
    *("", "", "", "", "", "", "missing", "mark", "long row", "short row", "infinite"),
    *("quantity", "one class", "names", "identity", "spaces", "nul", "binary", "quote"),
    *("empty", "no rows", "no header", "other separator", "comma", "encoding"),
    *("twice", "no such label", "huge", "cut"),
)


def make_csv(rng: random.Random, path: Path, faults: Any = FAULTS) -> Made:
    """Write a CSV file, right or with one fault."""
    made = Made(path, fault=rng.choice(faults))
    made.rows = n = rng.randint(12, 80)
    made.sure = made.fault not in ("cut", "huge", "encoding", "twice", "short row")
    columns: dict[str, list[Any]] = {}
    for k in range(rng.randint(1, 5)):
        kind = rng.choice(["float", "float", "int", "texts", "flag", "constant"])
        name = rng.choice(["x", "Größe", "a b", "size (cm)", "X"]) + str(k)
        if kind == "float":
            scale = 10.0 ** rng.randint(-3, 5)
            columns[name] = [round(rng.gauss(0, 1) * scale, 6) + 0.5 for _ in range(n)]
        elif kind == "int":
            columns[name] = [rng.randint(-3, 9) for _ in range(n)]
        elif kind == "texts":
            texts = rng.sample(TEXTS, rng.randint(2, 5))
            columns[name] = [rng.choice(texts) for _ in range(n)]
        elif kind == "flag":
            columns[name] = [rng.random() < 0.5 for _ in range(n)]
        else:
            columns[name] = [rng.choice([1.5, 0])] * n
    names = rng.choice([(0, 1, 2), ("a", "b"), (True, False), ("ill", "None", "well")])
    labels = [names[i % len(names)] for i in range(n)]
    rng.shuffle(labels)
    if rng.random() < 0.5:
        sites = [rng.choice(["north", "south", "Älv"]) for _ in range(n)]
        columns["site"] = sites
        made.settings["data.client"] = "site"
        made.clients = dict(Counter(sites))
    label = rng.choice(["label", "y", "diagnosis"])
    columns[label] = labels
    if rng.random() < 0.5:
        order = rng.sample(list(columns), len(columns))
        columns = {name: columns[name] for name in order}
    made.settings["data.label"] = label
    made.classes = {str(name): count for name, count in Counter(labels).items()}
    made.columns = len(columns)
    _spoil(rng, made, columns, label)

    sep = rng.choice([",", ",", ";", "\t", "|"])
    decimal = rng.choice([".", ","]) if sep != "," else "."
    header = rng.random() < 0.85 or made.fault in ("twice", "no such label")
    if made.fault == "no header":
        header = False
    if made.fault == "other separator":
        sep = rng.choice([";", "\t", "|"])
    if made.fault == "comma":
        sep, decimal = ";", ","
        columns["z"] = [rng.gauss(0, 1) + 0.25 for _ in range(n)]
    encoding = rng.choice(
        ["utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"]
    )
    if made.fault == "encoding":
        encoding = rng.choice(["utf-16", "cp1252"])
    _write(rng, made, columns, sep, decimal, header, encoding)
    if sep != "," and made.fault != "other separator":
        made.settings["data.sep"] = sep
    if decimal != "." and made.fault != "comma":
        made.settings["data.decimal"] = decimal
    if not encoding.startswith("utf-8") and made.fault != "encoding":
        made.settings["data.encoding"] = encoding
    if not header:
        if made.fault != "no header":
            made.settings["data.header"] = False
            place = {name: str(k) for k, name in enumerate(columns)}
            made.settings["data.label"] = place[label]
            if made.clients:
                made.settings["data.client"] = place["site"]
        else:  # Found where a line of data looks like one.
            made.sure = False
    return made


def _spoil(
    rng: random.Random, made: Made, columns: dict[str, list[Any]], label: str
) -> None:
    """Change some values so that the file has its fault."""
    n, row = made.rows, rng.randrange(made.rows)
    if made.fault == "missing":
        columns[rng.choice(list(columns))][row] = rng.choice(["", "NA", "nan", "null"])
    elif made.fault == "mark":
        columns["z"] = [round(rng.gauss(0, 1), 4) for _ in range(n)]
        columns["z"][row] = rng.choice(["?", "-", "n.a.", "unknown"])
        made.sure = n > 20
    elif made.fault == "infinite":
        columns["z"] = [rng.random() for _ in range(n)]
        columns["z"][row] = rng.choice(["inf", "-Infinity", "1e999"])
    elif made.fault == "quantity":
        columns[label] = [rng.gauss(0, 1) for _ in range(n)]
    elif made.fault == "one class":
        columns[label] = ["only"] * n
    elif made.fault == "names":
        columns[label] = [f"p{i}" for i in range(n)]
    elif made.fault == "identity":
        columns["id"] = [f"p{i:03}" for i in range(n)]
    elif made.fault == "spaces":
        columns[label] = [("a", "a ", "b")[i % 3] for i in range(n)]
    elif made.fault == "huge":
        columns["z"] = [1e300 * i for i in range(n)]
        made.settings["data.standardise"] = False
    elif made.fault == "no such label":
        made.settings["data.label"] = "lable"
    elif made.fault == "twice":
        made.settings["data.label"] = "w"


def _write(
    rng: random.Random,
    made: Made,
    columns: dict[str, list[Any]],
    sep: str,
    decimal: str,
    header: bool,
    encoding: str,
) -> None:
    def cell(value: Any) -> str:
        return str(value).replace(".", decimal) if type(value) is float else str(value)

    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    end = rng.choice(["\n", "\r\n"])
    writer = csv.writer(out, delimiter=sep, quoting=quoting, lineterminator=end)
    lines = [[cell(column[i]) for column in columns.values()] for i in range(made.rows)]
    names = list(columns)
    if made.fault == "twice":
        names = ["w", "w", *names]
        lines = [["1", "2", *line] for line in lines]
    if made.fault == "long row":
        lines[rng.randrange(made.rows)] += ["1"]
    if made.fault == "short row":
        lines[rng.randrange(made.rows)].pop()
        made.sure = len(names) > 1
    if made.fault == "no rows":
        lines = []
        header = True
    if header:
        writer.writerow(names)
    writer.writerows(lines)
    text = "" if made.fault == "empty" else out.getvalue()
    if rng.random() < 0.3:
        text = text.rstrip("\r\n")
    content = text.encode(encoding, "replace")
    if made.fault == "nul":
        content += "\0".encode(encoding) + b"\0" * 8
    elif made.fault == "binary":
        starts = [b"PK\x03\x04", b"\x89PNG\r\n", b"\x1f\x8b"]
        content = rng.choice(starts) + rng.randbytes(99)
    elif made.fault == "quote":
        content += ('1"' + sep + '"x').encode(encoding)
    elif made.fault == "cut":
        content = content[: rng.randrange(len(content))]
    made.path.write_bytes(content)


def look(made: Made) -> tuple[Any, list[str]]:
    """Check a file as the command does; return what was found, and what is refused."""
    try:
        checked = check_file(made.path, made.settings)
    except FedweightError as error:
        return None, [str(error)]
    json.dumps(checked.to_dict(), allow_nan=False)
    assert all("\n" not in line for line in checked.lines())
    return checked, checked.refused


def agrees(made: Made, facts: dict[str, Any]) -> None:
    """Compare a summary with what was written."""
    assert facts["rows"] == made.rows
    assert facts["classes"] == made.classes
    assert len(facts["columns"]) >= made.columns
    assert all(column["missing"] == 0 for column in facts["columns"])
    if made.clients:
        assert facts["clients"]["sizes"] == made.clients


@pytest.mark.parametrize("part", range(3))
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_data_file_is_understood_or_refused_in_one_line(tmp_path_factory, part, seed):
    path = tmp_path_factory.mktemp("f") / "own.csv"
    made = make_csv(random.Random(3 * seed + part), path)
    checked, refused = look(made)
    for line in refused:
        assert "\n" not in line
        assert len(line) < 1500
    options = {
        key.removeprefix("data.").replace("-", "_"): value
        for key, value in made.settings.items()
    }
    loaded, reason = None, ""
    try:
        loaded = data.load("csv", made.path, **options)
    except FedweightError as error:
        reason = str(error)
    if loaded is None:
        # The same words from the check and from a run.
        assert refused[:1] == [reason]
        assert made.fault, f"a right file was refused: {reason}"
        return
    assert not refused
    assert not (made.fault and made.sure), f"not found: {made.fault}"
    if made.fault in ("", "comma", "huge", "encoding", "mark"):
        agrees(made, checked.facts)
    assert loaded.num_classes == len(checked.facts["classes"])


def make_simulation(rng: random.Random, folder: Path) -> tuple[Path, Made]:
    """Write a simulation file over a CSV file; some keys are none, or do not fit."""
    right = [""] * len(FAULTS)
    made = make_csv(rng, folder / "own.csv", [*FAULTS, *right])
    table = {key.removeprefix("data."): value for key, value in made.settings.items()}
    tables: dict[str, dict[str, Any]] = {
        "run": {"rounds": 1, "name": rng.choice(["a", "é", "x/y"])},
        "data": {"name": "csv", "path": "own.csv", **table},
        "partition": {
            "name": rng.choice(["iid", "dirichlet", "quantity", "natural", "shards"]),
            "clients": rng.choice([0, 1, 1, 2, 2, 5]),
        },
        "model": {"name": rng.choice(["softmax", "mlp", "mlp", "mlp", "cnn"])},
        "training": {"epochs": 1, "batch-size": rng.choice([1, 8, 1000])},
        "strategy": {"name": rng.choice(["fedavg", "feddisco", "ida", "fedprox"])},
        "engine": {"name": "local", "plan": rng.choice(["loop", "auto", "batched-2"])},
    }
    partition, natural = tables["partition"], tables["partition"]["name"] == "natural"
    if tables["model"]["name"] == "cnn":
        made.odd = "model.name"
    elif natural and not made.clients:
        made.odd = "partition.name"
    elif not natural and partition["clients"] == 0:
        made.odd = "partition.clients"
    if rng.random() < 0.3:
        name = rng.choice(list(tables))
        key = rng.choice([*tables[name], "seed", "x"])
        odd = [0, -1, 10**30, 1e308, "", "x:y", "builtins:dict", [1], True, 2**62]
        tables[name][key] = rng.choice(odd)
        made.odd = f"{name}.{key}"
    file = folder / "own.toml"
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return file, made


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_simulation_file_is_ready_or_refused_in_one_line(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("s")
    file, made = make_simulation(random.Random(seed), folder)
    try:
        checked = check_file(file)
        refused = checked.refused
    except FedweightError as error:
        refused = [str(error)]
    assert len(refused) <= 1
    for line in refused:
        assert "\n" not in line
        assert len(line) < 1500
    assert not refused or made.fault or made.odd, f"refused: {refused}"
    if not refused and not made.fault:
        assert len(checked.facts["columns"]) == made.columns
        assert set(checked.facts["classes"]) == set(made.classes)
    assert {path.name for path in folder.iterdir()} == {"own.csv", "own.toml"}


@dataclass
class Ended:
    """What the command line returned, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Give the command line, in the test's folder; what it does not catch is raised."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ended:
        return Ended(main(arguments), *capsys.readouterr())

    return call


def ended_well(done: Ended) -> bool:
    """Tell success from a refusal; there is nothing else."""
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    if done.returncode:
        last = done.stderr.splitlines()
        assert len([line for line in last if line.startswith("fedweight: ")]) == 1
    return done.returncode == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(20))
def test_a_data_file_as_a_command(tmp_path, command, seed):
    made = make_csv(random.Random(seed), tmp_path / "own.csv")
    given = [f"--set={key}={json.dumps(v)}" for key, v in made.settings.items()]
    done = command("check", "own.csv", "--json", *given)
    if ended_well(done):
        facts = json.loads(done.stdout)
        if not made.fault:
            agrees(made, facts)
    else:
        assert made.fault
    assert {path.name for path in tmp_path.iterdir()} == {"own.csv"}


SEEDS = range(5, 15)


def test_some_simulation_files_are_right(tmp_path):
    made = [make_simulation(random.Random(seed), tmp_path)[1] for seed in SEEDS]
    assert sum(not (one.fault or one.odd) for one in made) >= 3


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_simulation_file_as_a_command(tmp_path, command, seed):
    file, made = make_simulation(random.Random(seed), tmp_path)
    done = command("run", file.name, "--json", "--out", "out")
    if ended_well(done):
        summary = json.loads(done.stdout)
        assert (summary["rounds"], summary["failed_rounds"]) == (1, 0)
        assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    else:
        assert made.fault or made.odd, done.stderr
        assert done.stdout == ""
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.part"))
