"""A run that was killed goes on from its last checkpoint, with the same bits."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedweight import Run, resume, run
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.studies.folder import CHECKPOINT, old_folder

ROUNDS = 8
QUICK: dict[str, Any] = {
    "run.rounds": ROUNDS,
    "run.checkpoint-rounds": 2,
    "partition.clients": 6,
    "training.epochs": 1,
    "strategy.fraction-train": 0.7,
}
OWN = """
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam

class Private(DifferentialPrivacyServerSideFixedClipping):
    def __init__(self):
        super().__init__(FedAdam(fraction_train=0.7, eta=0.01), 0.01, 1.0, 4)
"""
BUFFERED = {
    "strategy.fraction-train": 1.0,
    "schedule.name": "buffered",
    "schedule.buffer-size": 2,
    "schedule.concurrency": 5,
}
METHODS: dict[str, dict[str, Any]] = {
    "fedce, momentum": {"strategy.name": "fedce", "server.name": "momentum"},
    "fedlaw, adam": {"strategy.name": "fedlaw", "server.name": "adam"},
    "feddisco": {"strategy.name": "feddisco", "partition.name": "dirichlet-sampled"},
    "Flower's FedAdam in its DP wrapper": {"strategy.name": "own_private:Private"},
    "ditto, aldr": {
        "strategy.name": "fedavg",
        "objective.name": "aldr",
        "personal.name": "ditto",
        "engine.plan": "batched-2",
    },
    "fedetf": {
        "strategy.name": "fedavg",
        "model.head": "etf",
        "personal.name": "fedetf",
        "personal.turns": 1,
    },
    "fedbuff": {"strategy.name": "fedbuff", "server.name": "momentum", **BUFFERED},
}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_private.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def settings_of(method: str, engine: str) -> dict[str, Any]:
    settings = {**QUICK, **METHODS[method], "engine.name": engine}
    if engine == "ray":
        settings["engine.workers"] = 2
    if "own" in settings["strategy.name"]:
        del settings["strategy.fraction-train"]
    return settings


def written(folder: Path) -> dict[str, bytes]:
    """Return what the clock does not decide, nor at which moment a run was killed."""
    timed = {"timings.csv", "report.html", "environment.json", ".lock"}
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in timed}


@pytest.mark.usefixtures("own_module", "ready_ray")
@pytest.mark.filterwarnings("ignore")  # Flower's own.
@pytest.mark.parametrize(
    ("method", "engine"),
    [
        *((method, "local") for method in METHODS),
        *(
            pytest.param(
                method,
                "ray",
                marks=[pytest.mark.ray, pytest.mark.timeout(400)],
            )
            for method in ("fedce, momentum", "ditto, aldr", "fedbuff")
        ),
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    tmp_path: Path,
    killed: Any,
    method: str,
    engine: str,
    request: pytest.FixtureRequest,
) -> None:
    import numpy as np

    settings = settings_of(method, engine)
    join = ""
    if engine == "ray":  # The session's, with workers of its own.
        ray = request.getfixturevalue("ray_session")
        address = ray.get_runtime_context().gcs_address
        join = f"import ray\nray.init({address!r}, log_to_driver=False)"
    seconds = random.Random(method + engine).random()
    killed(tmp_path / "killed", settings, seconds, join)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    run(settings=settings, out=tmp_path / "whole", report=False)
    before = Run(tmp_path / "killed")
    assert before.rounds_done >= 2
    if not before.complete:
        random.seed(99)
        np.random.seed(99)  # noqa: NPY002
        resume(tmp_path / "killed", report=False)
    whole, other = written(tmp_path / "whole"), written(tmp_path / "killed")
    assert whole.keys() == other.keys()
    for name in whole:
        assert whole[name] == other[name], name
    assert Run(tmp_path / "killed").timings["round"].tolist() == [*range(ROUNDS + 1)]


class Stopped(Exception):
    """Ends a run between two rounds."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that ended after its fifth round."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(progress: Any) -> None:
        if progress.round == 5:
            raise Stopped

    with pytest.raises(Stopped) as caught:
        run(settings=QUICK, out=folder, report=False, progress=stop)
    assert f"fedweight resume {folder}" in " ".join(caught.value.__notes__)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


