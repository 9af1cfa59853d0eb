"""``fedweight app``: reading a Flower App's folder, running it, what it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedweight.cli import main
from fedweight.core.errors import ConfigurationError, EngineError
from fedweight.simulations import app_folder
from fedweight.simulations.app_folder import AppFolder
from fedweight.simulations.engine import Simulated
from fedweight.simulations.flower_runtime import Outcome
from fedweight.simulations.folder_run import FolderRun, run_folder
from fedweight.simulations.seen import Seen

APPS = Path(__file__).parents[1] / "apps"

SMALL = """
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client_app, app = ClientApp(), ServerApp()
not_an_app = 5


@client_app.train()
def train(message, context):
    print("told", context.run_config["text"])
    if context.node_config.get("broken"):
        raise ValueError("no such file" + context.node_config["broken"] * 1000)
    metrics = MetricRecord({"a": 1, "error": 0.5, "client": 77})
    return Message(RecordDict({"m": metrics}), reply_to=message)


@app.main()
def main(grid, context):
    exec(context.run_config["first"])
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    grid.send_and_receive(messages)
"""
PROJECT = """
[tool.flwr.app.components]
serverapp = "{module}:{server}"
clientapp = "{module}:client_app"

[tool.flwr.app.config]
text = "as it is"
first = ""
deep.rate = 0.1
deep.er.flag = true
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give a function that writes a small app, each time under another name."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(server: str = "app", project: str = PROJECT) -> Path:
        folder = tmp_path / f"app{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        module = f"small_{abs(hash(str(folder)))}"
        (folder / f"{module}.py").write_text(SMALL)
        text = project.format(module=module, server=server)
        (folder / "pyproject.toml").write_text(text)
        return folder

    return write


def test_settings_are_read_as_flower_reads_them() -> None:
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    given = ["num-server-rounds=2 local.rate=1e-3 local.steps=7"]
    for folder in APPS.iterdir():
        ours = AppFolder.read(folder)
        assert ours.config() == get_fused_config_from_dir(folder, {})
    folder = APPS / "line-fit"
    theirs = get_fused_config_from_dir(folder, parse_config_args(given))
    assert AppFolder.read(folder).config(given) == theirs
    quoted = ["a='two words' b=\"it's\" c=true d=-1 e.f=2.5"]
    assert app_folder.read_pairs(quoted, "-c") == parse_config_args(quoted)


def test_a_setting_of_another_type_is_told(caplog: pytest.LogCaptureFixture) -> None:
    app = AppFolder.read(APPS / "line-fit")
    assert app.config(["local.rate=1 nodes=5"])["local.rate"] == 1
    assert not caplog.records
    assert app.config(["nodes='five'"])["nodes"] == "five"
    (record,) = caplog.records
    assert (
        "nodes is 'five', where the app's pyproject.toml has 4" in record.getMessage()
    )


def test_settings_add_up() -> None:
    pairs = app_folder.read_pairs(["local.rate=1.0", "local.steps=7"], "-c")
    assert pairs == {"local.rate": 1.0, "local.steps": 7}


