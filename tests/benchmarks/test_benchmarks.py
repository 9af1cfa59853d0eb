import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each program starts several processes that import PyTorch, which a machine whose disk
# is busy may take a minute for.
pytestmark = pytest.mark.timeout(300)

WORKS_THAT_ARE_NONE = ["S", "S1", "X20", "20", "S-2"]
PLANS_THAT_ARE_NONE = ["nonsense", "batched-1", "batched-0"]


def test_fairness_measures_gaps_between_groups(in_benchmarks):
    code = """
import numpy as np, fairness
y = np.array([1, 1, 0, 0, 1, 0])
score = np.array([0.9, 0.2, 0.1, 0.6, 0.8, 0.3])
women = np.array([True, True, True, False, False, False])
print(*fairness.by_sex(y, score, women).values())
"""
    accuracy, worst, loss, risk, tpr = map(float, in_benchmarks(code))
    assert accuracy == worst == pytest.approx(4 / 6)
    assert loss == pytest.approx(-np.log([0.9, 0.2, 0.9]).mean())
    assert risk == pytest.approx(2 / 3 - 1 / 3)
    assert tpr == pytest.approx(0.5)


def test_a_comparison_beside_its_runs_alone(tmp_path, run):
    arguments = [f"--file={ROOT / 'simulations' / 'quickstart.toml'}"]
    arguments += ["--strategies=fedavg,ida", "--seeds=0", "--set=run.rounds=1"]
    arguments += ["--set=training.epochs=1", "--set=model.name=softmax"]
    [row] = run("comparison", *arguments, file=tmp_path / "rows.json")
    assert (row["cells"], row["same_bits"]) == (2, True)
    assert row["ratio"] == row["comparison_s"] / row["alone_s"] > 0
    assert row["round_beside_s"] > 0
    assert row["round_alone_s"] > 0


