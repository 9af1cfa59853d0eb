"""Comparisons: cells that are ordinary runs, pairs that are pairs, and a summary."""

from __future__ import annotations

import html
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fedweight
from fedweight import Comparison, Run, compare
from fedweight.cli import main
from fedweight.clients.objectives import Plain
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.texts import in_bytes
from fedweight.core.threads import num_cores
from fedweight.data import load
from fedweight.strategies import FedAvg, FedDisco
from fedweight.studies.cells import (
    Cell,
    Ended,
    _Process,
    run_side_by_side,
    visible_cards,
    what_is_there,
)
from fedweight.studies.configuration import Configuration
from fedweight.studies.methods import methods_of, parts, seeds_of
from fedweight.studies.ranks import signed_ranks
from fedweight.studies.statistics import compare_pairs, t_interval
from fedweight.studies.summarizing import (
    METRICS,
    choose,
    ranking_of,
    signed_ranks_of,
    summary_of,
    within_bounds,
)

ROOT = Path(fedweight.__file__).parents[1]
QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 4,
    "training.epochs": 1,
    "model.name": "softmax",
    "strategy.fraction-train": 0.7,
}
SET = [word for k, v in QUICK.items() for word in ("-s", f"{k}={v}")]
TABLES = ("comparison.toml", "cells.csv", "summary.csv")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison of three strategies over two seeds, in this process."""
    out = tmp_path_factory.mktemp("made") / "c"
    names = ["fedavg", "feddisco:a=0.2", "ida"]
    return compare(None, names, [0, 1], settings=QUICK, out=out, workers=1)


def test_a_cell_is_what_run_writes(made: Comparison, tmp_path: Path) -> None:
    alone = fedweight.run(
        strategy=FedDisco(a=0.2, fraction_train=0.7),
        seed=1,
        settings={k: v for k, v in QUICK.items() if not k.startswith("strategy")},
        out=tmp_path / "alone",
    )
    cell = made.run("feddisco:a=0.2", 1)
    assert cell.folder.name == "feddisco-a=0.2-seed1"
    for name in ("rounds.csv", "clients.csv", "partition.csv", "model.safetensors"):
        assert (cell.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert not (cell.folder / "report.html").exists()  # 0.9 MB, on demand
    assert cell.report().is_file()
    assert cell.config["strategy"]["a"] == 0.2


def test_pairs_share_partition_first_model_and_sampling(made: Comparison) -> None:
    for seed in made.seeds:
        first, *others = [made.run(name, seed) for name in made.strategies]
        for other in others:
            assert other.partition.equals(first.partition)
            begin = [run.rounds["test_accuracy"][0] for run in (first, other)]
            assert begin[0] == begin[1]
            took_part = [
                run.clients.loc[run.clients["status"] == "ok", ["round", "client"]]
                for run in (first, other)
            ]
            assert took_part[0].equals(took_part[1])
    seeds = [made.run("fedavg", seed).partition for seed in made.seeds]
    assert not seeds[0].equals(seeds[1])


def test_the_summary_is_of_the_runs(made: Comparison) -> None:
    measured = ["test_accuracy", "client_accuracy_mean", "client_accuracy_worst10"]
    assert list(dict.fromkeys(made.summary["metric"])) == measured
    for metric in measured:
        values = {
            name: [made.run(name, seed).summary()[metric] for seed in made.seeds]
            for name in made.strategies
        }
        first = values.pop("fedavg")
        rows = made.summary[made.summary["metric"] == metric].set_index("strategy")
        assert rows.loc["fedavg", "mean"] == sum(first) / 2
        assert (rows.loc["fedavg", "low"], rows.loc["fedavg", "high"]) == t_interval(
            first
        )
        assert rows.loc["fedavg", "against"] == ""
        for name, pair in compare_pairs(first, values).items():
            assert rows.loc[name, "n"] == 2
            assert rows.loc[name, "difference"] == pair.difference
            assert rows.loc[name, "p_holm"] == pytest.approx(pair.p_holm, nan_ok=True)
            assert rows.loc[name, "verdict"] == pair.verdict
            assert rows.loc[name, "wilcoxon_verdict"] == "cannot reach"


def test_a_comparison_reads_well(made: Comparison) -> None:
    again = Comparison(made.folder)
    assert again.strategies == ["fedavg", "feddisco:a=0.2", "ida"]
    assert again.cells["status"].eq("complete").all()
    assert len(again.rounds) == 3 * 2 * 3
    assert list(again.rounds.columns[:4]) == ["strategy", "data", "seed", "round"]
    assert set(again.clients["strategy"]) == set(again.strategies)
    assert (again.failures, again.failed_rounds) == ({}, 0)
    assert "fedavg, feddisco:a=0.2 and ida, 2 seeds, 6 of 6 runs" in repr(again)
    text = str(again)
    for name in dict.fromkeys(again.summary["metric"]):
        assert METRICS[name].title in text
        assert html.escape(METRICS[name].title) in again._repr_html_()
    assert "cannot reach: Wilcoxon's test needs 7 pairs" in text
    assert "The test set chose nothing." in text
    json.loads(json.dumps(again.to_dict()), parse_constant=pytest.fail)
    with pytest.raises(DataError, match="there is no run of 'afl' with seed 0"):
        again.run("afl", 0)


def test_what_is_there_is_not_run_again(made: Comparison) -> None:
    before = {name: (made.folder / name).read_bytes() for name in TABLES}
    times = {p: p.stat().st_mtime_ns for p in made.folder.rglob("rounds.csv")}
    told: list[Ended] = []
    arguments: dict[str, Any] = {"settings": QUICK, "out": made.folder, "workers": 1}
    names = "fedavg,feddisco:a=0.2,ida"
    compare(None, names, "0-1", progress=told.append, **arguments)
    assert told == []
    assert {name: (made.folder / name).read_bytes() for name in TABLES} == before
    # Another configuration is not taken for it, nor overwritten.
    other = {**QUICK, "run.rounds": 3}
    with pytest.raises(
        ConfigurationError, match=r"its run\.rounds is 2, not 3"
    ) as caught:
        compare(None, names, "0-1", **{**arguments, "settings": other})
    assert "Name another folder with --out" in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_runs_of_different_versions_are_told(made: Comparison, tmp_path: Path) -> None:
    """What was there is not run again, whatever has been installed since."""
    folder = tmp_path / "other"
    shutil.copytree(made.folder, folder)
    assert "different versions" not in str(Comparison(folder))
    path = Comparison(folder).run("ida", 1).folder / "environment.json"
    about = json.loads(path.read_text())
    new, about["versions"]["torch"] = about["versions"]["torch"], "1.0"
    path.write_text(json.dumps(about))
    [note] = [n for n in Comparison(folder).notes if "different versions" in n]
    assert note.endswith(f"give other bits: torch 1.0 and {new}.")
    assert note in Comparison(folder).cautions  # Which the report shows.
    path.unlink()
    assert "different versions" not in str(Comparison(folder))


def test_strategies_and_seeds_are_added(here: Path) -> None:
    options: dict[str, Any] = {"settings": QUICK, "out": "c", "workers": 1}
    compare(None, "fedavg", 0, **options)
    told: list[Ended] = []
    found = compare(None, "fedavg,ida", "0,1", progress=told.append, **options)
    ran = {ended.cell.name for ended in told}
    assert ran == {"ida-seed0", "fedavg-seed1", "ida-seed1"}
    assert [ended.number for ended in told] == [2, 3, 4]
    assert len(found.cells) == 4
    # What is there is never left out of the summary, nor mixed with something else.
    before = {p: p.read_bytes() for p in sorted(here.rglob("*")) if p.is_file()}
    longer = {**QUICK, "run.rounds": 3}
    for strategies, seeds, settings, said in (
        ("fedavg,ida", 5, longer, "fedavg-seed0 holds another run: its run.rounds is"),
        ("fedavg,ida", 5, QUICK, "fedavg-seed0, fedavg-seed1, ida-seed0 and ida-seed1"),
        ("fedavg,ida", 5, QUICK, "(--seeds 0,1,5)"),
        ("fedavg", "0,1", QUICK, "would lose: ida-seed0 and ida-seed1. Nothing was"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            compare(None, strategies, seeds, **{**options, "settings": settings})
        assert said in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before
    assert sorted(p for p in here.rglob("*") if p.is_file()) == sorted(before)
    # What has no result yet is nothing to lose.
    for path in Path("c").glob("ida-seed*/model.safetensors"):
        path.unlink()
    assert len(compare(None, "fedavg", "0,1", **options).cells) == 2


FAILING = """
from fedweight.strategies import WeightingStrategy