def test_a_file_of_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("local.rate = 0.5\n[more]\nx = 1\n")
    pairs = app_folder.read_pairs([str(file)], "-c")
    assert pairs == {"local.rate": 0.5, "more.x": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rats=1"], "no setting 'rats' in .*Did you mean 'rate'|no setting 'rats'"),
        (["deep.rat=1"], "no setting 'deep.rat' .*Did you mean 'deep.rate'"),
        (["text=[1]"], "text must be text, a number or true or false"),
        (["text=words"], "--run-config: .*Text stands in quotes"),
        (["text"], "--run-config must be written"),
        (["nowhere.toml"], "--run-config: nowhere.toml cannot be read: it does not ex"),
        (["a.toml", "text='b'"], "a TOML file or settings, not both"),
    ],
)
def test_settings_that_are_refused(small: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run_folder(small(), run_config=settings, isolation="none")


def test_a_file_of_settings_that_is_no_text(small: Any, tmp_path: Path) -> None:
    file = tmp_path / "latin.toml"
    file.write_bytes("text = 'é'".encode("latin-1"))
    with pytest.raises(
        ConfigurationError, match=r"latin\.toml cannot be read: 'utf-8'"
    ):
        run_folder(small(), run_config=[str(file)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"federation_config": ["num-supernode=1"]},
            "a key of --federation-config must be .*Did you mean 'num-supernodes'",
        ),
        (
            {"federation_config": ["num-supernodes=1.5"]},
            "num-supernodes of --federation-config must be of type int, got 1.5",
        ),
        (
            {"federation_config": ["num-supernodes=3"], "clients": 2},
            "clients is 2, but .* num-supernodes = 3",
        ),
        (
            {"node_config": ["2.b=1"], "clients": 2},
            "settings by the numbers of clients, 0 to 1, got 2",
        ),
        ({"node_config": ["a.b=1"]}, "a table for each client's number, .* got 'a'"),
        (
            {"node_config": ["0.b=1"], "compare_with_flower": True},
            "nothing to compare",
        ),
        ({"clients": 0, "isolation": "none"}, r"num_clients must be in \[1, inf\)"),
    ],
)
def test_options_that_are_refused(small: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run_folder(small(), **options)


def test_folders_that_are_refused(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no pyproject\.toml"):
        run_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="it lacks 'clientapp'"):
        run_folder(
            small(project='[tool.flwr.app.components]\nserverapp="{module}:app"')
        )
    with pytest.raises(ConfigurationError, match="must be a ServerApp, got int"):
        run_folder(small("not_an_app"))
    with pytest.raises(ConfigurationError, match="must be a ServerApp, got NoneType"):
        run_folder(small("missing"))
    for odd in ("", ":app", ".server:app", "{module}", "{module}.py/x:app"):
        project = PROJECT.replace("{module}:{server}", odd)
        with pytest.raises(ConfigurationError, match="must be written 'module:attri"):
            run_folder(small(project=project))
    told = '[tool.flwr.app]\nconfig = "rate=1"\n'
    parts = PROJECT[: PROJECT.index("[tool.flwr.app.config]")]
    with pytest.raises(ConfigurationError, match="must be a table of settings, got"):
        run_folder(small(project=told + parts))
    broken = PROJECT.replace('"{module}:{server}"', '"no_such_module:app"')
    with pytest.raises(ConfigurationError, match="no module 'no_such_module' in"):
        run_folder(small(project=broken))


def run(folder: Path, *arguments: str) -> int:
    return main(["app", str(folder), "--isolation", "none", *arguments])


def test_exit_status_and_output(small: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small()
    assert run(folder, "--seed", "3") == 0
    out = capsys.readouterr().out
    assert "clients   2\n" in out
    assert "replies   train 2\n" in out
    assert out.startswith("told as it is\ntold as it is\n")
    settings = ("-c", "text='other' deep.rate=1.0", "--json", "--clients", "3")
    assert run(folder, *settings) == 0
    *prints, last = capsys.readouterr().out.splitlines()
    assert prints == ["told other"] * 3
    assert json.loads(last)["replies"] == {"train": 3}
    assert run(folder, "-c", "tex='other'") == 2
    assert "no setting 'tex'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "status", "said"),
    [
        (
            "raise ValueError('as planned')",
            1,
            "ServerApp failed: ValueError: as planned",
        ),
        ("raise SystemExit(4)", 1, "the ServerApp ended with 4"),
        ("raise SystemExit(0)", 0, ""),
    ],
)
def test_exit_status_is_the_servers(
    small: Any, first: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small(), "-c", f'first="{first}"') == status
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err) == (status == 1)


def test_clients_that_fail_are_told(
    small: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small(), "--node-config", "1.broken='!'") == 0
    out = capsys.readouterr().out
    assert "warning: 1 reply is an error: client 1, train: ValueError" in out


