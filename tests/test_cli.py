"""The command line: in this process, and as real processes with real signals."""

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import fedweight
from fedweight import Run
from fedweight.cli import main
from fedweight.clients.registries import PROBES, QUERIES
from fedweight.strategies import STRATEGIES

QUICK = [
    *("--set", "partition.clients=3"),
    *("--set", "training.epochs=1"),
    *("--set", "model.name=softmax"),
    *("--set", "engine.name=local"),
]
ROOT = Path(fedweight.__file__).parents[1]


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def process(*arguments, **options):
    options.setdefault("stdout", subprocess.PIPE)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen(
        [sys.executable, "-m", "fedweight", *arguments],
        env=environment(**options.pop("env", {})),
        text=True,
        **options,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_takes_settings_and_prints_json(here, capsys):
    arguments = ["run", *QUICK, "--set", "run.rounds=2", "--seed", "5"]
    assert main([*arguments, "--strategy", "ida", "--out", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    assert printed["folder"] == "x"
    assert (printed["rounds"], printed["seed"], printed["strategy"]) == (2, 5, "ida")
    config = tomllib.loads((here / "x" / "config.toml").read_text())
    assert (config["run"]["seed"], config["strategy"]["name"]) == (5, "ida")
    assert (here / "x" / "report.html").is_file()


def test_json_has_no_nan(here, capsys):
    # Without a held-out part and a proxy there is much that is not known.
    arguments = ["run", *QUICK, "--set", "run.rounds=1", "--json", "--out", "x"]
    assert main([*arguments, "--set", "data.held-out=0"]) == 0

    def no(constant):
        raise AssertionError(constant)

    printed = json.loads(capsys.readouterr().out, parse_constant=no)
    assert printed["held_out_accuracy"] is None


def test_a_file_is_run_and_its_lines_are_plain_where_nobody_watches(here, capsys):
    Path("mine.toml").write_text(
        "[run]\nname = 'mine'\nrounds = 3\nevaluate-every = 3\n"
        "[partition]\nclients = 3\n[training]\nepochs = 1\n"
        "[model]\nname = 'softmax'\n[engine]\nname = 'local'\n"
    )
    assert main(["run", "mine.toml"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["0/3", "1/3", "2/3", "3/3"]
    assert "accuracy" in lines[0]
    assert "accuracy" in lines[3]
    assert "nan" not in err
    assert "\x1b" not in err + out
    assert "runs/mine-fedavg-seed0" in out
    assert Run("runs/mine-fedavg-seed0").complete
    # Its report has an address that one can click, and can be written again.
    report = here / "runs" / "mine-fedavg-seed0" / "report.html"
    assert out.splitlines()[-1].split() == ["report", report.as_uri()]
    report.unlink()
    assert main(["report", "runs/mine-fedavg-seed0", "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["report"]) == Path(
        "runs/mine-fedavg-seed0/report.html"
    )
    assert report.is_file()


@pytest.mark.parametrize(
    ("kind", "names", "odd"),
    [
        ("probe", sorted(PROBES.entries), "loss-bfore"),
        ("probes", sorted(PROBES.entries), "own:f"),
        ("query", sorted(QUERIES.entries), "counts"),
    ],
)
def test_list_shows_what_clients_may_be_asked_for(capsys, kind, names, odd):
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) > 3 for line in lines)
    assert main(["list", kind, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == names
    assert main(["list", kind, names[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {names[0]: found[names[0]]}
    assert main(["list", kind, odd]) == 2
    said = capsys.readouterr().err
    assert f"there is no {'query' if kind == 'query' else 'probe'} '{odd}'." in said
    assert main(["list", "prob"]) == 2
    assert "Did you mean 'probe'?" in capsys.readouterr().err


def test_list_shows_every_name_with_a_line(capsys):
    assert main(["list", "--json"]) == 0
    kinds = json.loads(capsys.readouterr().out)
    assert set(kinds) == {
        "strategies",
        "objectives",
        "personal models",
        "data",
        "partitions",
        "models",
        "adapters",
        "server optimisers",
        "schedules",
        "codecs",
        "local optimisers",
        "learning-rate schedules",
        "probes",
        "queries",
        "keys of a simulation file",
    }
    assert "run.rounds" in kinds["keys of a simulation file"]
    assert set(kinds["strategies"]) == set(STRATEGIES.entries)
    assert set(kinds["probes"]) == set(PROBES.entries)
    assert set(kinds["queries"]) == set(QUERIES.entries)
    assert all(line for names in kinds.values() for line in names.values())
    assert main(["list"]) == 0
    plain = capsys.readouterr().out
    for names in kinds.values():
        for name, line in names.items():
            assert f"  {name} " in plain
            assert line in plain


@pytest.mark.parametrize(
    "command", ["run", "compare", "check", "list", "report", "data"]
)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  fedweight {command}" in out
    assert "--json" in out


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == fedweight.__version__
    assert main([]) == 2
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "none.toml"], "there is no simulation file 'none.toml'"),
        (["run", "--set", "run.round=3"], "Did you mean 'rounds'?"),
        (["run", "--set", "rounds"], "must be written table.key=value"),
        (["run", "--strategy", "fedavgg"], "Did you mean 'fedavg'?"),
        (["run", "--engine", "rai"], "Did you mean 'ray'?"),
        (["run", "--seed", "-1"], "run.seed must be in [0, inf), got -1."),
        (["run", "--out", "full"], "is not an empty folder"),
        (["run", "--out", "full/file/x"], "cannot be made"),
        (["run", "--set", "engine.device=gpu"], "engine.device must be one of"),
        (["run", "--out", "full", "--overwrite"], "has file. Nothing was removed."),
        (["run", *("--set", "data.name=csv"), *("--set", "data.path=bad.csv")], "bad"),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["report", "full"], "config.toml is missing"),
        (["data", "mnist"], "fashion-mnist"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_an_error_is_one_line_and_status_2(here, capsys, arguments, text):
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    (here / "bad.csv").write_text("a,b\n1,2\n1,2,3\n")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedweight: ")
    assert err.count("\n") == 1
    assert text in err
    assert not (here / "runs").exists()


def test_a_run_whose_rounds_fail_has_status_1(here, capsys):
    (here / "own_cli_nan.py").write_text(
        "from fedweight.clients.objectives import Plain\n"
        "class Nan(Plain):\n"
        "    def batch_loss(self, outputs, batch, facts):\n"
        "        return super().batch_loss(outputs, batch, facts) * float('nan')\n"
    )
    arguments = ["run", *QUICK, "--set", "run.rounds=1", "--out", "x", "--json"]
    assert main([*arguments, "--set", "objective.name=own_cli_nan:Nan"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failed_rounds"] == 1
    assert "global model is kept" in err
    assert (here / "x" / "model.safetensors").is_file()
    sys.modules.pop("own_cli_nan", None)


FAILING = """
from fedweight.clients.objectives import Plain

class Failing(Plain):
    def batch_loss(self, outputs, batch, facts):
        if len(batch.y) % 2:
            raise ValueError("=1+1 is \\x1b[31modd")
        return super().batch_loss(outputs, batch, facts)
"""


def test_what_a_reader_must_know_is_said_last(here, capsys):
    (here / "own_cli_failing.py").write_text(FAILING)
    arguments = ["run", *QUICK, "--set", "run.rounds=2", "--set", "data.proxy=0"]
    arguments += ["--set", "objective.name=own_cli_failing:Failing"]
    arguments += ["--set", "partition.clients=40", "--set", "training.batch-size=500"]
    status = main([*arguments, "--out", "x"])
    assert status == 0  # There are warnings, but no round has failed.
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert lines[-len(warnings) :] == warnings
    assert len(warnings) == 3
    assert "failed in every round they were asked (2 rounds): " in warnings[0]
    assert "ValueError: =1+1 is \\x1b[31modd" in warnings[0]
    assert "a tenth or more of the clients failed in 2 of 2 rounds" in warnings[1]
    assert warnings[2].startswith("warning: errors.log")
    assert "\x1b" not in out
    assert main([*arguments, "--out", "y", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [f"warning: {line}" for line in printed["warnings"]] == warnings
    errors = (here / "x" / "errors.log").read_text()
    assert errors.count("Traceback (most recent call last)") == 1
    assert "rounds 1 and 2, clients " in errors
    assert "\x1b" not in errors
    with (here / "x" / "clients.csv").open(newline="") as file:
        reasons = {row["reason"] for row in csv.DictReader(file)} - {""}
    assert all("\x1b" not in reason for reason in reasons)
    sys.modules.pop("own_cli_failing", None)


def test_few_rounds_are_no_ten(here, capsys):
    assert main(["run", *QUICK, "--set", "run.rounds=2", "--out", "x"]) == 0
    out = capsys.readouterr().out
    assert "mean test accuracy last 2" in out
    assert "warning" not in out


# FedAsync mixes in model after model: without its schedule the last one counts most.
CARDS = {
    "fedasync": ["name=buffered", "buffer-size=1", "concurrency=20"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    # The short steps of one are told; the other takes tables, and these are images.
    sorted(STRATEGIES.entries.keys() - {"qfedavg", "agnostic-fair"}),
)
def test_the_quick_start_gives_no_cause_for_a_line(here, capsys, strategy):
    schedule = [f"--set=schedule.{one}" for one in CARDS.get(strategy, ())]
    arguments = ["run", "--strategy", strategy, *schedule, "--out", "x", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_an_error_of_a_process_has_no_traceback(tmp_path):
    with process("run", "--set", "strategy.nme=x", cwd=tmp_path) as child:
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert "Did you mean 'name'?" in err
    assert err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    with process("list", cwd=tmp_path, stdout=writes) as child:
        os.close(writes)
        _, err = child.communicate(timeout=60)
    assert err == ""
    assert child.returncode == 1


def test_a_closed_output_is_no_traceback(tmp_path):
    command = f"{sys.executable} -m fedweight list >&-"
    done = subprocess.run(
        ["sh", "-c", command],
        env=environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


# A client that needs a while: a second or more, with many steps.
SLOW = """
import math
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x):
        work = torch.ones(256, 256)
        for _ in range(self.training):
            work = work @ work / 256
        return self.layer(x.flatten(1)) + 0 * work.sum()
"""


SLOW_RUN = [
    *("run", "--out", "x"),
    *("--set", "model.name=own_slow:Slow"),
    *("--set", "run.rounds=1000"),
    *("--set", "partition.clients=6"),
    *("--set", "training.batch-size=4"),
]


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("threads", "number", "background", "said"),
    [
        (1, signal.SIGINT, False, "interrupted. What"),
        (2, signal.SIGINT, False, "interrupted. What"),
        (1, signal.SIGINT, True, "interrupted. What"),  # as a script's `... &` is
        (1, signal.SIGTERM, False, "interrupted by SIGTERM. What"),
        (2, signal.SIGTERM, True, "interrupted by SIGTERM. What"),
        (1, signal.SIGHUP, False, "interrupted by SIGHUP. What"),
    ],
)
def test_a_signal_ends_a_run_at_once_and_keeps_what_was_recorded(
    tmp_path, threads, number, background, said
):
    (tmp_path / "own_slow.py").write_text(SLOW)
    with process(
        *(*SLOW_RUN, "--set", f"engine.threads={threads}"),
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=ignore_interrupts if background else None,
    ) as child:
        for line in child.stderr:
            if line.startswith("round 1/"):
                break
        # The next round has begun, or is about to: both must end.
        began = time.monotonic()
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
        seconds = time.monotonic() - began
    assert child.returncode == 128 + number
    assert "Traceback" not in err
    assert f"{said} was recorded is in x." in err
    assert "fedweight report x" in err
    assert out == ""
    assert seconds < 2
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # nobody of its session is left
    stopped = Run(tmp_path / "x")
    assert stopped.rounds_done >= 1
    assert not stopped.rounds["test_accuracy"].isna().any()
    assert stopped.model()["layer.weight"].shape == (10, 64)
    assert [path for path in stopped.folder.iterdir() if path.name[0] == "."] == []
    with (tmp_path / "x" / "clients.csv").open(newline="") as file:
        rounds = {row["round"] for row in csv.DictReader(file)}
    assert len(rounds) == stopped.rounds_done


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_killed_run_can_be_replaced_and_a_running_one_cannot(here, capsys):
    (here / "own_slow.py").write_text(SLOW)
    again = ["run", *QUICK, "--set", "run.rounds=1", "--out", "x"]
    with process(*SLOW_RUN, cwd=here) as child:
        for line in child.stderr:
            if line.startswith("round 1/"):
                break
        assert main([*again, "--overwrite"]) == 2
        assert "another run is writing to 'x'" in capsys.readouterr().err
        assert child.poll() is None
        child.kill()
    assert Run("x").rounds_done >= 1
    assert main(again) == 2
    assert "say --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0
    assert "removing the run in x: clients.csv, " in capsys.readouterr().err
    assert Run("x").complete
    assert not Path("x", ".lock").exists()


FULL = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs a device that is always full"
)


@FULL
@pytest.mark.parametrize("command", ["list", "run"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, command):
    more = [*QUICK, "--set", "run.rounds=1", "--json"] if command == "run" else []
    with (
        open("/dev/full", "w") as full,
        process(command, *more, cwd=tmp_path, stdout=full) as child,
    ):
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    lines = [line for line in err.splitlines() if not line.startswith("round ")]
    assert lines == ["fedweight: the output cannot be used: No space left on device"]


def limit_files(size):
    """Let a process write files of so many bytes: then the disk is full."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
@pytest.mark.parametrize(
    ("size", "file"), [(1500, "clients.csv"), (20_000, "report.html")]
)
def test_a_full_disk_is_one_line_and_leaves_whole_files(tmp_path, size, file):
    arguments = ["run", *QUICK, "--set", "run.rounds=2", "--out", "x"]
    arguments += ["--set", "partition.clients=12"]
    with process(*arguments, cwd=tmp_path, preexec_fn=limit_files(size)) as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("round ")]
    assert line.startswith(f"fedweight: x/{file} cannot be written: File too large.")
    left = {path.name for path in (tmp_path / "x").iterdir()}
    assert not [name for name in left if name.startswith(".")]
    if file == "clients.csv":
        assert Run(tmp_path / "x").clients.empty  # as it was before the first round
    else:
        assert file not in left
        with process(
            *("report", "x"), cwd=tmp_path, preexec_fn=limit_files(size)
        ) as child:
            _, err = child.communicate(timeout=60)
        assert child.returncode == 1
        assert err.count("\n") == 1
        assert main(["report", str(tmp_path / "x")]) == 0


@pytest.mark.skipif(os.name != "posix", reason="terminals are POSIX's")
def test_on_a_terminal_the_rounds_are_a_live_line(tmp_path):
    ours, theirs = pty.openpty()
    arguments = ["run", *QUICK, "--set", "run.rounds=2", "--out", "x"]
    with process(
        *arguments, cwd=tmp_path, stderr=theirs, env={"TERM": "xterm", "COLUMNS": "120"}
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other side is closed
                break
            if not part:
                break
            shown += part
        out, _ = child.communicate(timeout=60)
    os.close(ours)
    assert child.returncode == 0
    assert b"\x1b[" in shown
    assert b"2/2" in shown
    assert b"accuracy" in shown
    assert not re.search(rb"loss [0-9.]+  [0-9.]+ s", shown)  # no plain lines besides
    assert "\x1b" not in out
    assert "test accuracy" in out