def test_strategies_are_measured_drawn_and_written(tmp_path, run):
    picture = tmp_path / "weights.png"
    arguments = [str(ROOT / "simulations" / "quickstart.toml"), "--seeds=0"]
    arguments += ["--strategies", "fedavg", "ida", f"--picture={picture}"]
    arguments += ["--set", "run.rounds=1", "training.epochs=1", "model.name=softmax"]
    written = run("strategies", *arguments, file=tmp_path / "rows.json")
    rows = written["rows"]
    assert [(row["strategy"], row["seed"]) for row in rows] == [
        ("fedavg", 0),
        ("ida", 0),
    ]
    assert all(0 < row["test_accuracy"] < 1 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_throughput_measures_the_floor_and_the_local_grid(tmp_path, run):
    arguments = ["--work", "S2", "--engines", "floor", "local", "--repetitions", "1"]
    arguments += ["--plan", "loop"]
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
        assert row["device"] == "cpu"
    assert rows[1]["version"].endswith(", loop")
    assert rows[0]["ratio_to_floor"] == 1
    assert rows[0]["difference"] == 0
    if sys.platform == "linux":
        assert all(row["pss_mb"] > 50 for row in rows)


def test_host_tells_the_parts_of_a_client_update_apart(tmp_path, run):
    arguments = ["--cohorts=30", "--rounds=2", "--examples=4"]
    rows = run("host", *arguments, file=tmp_path / "rows.json")
    assert [(row["device"], row["cohort"]) for row in rows] == [
        ("none", 30),
        ("cpu", 30),
    ]
    outside = {"device", "cohort", "examples", "rounds", "microseconds"}
    outside |= {"date", "machine"}
    for row in rows:
        parts = {name: row[name] for name in row.keys() - outside}
        assert sum(parts.values()) == pytest.approx(row["microseconds"])
        # Garbage is not collected in every round.
        assert min(v for name, v in parts.items() if name != "collector") > 0
        # Everybody trains at once, and with one device as with the other.
        assert parts["orders"] > 0


@pytest.mark.parametrize("program", ["throughput", "gpu"])
def test_without_a_gpu_nothing_is_measured_and_the_reason_said(tmp_path, program):
    file = tmp_path / "rows.json"
    arguments = ["--device=cuda"]
    result = subprocess.run(
        [sys.executable, f"benchmarks/{program}.py", *arguments, f"--json={file}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # Hides one that is there.
    )
    assert result.returncode == 1
    assert "There is no CUDA device here: nothing is measured.\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not file.exists()


def test_the_device_reaches_the_engines(tmp_path, in_benchmarks):
    # Up to where they would use it, so that none is needed.
    code = (
        "import pathlib, sys\n"
        "from engines import flwr, job, local\n"
        "from engines.work import Work\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def app(*arguments, device, **others):\n"
        "    print(device)\n"
        "    raise KeyError\n"
        "def simulation(*apps, backend_config, **others):\n"
        "    print(backend_config['client_resources']['num_gpus'])\n"
        "local.TrainingApp, flwr.run_simulation = app, simulation\n"
        "class Worker: version = ''\n"
        "for device in ('cpu', 'cuda'):\n"
        "    job.write(Work('S', 2), folder)\n"
        "    Work('S', 2).tell(folder, 3, 'loop', device)\n"
        "    read = job.Job(folder)\n"
        "    print(read.device, read.gpu_share)\n"
        "    local.start = flwr.start = lambda version: (Worker(), read)\n"
        "    sys.argv = ['', str(folder)]\n"
        "    try: local.main('ray')\n"
        "    except KeyError: pass\n"
        "    flwr.main()\n"
    )
    cpu, cuda = ["cpu", "0.0", "cpu", "0.0"], ["cuda", "0.3333", "cuda", "0.3333"]
    assert in_benchmarks(code) == cpu + cuda


def test_what_auto_chooses_is_held_against_plans_by_hand(tmp_path, run):
    arguments = ["--works", "S", "--cohorts", "20", "--devices", "cpu"]
    arguments += ["--seconds", "0.05", "--turns", "1"]
    rows = run("plans", *arguments, file=tmp_path / "plans.json")
    assert {"loop", "batched-10", "batched-20"} <= {row["plan"] for row in rows}
    assert all(row["updates_per_second"] > 0 for row in rows)
    assert max(row["ratio_to_best"] for row in rows) == 1
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["seconds_to_choose"] > 0
    assert chosen["measured"][0]["plan"] == "loop"


def test_scale_measures_a_cohort_of_registered_clients(tmp_path, run):
    arguments = ["--cohorts", "--registered", "50", "--a-round", "3"]
    arguments += ["--repetitions", "1", "--seconds", "0.05"]
    (row,) = run("scale", *arguments, file=tmp_path / "rows.json")
    assert row["note"] == ""
    assert (row["registered"], row["cohort"]) == (50, 3)
    assert row["microseconds_per_update"] > 0


def test_personal_models_of_registered_clients(tmp_path, run):
    arguments = ["--registered", "500", "--a-round", "20", "--rounds", "4"]
    arguments += ["--checkpoint-rounds", "1"]
    (row,) = run("client_store", *arguments, file=tmp_path / "rows.json")
    assert (row["registered"], row["cohort"], row["rounds"]) == (500, 20, 4)
    assert row["model_mb"] == pytest.approx(0.0314)
    assert row["store_mb"] >= 20 * row["model_mb"]
    assert row["store_mb_per_update"] <= 1.01 * row["model_mb"]
    assert 0 < row["checkpoint_mb"] < 0.2
    assert len(row["measurements"]) == 4
    if sys.platform == "linux":
        assert row["peak_mb"] > 50


def test_startup_counts_from_the_start_of_the_process(tmp_path, run):
    arguments = ["--work", "S2", "--engines", "floor", "--repetitions", "1"]
    (row,) = run("startup", *arguments, file=tmp_path / "rows.json")
    assert row["note"] == ""
    assert row["startup_s"] >= row["ready_s"] > 0


def test_the_models_have_the_stated_sizes(in_benchmarks):
    code = (
        "from engines.job import MODELS\n"
        "for m in MODELS.values(): print(sum(p.numel() for p in m().parameters()))"
    )
    assert in_benchmarks(code) == ["50890", "582026", "58634", "11173962"]


def test_other_weights_do_not_agree(in_benchmarks):
    code = (
        "import numpy as np, throughput as t\n"
        "a = np.ones(10, np.float32)\n"
        "for b in (a, a * 1.00001, a * 1.001, a[:5], a * np.nan):\n"
        "    print(t.difference(b, a) <= t.TOLERANCE)"
    )
    assert in_benchmarks(code) == ["True", "True", "False", "False", "False"]


def test_an_engine_that_fails_leaves_a_note_and_no_number(tmp_path, in_benchmarks):
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


def test_an_engine_may_answer_before_it_is_listened_to(tmp_path, in_benchmarks):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nread begin; read run\nprintf 'ready v1\\ndone 2.5\\nfac'\n"
        "read facts; echo 'ts {}'; read quit\n"
    )
    python.chmod(0o755)
    code = f"""
import pathlib, time
from engines.processes import EngineProcess
folder = pathlib.Path({str(tmp_path)!r})
with EngineProcess(str(folder / "python"), "any", folder) as process:
    process.deadline = time.perf_counter() + 20
    print(process.run(1), process.version, process.facts())
"""
    assert in_benchmarks(code) == ["2.5", "v1", "{}"]


# No network and no pip: what would be run is noted instead, or fails as told.
INSTALLING = """
import pathlib, sys
from engines import environments as e
e.ENVIRONMENTS = pathlib.Path(sys.argv[1])
commands = []
def run(command):
    commands.append(command)
    python = e.ENVIRONMENTS / "fedlab" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.touch()
"""


def test_pytorch_is_installed_first_and_fixed_for_what_follows(tmp_path, in_benchmarks):
    code = INSTALLING + (
        "e._run, e.os.name = run, 'posix'\n"
        "e.python_of('fedlab'), e.python_of('fedlab')\n"
        "for c in commands[1:]: print(c[-1], pathlib.Path(c[-2]).read_text().split())\n"
        "e.TORCH, e.FIXED = 'torch==9', ('torch==9',)\n"
        "e.python_of('fedlab')\n"
        "print(len(commands))"
    )
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    fixed = ["['torch==2.13.0',", "'torchvision==0.28.0']"]
    assert in_benchmarks(code) == [
        "torch==2.13.0",
        *fixed,
        "fedlab==1.3.0",
        *fixed,
        "6",  # Once for each PyTorch.
    ]


def test_a_peer_that_cannot_be_installed_leaves_one_line(tmp_path, in_benchmarks):
    code = INSTALLING + (
        "import throughput as t\n"
        "from engines.work import Work\n"
        "e.PEERS['pfl'] = e.Peer('pfl==0.6.0', newest=(3, 0), python=(3, 0))\n"
        "e.PEERS['fluke'] = e.Peer('fluke-fl==0.8.1')\n"
        "say = 'print(1); print(\"ERROR: not there\"); raise SystemExit(1)'\n"
        "e._install = lambda *_: e._run([sys.executable, '-c', say])\n"
        "for row in t.measure(Work('S', 2), ['pfl', 'fluke', 'floor'], 1, 0.05, 1):\n"
        "    print(row['agrees'], row['note'].replace(' ', '_') or '-')"
    )
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    assert in_benchmarks(code) == [
        "None",
        "pfl==0.6.0_needs_python3.0,_not_found_on_the_path",
        "None",
        "installation_failed:_ERROR:_not_there",
        "True",
        "-",
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("work", name, f"'{name}' is no work") for name in WORKS_THAT_ARE_NONE),
        *(("plan", plan, f"2 or more, got {plan}") for plan in PLANS_THAT_ARE_NONE),
    ],
)
def test_a_work_or_a_plan_that_is_none_is_refused(
    option, value, message, in_benchmarks
):
    code = (
        "import sys, throughput\n"
        "sys.stderr = sys.stdout\n"
        f"sys.argv = ['throughput.py', '--{option}={value}']\n"
        "try: throughput.main()\n"
        "except SystemExit as stop: print(stop.code)"
    )
    *said, status = in_benchmarks(code)
    assert status == "2"
    assert message in " ".join(said)


