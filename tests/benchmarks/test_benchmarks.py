import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(program, *arguments, file):
    subprocess.run(
        [sys.executable, f"benchmarks/{program}.py", *arguments, "--json", str(file)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=100,
    )
    return json.loads(file.read_text())


def in_benchmarks(code):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return result.stdout.split()


def test_throughput_measures_the_floor_and_the_local_grid(tmp_path):
    arguments = ["--work", "S2", "--engines", "floor", "local", "--repetitions", "1"]
    rows = run(
        "throughput", *arguments, "--seconds", "0.05", file=tmp_path / "rows.json"
    )
    assert [(row["work"], row["engine"]) for row in rows] == [
        ("S2", "floor"),
        ("S2", "local"),
    ]
    for row in rows:
        assert row["note"] == ""
        assert row["agrees"] is True
        assert row["updates_per_second"] > 0
        assert row["startup_s"] > 0
        assert row["measurements"] == [row["updates_per_second"]]
        assert row["date"]
        assert "cores" in row["machine"]
    assert rows[0]["ratio_to_floor"] == 1
    assert rows[0]["difference"] == 0
    if sys.platform == "linux":
        assert all(row["pss_mb"] > 50 for row in rows)


def test_scale_measures_a_cohort_of_registered_clients(tmp_path):
    arguments = ["--cohorts", "--registered", "50", "--a-round", "3"]
    arguments += ["--repetitions", "1", "--seconds", "0.05"]
    (row,) = run("scale", *arguments, file=tmp_path / "rows.json")
    assert row["note"] == ""
    assert (row["registered"], row["cohort"]) == (50, 3)
    assert row["microseconds_per_update"] > 0


def test_startup_counts_from_the_start_of_the_process(tmp_path):
    arguments = ["--work", "S2", "--engines", "floor", "--repetitions", "1"]
    (row,) = run("startup", *arguments, file=tmp_path / "rows.json")
    assert row["note"] == ""
    assert row["startup_s"] >= row["ready_s"] > 0


def test_the_models_have_the_stated_sizes():
    code = (
        "from engines.job import MODELS\n"
        "for m in MODELS.values(): print(sum(p.numel() for p in m().parameters()))"
    )
    assert in_benchmarks(code) == ["50890", "582026", "11173962"]


def test_other_weights_do_not_agree():
    code = (
        "import numpy as np, throughput as t\n"
        "a = np.ones(10, np.float32)\n"
        "for b in (a, a * 1.00001, a * 1.001, a[:5], a * np.nan):\n"
        "    print(t.difference(b, a) <= t.TOLERANCE)"
    )
    assert in_benchmarks(code) == ["True", "True", "False", "False", "False"]


def test_an_engine_that_fails_leaves_a_note_and_no_number(tmp_path):
    code = (
        "import sys, throughput as t\n"
        "from engines import environments\n"
        "from engines.work import Work\n"
        # No such runner: the interpreter says so and ends.
        "environments.ENGINES += ('nobody',)\n"
        "(row,) = t.measure(Work('S', 2), ['nobody'], 1, 0.05, 1)\n"
        "print(row['updates_per_second'], row['agrees'], row['note'].split(':')[0])"
    )
    assert in_benchmarks(code) == ["None", "None", "failed"]


@pytest.mark.parametrize("name", ["S", "S1", "X20", "20", "S-2"])
def test_a_work_that_is_none_is_refused(name):
    result = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", f"--work={name}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2
    assert f"'{name}' is no work" in result.stderr