DITTO = {**QUICK, "objective.name": "aldr", "personal.name": "ditto"}


@pytest.fixture(scope="module")
def stopped_ditto(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose clients keep something, as ``stopped``."""
    folder = tmp_path_factory.mktemp("ditto") / "run"

    def stop(progress: Any) -> None:
        if progress.round == 5:
            raise Stopped

    with pytest.raises(Stopped):
        run(settings=DITTO, out=folder, report=False, progress=stop)
    return folder


def test_what_clients_keep_lies_beside_the_checkpoint(
    stopped_ditto: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped_ditto, tmp_path / "run"))
    files = sorted(folder.glob("client-store-*"))
    assert [path.name.rpartition("-")[0] for path in files] == [
        *["client-store-objective"] * 2,
        *["client-store-personal"] * 2,
    ]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(DataError, match=f"{path.name} has been altered"):
            resume(folder, report=False)
        path.write_bytes(whole)
    done = resume(folder, report=False)
    assert done.complete
    assert not list(folder.glob("client-store-*"))
    models = done.personal_models()
    assert [*models] == [*range(6)]
    assert (folder / "client-states.safetensors").is_file()


def test_a_run_with_what_clients_keep_may_be_overwritten(
    stopped_ditto: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stopped_ditto, tmp_path / "run"))
    settings = {**QUICK, "run.rounds": 1}
    run(settings=settings, out=folder, report=False, overwrite=True)
    assert not list(folder.glob("client-store-*"))
    (folder / "client-store-personal-3.rows").touch()
    with pytest.raises(ConfigurationError, match="nothing else"):
        run(settings=settings, out=folder, report=False, overwrite=True)


def refused(folder: Path, said: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((ConfigurationError, DataError), match=said) as caught:
        resume(folder, report=False)
    assert "\n" not in str(caught.value)
    assert not hasattr(caught.value, "__notes__")  # Not to do the same again.
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_that_is_not_whole_is_refused(folder: Path) -> None:
    path = folder / CHECKPOINT
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(folder, "checkpoint.safetensors is no whole checkpoint")
    altered = bytearray(whole)
    altered[-5] ^= 1
    path.write_bytes(bytes(altered))
    refused(folder, "checkpoint.safetensors has been altered")
    path.unlink()
    refused(folder, "checkpoint.safetensors is missing")


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 1"))
    refused(folder, "belongs to another run")
    config.write_text("# This file alone does not repeat its run: x.\n# To y.\n")
    refused(folder, "does not repeat its run")


@pytest.mark.parametrize("name", ["rounds", "clients", "timings", "partition"])
def test_tables_that_were_shortened_are_refused(folder: Path, name: str) -> None:
    table = folder / f"{name}.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    refused(folder, rf"{name}\.csv has 2 rows, and \d+ when")
    table.unlink()
    refused(folder, rf"{name}\.csv (has 0 rows, and \d+ when|is missing)")


def test_a_run_that_goes_on_is_left_alone(folder: Path) -> None:
    said = "another run is writing to"
    with old_folder(folder), pytest.raises(ConfigurationError, match=said):
        resume(folder, report=False)


def test_a_run_that_is_over_has_nothing_to_go_on_with(folder: Path) -> None:
    assert resume(folder, report=False).complete
    assert not (folder / CHECKPOINT).exists()
    refused(folder, "is complete")


def test_a_strategy_that_cannot_be_written_down_is_named_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "own_odd.py").write_text(
        "import threading\n"
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Odd(FedAvg):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.lock = threading.Lock()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = {**QUICK, "run.rounds": 1, "strategy.name": "own_odd:Odd"}
    del settings["strategy.fraction-train"]
    run(settings=settings, out=tmp_path / "run", report=False)
    assert "no checkpoint can hold its lock" in caplog.text