class Failing(WeightingStrategy):
    how: str = "raise"

    def weights(self, round):
        import os, signal
        if self.seed == 1:
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("no power")
        return round.size_weights
"""


@pytest.fixture
def failing(here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (here / "own_failing.py").write_text(FAILING)
    monkeypatch.syspath_prepend(here)
    yield here
    sys.modules.pop("own_failing", None)


def test_a_cell_that_fails_is_a_line_and_the_others_go_on(
    failing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "fedavg,own_failing:Failing"
    arguments = ["compare", "--strategies", names, "--seeds", "0,1,2", "--out", "c"]
    assert main([*arguments, *SET, "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert len([line for line in err.splitlines() if line[:2] in "1/2/3/4/5/6/"]) == 6
    found = Comparison(Path("c"))
    [(where, reason)] = found.failures.items()
    assert where == "failing-seed1"
    assert "no power" in reason
    assert f"failed: failing-seed1: {reason}" in out
    row = found.summary[found.summary["strategy"] == "failing"].iloc[0]
    assert (row["n"], row["pairs"]) == (2, 2)
    assert row["note"] == f"seed 1 failed: {reason}"
    assert reason == "RuntimeError: no power (own_failing.py, line 12), in round 1"
    assert "no power" in (failing / "c" / "failing-seed1" / "errors.log").read_text()
    assert "errors.log of failing-seed1 has it in full." in out
    # Mended, the same command ends it; what ran with the other code is not mixed in.
    text = (failing / "own_failing.py").read_text().replace("self.seed == 1", "False")
    (failing / "own_failing.py").write_text(text)
    sys.modules.pop("own_failing", None)
    assert main([*arguments, *SET, "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "(own_failing:Failing) changed since failing-seed0 and failing-seed2" in said
    for seed in (0, 2):
        shutil.rmtree(failing / "c" / f"failing-seed{seed}")
    assert main([*arguments, *SET, "--workers", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [cell["status"] for cell in printed["cells"]] == ["complete"] * 6
    assert not (failing / "c" / "failing-seed1" / "errors.log").exists()


def test_a_process_that_dies_takes_one_cell_with_it(failing: Path) -> None:
    names = ["fedavg", "own_failing:Failing:how=die"]
    options: dict[str, Any] = {"settings": QUICK, "workers": 2}
    found = compare(None, names, [0, 1, 2], out="c", **options)
    assert found.failures == {
        "failing-how=die-seed1": "its process was ended by SIGKILL"
    }
    assert found.cells["status"].eq("complete").sum() == 5
    # Side by side gives what one after another gives.
    alone = compare(None, "fedavg", [0, 1, 2], out="d", settings=QUICK, workers=1)
    for seed in alone.seeds:
        pair = [c.run("fedavg", seed).folder / "rounds.csv" for c in (found, alone)]
        assert pair[0].read_bytes() == pair[1].read_bytes()


SEEING = """
from fedweight.core.texts import in_bytes
from fedweight.core.threads import num_cores
from fedweight.strategies import WeightingStrategy