def test_a_new_result_keeps_the_last_one(tmp_path, in_benchmarks):
    code = (
        "from pathlib import Path\n"
        "from engines import results as r\n"
        f"r.RESULTS = Path({str(tmp_path)!r})\n"
        "for k in range(3): print(r.write([{'k': k}], 'speed', None).stem[-5:])"
    )
    first, *others = in_benchmarks(code)
    assert others == [f"{first[2:]}-2", f"{first[2:]}-3"]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("how", [[], ["--apart"]])
def test_aggregation(tmp_path, how, run):
    rows = run(
        "aggregation",
        *("--clients", "3", "1000", "--parameters", "0.01", "--largest", "0.01"),
        *("--threads", "1", "2", "--repetitions", "1", *how),
        file=tmp_path / "rows.json",
    )
    assert {row["strategy"] for row in rows} >= {"feddisco", "ida", "fedce", "fedlaw"}
    for row in rows:
        small = row["clients"] == 3
        assert (row["ratio"] is not None and row["ratio"] > 0) == small
        assert ("--largest" in row["note"]) == (not small)


def test_tables_of_a_study_hold_each_method_against_the_first(in_benchmarks):
    code = """
import studies
rows = []
for seed in range(4):
    for name, gain, gap in (("fedavg", 0, 0.2), ("fair, one", -0.01, 0.1)):
        rows.append({
            "strategy": name, "data": "d", "seed": seed, "candidate": "", "chosen": 1,
            "test accuracy": 0.8 + gain + 0.001 * seed * (1 + 0.2 * (gain < 0)),
            "mean accuracy": 0.7, "worst10 accuracy": None,
            **{f"test sex {g}": gap + 0.001 * seed * gap for g in studies.GAPS},
        })
print("\\n\\n".join(studies.tables(rows, "fedavg")).replace(" ", "_"))
"""
    lines = in_benchmarks(code)
    [fair, gaps] = [line for line in lines if line.startswith("|_fair,_one")]
    cells = [cell.strip("_") for cell in fair.split("|")[1:-1]]
    assert cells[1].startswith("0.792_±_")
    assert cells[2].startswith("-0.0097_(")
    assert cells[2].endswith("_worse")
    assert cells[4] == "+0.0000_(+0.0000_to_+0.0000)_same"
    assert cells[5:] == [""] * 4
    assert gaps.count("better") == 4
    assert any("sex:_gap_in_TPR" in line for line in lines)