def test_what_is_told_of_failures_is_short_and_of_errors_alone(
    small: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A metric may be called 'error', and an error's text may be of any length."""
    assert run(small(), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed_replies"] == 0
    done = run_folder(small(), node_config=["0.broken='x'"], isolation="none")
    assert [told["client"] for told in done.ours.metrics["train"]] == [0, 1]
    assert done.ours.metrics["train"][1]["error"] == 0.5
    [failure] = done.failures
    assert len(failure) <= 300


def test_the_cause_of_a_failure_is_kept(small: Any) -> None:
    with pytest.raises(EngineError) as caught:
        run_folder(small(), run_config=['first="1 / 0"'], isolation="none")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.processes
def test_prints_have_the_clients_number(small: Any) -> None:
    command = [sys.executable, "-m", "fedweight.cli", "app", str(small())]
    done = subprocess.run(
        [*command, "--workers", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(lines[:2]) == ["(client 0) told as it is", "(client 1) told as it is"]
    assert "INFO Clients draw random numbers from seed = " in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(("imported", "processes"), [("json", 2), ("jax", 4)])
def test_an_app_is_imported_once_for_all_processes(
    small: Any, imported: str, processes: int
) -> None:
    """By this one and by the fork server; but where it starts threads by each."""
    folder = small()
    (folder / "jax.py").touch()
    [module] = folder.glob("small_*.py")
    trace = (
        f"import os, {imported}\nopen(f'{folder}/seen-{{os.getpid()}}', 'w').close()"
    )
    module.write_text(f"{trace}\n{module.read_text()}")
    command = [sys.executable, "-m", "fedweight.cli", "app", str(folder)]
    subprocess.run([*command, "--workers", "2", "--clients", "4"], check=True)
    assert len(list(folder.glob("seen-*"))) == processes


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("mine", "other", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, NAN], [0.0, NAN], 0.0),
        ([0.0, NAN], [0.0, 1.0], INF),
        ([0.0, 1.0], [0.0, NAN], INF),
        ([0.0, INF], [0.0, INF], 0.0),
        ([0.0, 1.0], [0.0, INF], INF),
        ([True, False], [False, False], 1.0),
        ([1j], [2j], 0.5),
    ],
)
def test_models_are_compared_value_by_value(
    mine: Any, other: Any, difference: float
) -> None:
    """A model that has diverged on one side only must not agree."""
    same = np.zeros(2)
    seen = Seen(lambda node: node)
    seen.arrays = ArrayRecord([same, np.array(mine)])
    ours = Simulated(None, seen, 1.0, 1.0)  # type: ignore[arg-type]
    theirs = Outcome([same, np.array(other)], {}, 1.0, 1.0)
    found = FolderRun(ours, 2, theirs)
    assert found.difference == difference
    assert found.agrees == (difference == 0)


def test_unsigned_numbers_do_not_wrap() -> None:
    seen = Seen(lambda node: node)
    seen.arrays = ArrayRecord([np.array([0], np.uint8)])
    ours = Simulated(None, seen, 1.0, 1.0)  # type: ignore[arg-type]
    theirs = Outcome([np.array([1], np.uint8)], {}, 1.0, 1.0)
    assert FolderRun(ours, 2, theirs).difference == 1.0


def compared(mine: dict[str, int], others: dict[str, int]) -> FolderRun:
    """Return a comparison of so many replies, whose models differ."""
    told = [{k: [{"n": 1.0}] * n for k, n in of.items()} for of in (mine, others)]
    seen = Seen(lambda node: node)
    seen.arrays, seen.metrics = ArrayRecord([np.zeros(1)]), told[0]
    ours = Simulated(None, seen, 1.0, 1.0)  # type: ignore[arg-type]
    return FolderRun(ours, 10, Outcome([np.ones(1)], told[1], 1.0, 1.0))


WAIT = (
    ": its first round may begin before all nodes are there; let the strategy wait: "
    "min_available_nodes"
)


@pytest.mark.parametrize(
    ("mine", "others", "warning"),
    [
        (
            {"train": 50, "evaluate": 50},
            {"train": 42, "evaluate": 50},
            f"Flower's clients answered 42 train messages, ours 50{WAIT}",
        ),
        (
            {"train": 50, "evaluate": 50},
            {"train": 42, "evaluate": 45},
            f"Flower's clients answered 42 train and 45 evaluate messages, ours 50 and "
            f"50{WAIT}",
        ),
        (
            {"train": 4, "query": 2},
            {"train": 4, "query": 1},
            f"Flower's clients answered 1 query message, ours 2{WAIT}",
        ),
        ({"query": 2}, {}, f"Flower's clients answered 0 query messages, ours 2{WAIT}"),
        ({}, {"train": 4}, "Flower's clients answered 4 train messages, ours 0"),
    ],
)
def test_other_numbers_of_replies_are_not_the_apps_fault(
    mine: Any, others: Any, warning: str
) -> None:
    """Flower's own race: it may begin with the nodes that are there."""
    found = compared(mine, others)
    lines = found.lines()
    assert f"warning: {warning}" in lines
    assert "models    differ by up to 1, and so do the numbers of replies" in lines
    assert not found.replies_agree
    told = found.to_dict()
    assert (told["replies"], told["flower_replies"]) == (mine, others)
    assert told["replies_agree"] is False


def test_where_as_many_answered_the_app_may_draw_numbers() -> None:
    found = compared({"train": 50, "query": 1}, {"query": 1, "train": 50})
    lines = found.lines()
    both = "train 50, query 1; on Flower's runtime query 1, train 50"
    assert f"replies   {both}" in lines
    [models] = [line for line in lines if line.startswith("models")]
    assert models.endswith("draws random numbers or chooses among clients")
    assert not any(line.startswith("warning") for line in lines)
    assert found.to_dict()["replies_agree"] is True
    alone = FolderRun(found.ours, 10)
    assert "replies   train 50, query 1" in alone.lines()
    assert "flower_replies" not in alone.to_dict()