class Seeing(WeightingStrategy):
    def weights(self, round):
        import os
        with open("seen.txt", "a") as file:
            card = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
            file.write(f"{card} {self.seed} {num_cores()}\\n")
        return round.size_weights
"""


@pytest.fixture
def seeing(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Three runs whose strategy writes down what its process sees."""
    (here / "own_seeing.py").write_text(SEEING)
    monkeypatch.syspath_prepend(here)
    compare(None, "own_seeing:Seeing", 0, settings=QUICK, out="c", workers=1)
    (here / "seen.txt").unlink()
    cells = []
    for seed in (1, 2, 3):
        config = Configuration.read("c/seeing-seed0/config.toml", {"run.seed": seed})
        folder = str(here / "c" / str(seed))
        cells.append(Cell(str(seed), folder, config.to_toml(), "new"))
    return cells


def seen(folder: Path) -> set[tuple[str, str, str]]:
    lines = (folder / "seen.txt").read_text().splitlines()
    return {tuple(line.split()) for line in lines}  # type: ignore[misc]


def test_each_process_sees_one_card_and_the_last_cell_has_the_cores_that_are_left(
    here: Path, seeing: list[Cell]
) -> None:
    cards = ["3", "GPU-5"]
    ended = run_side_by_side(seeing, 2, 2, lambda ended: None, cards=cards)
    assert [one.reason for one in ended] == [""] * 3
    assert {card for card, _, _ in seen(here)} == {*cards}
    if num_cores() > 1:  # Nobody has more than there are.
        assert {(seed, cores) for _, seed, cores in seen(here)} == {
            *(("1", "1"), ("2", "1"), ("3", "2"))
        }