def test_the_table_of_flower_apps(tmp_path, in_benchmarks):
    file = tmp_path / "README.md"
    code = f"""
import pathlib, flower_apps as f
def times(whole, started, models=0.0, metrics=0.0):
    return dict(whole_s=whole, started_s=started,
                models_differ_by=models, metrics_differ_by=metrics)
def row(app, flower, local, ray, clients=10):
    return dict(app=app, clients=clients, flower=flower, local=local, ray=ray,
                date="2026-11-29", machine="two cores")
rows = [
    row("a", times(10.0, 2.0), times(2.0, 0.5), times(5.0, 1.0)),
    row("a", times(12.0, 3.0), times(2.0, 0.5), times(5.0, 1.0)),
    row("b", times(9.0, 1.0), times(3.0, 0.5, metrics=None), times(9.0, 1.25)),
    row("a, large", times(20.0, 8.0), times(9.0, 4.0), times(9.0, 4.0), 100),
    dict(app="c", clients=10, note="Flower failed"),
]
file = pathlib.Path({str(file)!r})
file.write_text("before\\n" + f.BEGIN + "\\nold\\n" + f.END + "\\nafter\\n")
f.write_readme(rows, file)
print(*f.claims(rows), sep="|")
"""
    claims = " ".join(in_benchmarks(code)).split("|")
    assert claims[0] == (
        "local: whole 3.0 at the median, 2.2 at least; without start-up 2.00 at "
        "least, and 2.00 of the large ones"
    )
    assert claims[1].endswith("start-up 0.80 at least, and 2.00 of the large ones")
    before, *lines, end, after = file.read_text().splitlines()
    assert (before, end, after) == ("before", "<!-- end -->", "after")
    assert "one turn, 2026-11-29, two cores." in " ".join(lines)
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| a | 11.0 s, 2.50 s | 5.5, 5.0 | 2.2, 2.5 | – | – | – | yes |",
        "| b | 9.0 s, 1.00 s | 3.0, 2.0 | 1.0, 0.8 | – | – | – | no |",
        "| c | – | – | – | – | – | – | – |",
        "| a, large | – | – | – | 20.0 s, 8.00 s | 2.2, 2.0 | 2.2, 2.0 | yes |",
    ]