def test_processes_are_asked_to_end_before_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Recorded:
        def __init__(self, card: str | None) -> None: ...

        def run(self, cell: Cell, cores: int) -> str:
            return ""

        def close(self) -> None: ...

        def ask_to_end(self) -> None:
            calls.append("asked")

        def end(self, until: float) -> None:
            assert until - time.monotonic() < 20
            calls.append("ended")

    def stopped(ended: Ended) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedweight.studies.cells._Process", Recorded)
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([Cell("a", "a", "", "new")] * 3, 3, 3, stopped)
    assert calls == ["asked"] * 3 + ["ended"] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_process_that_does_not_end_is_killed() -> None:
    code = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(flush=True)\ntime.sleep(60)"
    )
    process = _Process()
    process.end(time.monotonic())  # It has not started.
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    with child:
        process._child = child
        assert child.stdout is not None
        child.stdout.readline()
        process.ask_to_end()
        process.end(time.monotonic() + 0.1)
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("told", "found"), [("", ["0", "1"]), ("4,GPU-a,6", ["4", "GPU-a"])]
)
def test_the_cards_that_are_seen_go_by_their_names(
    monkeypatch: pytest.MonkeyPatch, told: str, found: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert visible_cards() == found


KILLED = [
    *("compare", "--strategies", "fedavg,ida", "--seeds", "0,1", "--out", "k"),
    *("-s", "run.rounds=30", "-s", "run.checkpoint-rounds=1"),
    *("-s", "partition.clients=4", "-s", "training.epochs=1"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_twice_it_ends_with_the_same_summary(
    here: Path, number: int, workers: str
) -> None:
    command = [sys.executable, "-m", "fedweight", *KILLED, "--workers", workers]
    for kill in range(2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            where = here / "k" / ("fedavg-seed0", "ida-seed1")[kill]
            while not (where / "checkpoint.safetensors").exists():
                assert child.poll() is None
                time.sleep(0.01)
            child.send_signal(number)
            _, err = child.communicate(timeout=60)
        if number != signal.SIGKILL:
            assert "To go on, give the same command." in err
            assert "Traceback" not in err
        assert not (here / "k" / "summary.csv").exists()
    assert main([*KILLED, "--workers", workers, "--json"]) == 0
    whole = [word if word != "k" else "whole" for word in KILLED]
    assert main([*whole, "--workers", "1", "--json"]) == 0
    for name in TABLES:
        found = [(here / folder / name).read_bytes() for folder in ("k", "whole")]
        assert found[0] == found[1], name


def test_python_gives_objects_data_and_objectives(here: Path) -> None:
    data = load("digits")
    found = compare(
        strategies=[FedAvg, FedDisco(a=0.2)],
        seeds=[3],
        objectives=[Plain, "proximal:mu=0.1"],
        settings={k: v for k, v in QUICK.items() if "strategy" not in k},
        dataset=data,
    )
    assert found.folder == Path("runs/quickstart-comparison")
    assert found.strategies == [
        *("fedavg+plain", "fedavg+proximal:mu=0.1"),
        *("feddisco:a=0.2+plain", "feddisco:a=0.2+proximal:mu=0.1"),
    ]
    config = found.run("feddisco:a=0.2+proximal:mu=0.1", 3).folder / "config.toml"
    assert "its data were given in Python" in config.read_text()
    tables = tomllib.loads(config.read_text())
    assert tables["objective"]["mu"] == 0.1
    assert tables["strategy"]["a"] == 0.2
    assert found.summary["sentence"].str.contains("1 pair, and a t test needs 2").any()
    with pytest.raises(ConfigurationError, match="workers must be 1, got 2"):
        compare(strategies="fedavg", seeds=4, dataset=data, workers=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategies": ""}, "strategies must name one or more"),
        ({"strategies": "fedavgg"}, "Did you mean 'fedavg'?"),
        ({"strategies": "fedavg,fedavg"}, "'fedavg' is there twice"),
        ({"strategies": "feddisco:a"}, "there is no module 'feddisco'"),
        ({"strategies": "feddisco:a=0.2:b"}, "got 'feddisco:a=0.2:b'. Write a name"),
        ({"strategies": "feddisco:aa=1"}, "'feddisco:aa=1': strategy"),
        ({"strategies": "fedavg,feddisco:a=-1"}, "strategy.a must be"),
        ({"seeds": ""}, "seeds: got ''. Give whole numbers from 0"),
        ({"seeds": []}, "seeds must be one or more, got none"),
        ({"seeds": "0,1,0"}, "seeds: 0 is there twice"),
        ({"seeds": "1-0"}, "'1-0' is no range"),
        ({"seeds": [0.5]}, "seeds: got 0.5"),
        ({"seeds": -1}, "seeds: got -1"),
        ({"settings": {"run.seed": 3}}, "settings: run.seed is what seeds say"),
        ({"settings": ["strategy.name=ida"]}, "is what strategies say"),
        ({"sweep": ["run.rounds=1,2"]}, "data.validation is 0. Give a share"),
        (
            {"vary": ["run.rounds=1,2"], "settings": QUICK},
            "settings: run.rounds is varied, swept or a data set's",
        ),
        (
            {"data_sets": "digits,adult", "settings": {"data.name": "csv"}},
            "settings: data.name is varied, swept or a data set's",
        ),
        (
            {"data_sets": "digits,adult", "dataset": load("digits")},
            "the data are given in Python, and data-sets names others",
        ),
        ({"data_sets": "digitz"}, "Did you mean 'digits'?"),
        ({"settings": {"run.round": 3}}, "Did you mean 'rounds'?"),
        ({"settings": {"trainig": {"epochs": 1}}}, "Did you mean 'training'?"),
        ({"workers": 0}, "workers must be a whole number from 1, got 0"),
        ({"file": "none.toml"}, "there is no simulation file 'none.toml'"),
        ({"strategies": "fedlaw", "settings": {"data.proxy": 0}}, "'fedlaw': "),
        ({"progress": 3}, "progress must be a function of how a cell ended"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_cannot_be_compared_is_refused_before_anything(
    here: Path, arguments: dict[str, Any], said: str
) -> None:
    given = {"strategies": "fedavg", "seeds": "0", **arguments}
    with pytest.raises((ConfigurationError, DataError)) as caught:
        compare(**given)
    assert said in str(caught.value)
    assert not (here / "runs").exists()


def test_a_folder_that_is_no_comparisons_is_named(here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(ConfigurationError, match="--out 'file' is a file"):
        compare(strategies="fedavg", out="file")
    with pytest.raises(DataError, match=r"nothing/comparison.toml is missing"):
        Comparison(Path("nothing"))


def test_a_folder_of_the_other_kind_is_named(made: Comparison) -> None:
    said = rf"is a comparison's folder. Read it by fedweight.Comparison\('{made.folder}"
    with pytest.raises(DataError, match=said):
        Run(made.folder)
    own = made.run("ida", 0).folder
    with pytest.raises(
        DataError, match=rf"a run's folder. Read it by fedweight.Run\('{own}"
    ):
        Comparison(own)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("comparison.toml", lambda t: t.replace("data-sets", "data"), "list 'data-s"),
        ("comparison.toml", lambda t: "comparison = 3", "no list 'strategies'"),
        (
            "comparison.toml",
            lambda t: t.replace('"fedavg"', "1", 1),
            "strategies are [1",
        ),
        ("comparison.toml", lambda t: "[", "is no comparison's"),
        ("cells.csv", lambda t: t.replace("candidate", "x"), "no column 'candidate'"),
        ("cells.csv", lambda t: "", "cells.csv cannot be read"),
        ("summary.csv", lambda t: t.replace("p_holm", "x", 1), "no column 'p_holm'"),
    ],
)
def test_a_comparison_of_another_version_is_one_line(
    made: Comparison, tmp_path: Path, name: str, change: Any, said: str
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(made.folder, folder)
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(DataError) as caught:
        Comparison(folder).report()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace("rounds = ", "round = "), "it has no run.rounds"),
        (lambda t: f"{t}\n[more]\nx = 1\n", "it has more.x, which this one has not"),
        (lambda t: "engine = 3\n" + t.replace("[engine]", "[other]"), "has no engine."),
    ],
)
def test_a_run_of_another_version_is_not_gone_on_with(
    made: Comparison, change: Any, said: str
) -> None:
    text = (made.run("fedavg", 0).folder / "config.toml").read_text()
    folder = made.folder.parent / "one"
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(change(text))
    _, _, differs = what_is_there(folder, tomllib.loads(text))
    assert said in differs


def test_a_comparison_goes_on_under_another_name(made: Comparison) -> None:
    folder = made.run("fedavg", 0).folder
    tables = tomllib.loads((folder / "config.toml").read_text())
    tables["run"]["name"] = "other"
    assert what_is_there(folder, tables)[::2] == ("done", "")


def test_names_and_seeds_as_they_are_written() -> None:
    found = methods_of("fedavg, feddisco:a=0.2:b=0.3")
    assert [one.label for one in found] == ["fedavg", "feddisco:a=0.2:b=0.3"]
    assert parts("a:b=[1, 2], c") == ["a:b=[1, 2]", "c"]
    own = methods_of("strategies.median_distance:MedianDistance:tolerance=3.0")[0]
    assert own.label == "mediandistance:tolerance=3.0"
    assert own.settings["strategy.name"] == "strategies.median_distance:MedianDistance"
    assert own.folder == "mediandistance-tolerance=3.0"
    assert (
        methods_of([FedDisco(a=0.2)])[0].label == methods_of("feddisco:a=0.2")[0].label
    )
    assert seeds_of("7, 0-2") == [7, 0, 1, 2]
    assert seeds_of(range(3)) == [0, 1, 2]


def test_without_held_out_data_there_is_one_metric() -> None:
    cells = [
        {
            "strategy": name,
            "data": "digits",
            "seed": seed,
            "chosen": 1,
            "status": "complete",
            "failed_rounds": 2 * (seed == 1),
            "test_accuracy": 0.5 + 0.1 * seed + 0.01 * seed * len(name),
            "client_accuracy_mean": None,
        }
        for name in ("a", "bb")
        for seed in (0, 1, 2)
    ]
    rows = pd.DataFrame(summary_of(cells))
    assert list(rows["metric"]) == ["test_accuracy"] * 2
    assert list(rows["note"]) == ["seed 1: 2 rounds failed"] * 2
    assert math.isnan(rows["difference"][0])
    failed = [{**cell, "status": "failed", "reason": "x"} for cell in cells]
    rows = pd.DataFrame(summary_of(failed))
    assert list(rows["n"]) == [0, 0]
    assert list(rows["verdict"]) == ["failed"] * 2
    assert list(rows["sentence"]) == ["failed in all 3 runs: x"] * 2


def test_a_strategy_that_fails_everywhere_takes_no_other_ones_rank() -> None:
    cells = [
        {
            **{"strategy": name, "data": data, "seed": seed, "chosen": 1},
            **{"status": "failed" if name == "b" else "complete"},
            **{"failed_rounds": 0, "reason": "no power", "test_accuracy": value},
        }
        for name, value in (("a", 0.5), ("b", 0.9), ("c", 0.6))
        for data in ("few", "many")
        for seed in (0, 1)
    ]
    assert ranking_of(cells, "test_accuracy").average_ranks == {"c": 1, "a": 2}
    found = signed_ranks_of(cells, "test_accuracy", 0.01)
    assert (found["b"].data_sets, found["c"].data_sets) == (0, 2)
    assert found["c"].better > 0.5
    rows = [row for row in summary_of(cells) if row["data"] == "all data sets"]
    assert [row["average_rank"] for row in rows] == pytest.approx(
        [2, math.nan, 1], nan_ok=True
    )
    # Means are over the seeds that all who are ranked have.
    cells[0]["test_accuracy"], cells[8]["test_accuracy"] = math.nan, 0.0
    assert ranking_of(cells, "test_accuracy").average_ranks == {"c": 1, "a": 2}
    for cell in cells:
        cell["status"] = "failed"
    assert ranking_of(cells, "test_accuracy").data_sets == 0


@pytest.mark.parametrize(
    ("metric", "given", "wanted"),
    [
        ("test_accuracy", (-0.2, 1.5), (0.0, 1.0)),
        ("equalized_odds_gap", (-0.2, 0.5), (0.0, 0.5)),
        ("test_accuracy", (0.2, 0.9), (0.2, 0.9)),
        ("test_macro_f1", (-0.2, 1.5), (0.0, 1.0)),
        ("test_dice", (0.2, 1.5), (0.2, 1.0)),
        ("test_auc", (-0.2, 0.9), (0.0, 0.9)),
        ("test_rmse", (-0.2, 1.5), (-0.2, 1.5)),
        ("test_perplexity", (-0.2, 1.5), (-0.2, 1.5)),
        ("test_r2", (-0.2, 1.5), (-0.2, 1.5)),
    ],
)
def test_an_interval_of_a_share_is_shown_within_its_bounds(
    metric: str, given: tuple[float, float], wanted: tuple[float, float]
) -> None:
    assert within_bounds(metric, *given) == wanted
    assert all(map(math.isnan, within_bounds(metric, math.nan, math.nan)))


def test_personal_models_are_compared_with_the_global_one(here: Path) -> None:
    """Their global model is FedAvg's to the bit, which says nothing of them."""
    found = compare(
        strategies={
            "fedavg": {"strategy.name": "fedavg"},
            "ditto": {"strategy.name": "fedavg", "personal.name": "ditto"},
        },
        seeds=[0, 1],
        settings={k: v for k, v in QUICK.items() if "strategy" not in k},
        workers=1,
    )
    rows = found.summary.set_index(["metric", "strategy"])
    assert rows.loc[("test_accuracy", "ditto"), "verdict"] == "same"
    own = [found.run("ditto", seed).summary() for seed in (0, 1)]
    expected = [one["personal_accuracy"] - one["held_out_accuracy"] for one in own]
    row = rows.loc[("used_accuracy", "ditto")]
    assert row["difference"] == pytest.approx(sum(expected) / 2)
    assert (row["pairs"], row["verdict"] != "same") == (2, True)
    held = [found.run("fedavg", seed).summary()["held_out_accuracy"] for seed in (0, 1)]
    assert rows.loc[("used_accuracy", "fedavg"), "mean"] == pytest.approx(sum(held) / 2)


SMALL = {"few": {"partition.clients": 3}, "many": {"partition.clients": 5}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two strategies on two data sets, of which a sweep chooses the rate."""
    settings = {key: value for key, value in QUICK.items() if "clients" not in key}
    return compare(
        None,
        "fedavg,ida",
        "0,1",
        data_sets=SMALL,
        sweep={"training.learning-rate": [1e-5, 0.1]},
        settings={**settings, "data.validation": 0.1},
        out=tmp_path_factory.mktemp("wide") / "c",
        workers=1,
    )


def test_a_sweep_chooses_by_validation_data(wide: Comparison) -> None:
    assert len(wide.cells) == 2 * 2 * 2 * 2
    for row in wide.cells.to_dict("records"):
        run = fedweight.Run(wide.folder / row["folder"])
        rate = run.config["training"]["learning-rate"]
        # So small a rate learns nothing.
        assert row["chosen"] == (rate == 0.1)
        assert row["candidate"] == f"training.learning-rate={rate}"
        last = run.rounds["validation_accuracy"].iloc[-1]
        assert (
            row["validation_accuracy"] == last == run.summary()["validation_accuracy"]
        )
    said = wide.summary.loc[wide.summary["data"] == "few", "chosen"]
    assert said.str.startswith("training.learning-rate=0.1, by validation acc").all()
    assert said.str.contains("training.learning-rate=1e-05 0.").all()
    assert "chosen: ida on many: training.learning-rate=0.1, by val" in str(wide)
    assert wide.run("ida", 1, "many").config["training"]["learning-rate"] == 0.1
    assert len(wide.rounds) == 2 * 2 * 2 * 3


def test_the_test_set_chooses_nothing() -> None:
    cells = [
        {
            **{"strategy": "a", "data": "d", "seed": seed, "candidate": name},
            **{"status": "complete", "failed_rounds": 0, "test_accuracy": test},
            "validation_accuracy": value + 0.1 * seed,
        }
        for name, test, value in (("x", 0.9, 0.1), ("y", 0.1, 0.2), ("z", 0.5, 0.2))
        for seed in (0, 1)
    ]
    choose(cells)
    assert [cell["candidate"] for cell in cells if cell["chosen"]] == ["y", "y"]
    # One that failed once is not taken where another is whole.
    cells[3] |= {"status": "failed", "reason": "no power"}
    choose(cells)
    assert [cell["candidate"] for cell in cells if cell["chosen"]] == ["z", "z"]
    # Without an accuracy it is the loss that chooses.
    for cell in cells:
        cell |= {"validation_accuracy": None, "status": "complete"}
        cell["validation_loss"] = {"x": 0.2, "y": 0.1, "z": 0.3}[cell["candidate"]]
    choose(cells)
    assert [cell["candidate"] for cell in cells if cell["chosen"]] == ["y", "y"]
    # One lucky seed says nothing of a rate at which the others diverge.
    cells[3] |= {"validation_loss": math.inf}
    choose(cells)
    assert [cell["candidate"] for cell in cells if cell["chosen"]] == ["x", "x"]
    for cell in cells:
        cell["status"] = "failed"
    choose(cells)
    assert [cell["candidate"] for cell in cells if cell["chosen"]] == ["x", "x"]


def test_over_all_data_sets_each_counts_once(wide: Comparison) -> None:
    assert wide.data_sets == ["few", "many"]
    rows = wide.summary[wide.summary["metric"] == "test_accuracy"]
    assert list(rows["data"]) == ["few"] * 2 + ["many"] * 2 + ["all data sets"] * 2
    values = {
        name: [
            wide.run(name, seed, data).summary()["test_accuracy"]
            for data in wide.data_sets
            for seed in wide.seeds
        ]
        for name in wide.strategies
    }
    means = {
        name: [sum(own[k : k + 2]) / 2 for k in (0, 2)] for name, own in values.items()
    }
    pair = compare_pairs(means["fedavg"], {"ida": means["ida"]}, pair="data set")["ida"]
    both = rows[rows["data"] == "all data sets"].set_index("strategy")
    assert (both.loc["ida", "pairs"], both.loc["ida", "n"]) == (2, 2)
    assert both.loc["ida", "difference"] == pytest.approx(pair.difference, abs=1e-12)
    assert both.loc["ida", "sentence"] == pair.sentence
    assert "(2 data sets" in pair.sentence
    assert "further data sets, of which 2 tell little." in str(wide)
    ranks = wide.ranking().average_ranks
    assert both["average_rank"].to_dict() == ranks
    assert sum(ranks.values()) == 3
    assert "average ranks over 2 data sets" in str(wide)
    assert math.isnan(rows["average_rank"].iloc[0])
    expected = signed_ranks(means["fedavg"], means["ida"], rope=0.02)
    [row] = wide.signed_ranks(rope=0.02).to_dict("records")
    assert (row["strategy"], row["against"], row["data_sets"]) == ("ida", "fedavg", 2)
    assert (row["better"], row["same"]) == (expected.better, expected.same)
    with pytest.raises(ConfigurationError, match="metric must be one of"):
        wide.ranking("accuracy")
    with pytest.raises(ConfigurationError, match="metric must be one of"):
        wide.signed_ranks("accuracy")
    with pytest.raises(DataError, match="on few and many"):
        wide.run("ida", 0, "none")


def test_rounds_and_bytes_to_a_target(made: Comparison, wide: Comparison) -> None:
    for found in (made, wide):
        for row in found.cells[found.cells["chosen"] == 1].to_dict("records"):
            own = found.cells[found.cells["chosen"] == 1]
            first = own[own["strategy"] == "fedavg"]
            target = first[first["data"] == row["data"]]["test_accuracy"].mean()
            rounds = fedweight.Run(found.folder / row["folder"]).rounds
            there = rounds[rounds["test_accuracy"] >= target]
            if not len(there):
                assert math.isnan(row["rounds_to_target"])
                continue
            number = there["round"].iloc[0]
            assert row["rounds_to_target"] == number
            until = rounds[rounds["round"] <= number]
            total = until[["bytes_down", "bytes_up"]].sum().sum()
            assert row["bytes_to_target"] == total > 0
    rows = made.summary[made.summary["metric"] == "test_accuracy"]
    for row in rows.to_dict("records"):
        own = made.cells[made.cells["strategy"] == row["strategy"]]
        assert row["reached"] == own["rounds_to_target"].notna().sum()
        mean = own["rounds_to_target"].mean()
        assert row["rounds_to_target"] == pytest.approx(mean, nan_ok=True)
        # What did not reach it is later than all that did, and not left out.
        times = sorted(own["rounds_to_target"].fillna(math.inf))
        middle = sum(times) / 2
        text = str(made).split("to a test accuracy of ")[1].split("\n\n")[0]
        (line,) = (one for one in text.split("\n") if f"  {row['strategy']} " in one)
        words = line.split()[1:]
        assert words[:3] == [f"{row['reached']:.0f}", "of", "2"]
        if math.isfinite(middle):
            traffic = in_bytes(own["bytes_to_target"].mean())
            assert words[3:] == [f"{middle:g}", *traffic.split()]
        else:
            assert words[3:] == ["not", "reached"]
    assert f"{rows['target'].iloc[0]:.4f}, medians of all runs\n" in str(made)


def test_a_file_and_a_command_line_say_all(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "study.toml").write_text(
        "[run]\nrounds = 1\n[partition]\nclients = 3\n[training]\nepochs = 1\n[model]\n"
        'name = "softmax"\n[compare]\nstrategies = "fedavg"\ntarget = 0.01\n'
        "[compare.vary]\ntraining.learning-rate = [0.1, 0.2]\n"
    )
    assert main(["compare", "study.toml", "--json", "--out", "a"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    arguments = ["--settings", "training.learning-rate=0.1,0.2", "--strategies"]
    arguments += ["fedavg", "--seeds", "0", "--target", "0.01", "--out", "b", "--json"]
    arguments += ["--workers", "1"]  # Above there is one for each core.
    assert main(["compare", "study.toml", *arguments]) == 0
    from_line = json.loads(capsys.readouterr().out)
    assert from_file.pop("folder") != from_line.pop("folder")
    assert from_file == from_line
    rates = [f"fedavg+training.learning-rate={rate}" for rate in (0.1, 0.2)]
    assert from_file["strategies"] == rates
    cells = from_file["cells"]
    assert [cell["rounds_to_target"] for cell in cells] == [0, 0]
    assert cells[1]["folder"] == "fedavg+training.learning-rate=0.2-seed0"


def test_where_numbers_are_predicted_less_is_better(here: Path) -> None:
    rows = ["x,y", *(f"{k / 60},{0.3 + k / 50}" for k in range(60))]
    (here / "own.csv").write_text("\n".join(rows))
    found = compare(
        None,
        "fedavg",
        "0-2",
        vary={"training.learning-rate": [1e-6, 0.01]},
        settings={
            **{"data.name": "csv", "data.path": "own.csv", "data.label": "y"},
            **{"data.task": "regression", "run.rounds": 2, "partition.name": "iid"},
            **{"partition.clients": 2, "model.name": "mlp", "training.epochs": 9},
        },
        workers=1,
    )
    assert list(dict.fromkeys(found.summary["metric"])) == ["test_rmse", "test_r2"]
    assert found.summary["difference"][1] < 0
    values = [run["test_rmse"] for run in found.cells.to_dict("records")]
    assert found.summary["mean"][1] == pytest.approx(sum(values[3:]) / 3)
    # Of the same numbers, less by as much each time.
    worse = [3, 2, 1, 2.5, 1.4, 0.6]
    cells = found.cells.assign(test_rmse=worse, test_r2=worse).to_dict("records")
    rows = summary_of(cells)
    assert [rows[k]["verdict"] for k in (1, 3)] == ["better", "worse"]
