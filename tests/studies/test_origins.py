"""Runs of other data or other code are not held against each other."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedweight
from fedweight import compare
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.data import DataSet, Examples, digest_of_files, load
from fedweight.studies import contribution
from fedweight.studies.cells import LastData
from fedweight.studies.configuration import Configuration

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 3,
    "training.epochs": 1,
    "model.name": "softmax",
}
OWN = """
from fedweight.strategies import WeightingStrategy

class Ed(WeightingStrategy):
    def weights(self, round):
        return round.size_weights

class Flo(WeightingStrategy):
    def weights(self, round):
        return round.size_weights
"""


DRAWN = """
import numpy as np
from fedweight.data import DataSet, Examples

def drawn(seed):
    rng = np.random.default_rng(seed)
    part = Examples(rng.normal(size=(60, 2)).astype("float32"), np.arange(60) % 2)
    return DataSet("drawn", part, part, 2)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("own_ed", None)


def write_csv(path: Path, shift: int = 0) -> None:
    rows = [f"{k % 7},{k % 5},{(k + shift) % 2}" for k in range(60)]
    path.write_text("\n".join(["a,b,y", *rows]))


def write_own(path: Path, text: str = OWN) -> None:
    (path / "own_ed.py").write_text(text)
    sys.modules.pop("own_ed", None)


CSV = {"data.name": "csv", "data.path": "own.csv", "data.label": "y"}


def test_other_data_are_not_mixed_in(here: Path) -> None:
    write_csv(here / "own.csv")
    given: dict[str, Any] = {"settings": {**QUICK, **CSV}, "out": "c", "workers": 1}
    compare(None, "fedavg", "0-1", **given)
    assert compare(None, "fedavg", "0-1", **given).failures == {}
    write_csv(here / "own.csv", shift=1)
    for seeds in ("0-1", "0-2"):
        with pytest.raises(ConfigurationError) as caught:
            compare(None, "fedavg", seeds, **given)
        said = str(caught.value)
        assert said.startswith(f"the data ({here / 'own.csv'}) changed since ")
        assert "fedavg-seed0 and fedavg-seed1 ran. They cannot be held" in said
        assert "delete the folders fedavg-seed0 and fedavg-seed1 in c and give" in said
    assert not (here / "c" / "fedavg-seed2").exists()
    for seed in (0, 1):
        shutil.rmtree(here / "c" / f"fedavg-seed{seed}")
    assert len(compare(None, "fedavg", "0-2", **given).cells) == 3


def test_other_code_is_not_mixed_in(here: Path) -> None:
    write_own(here)
    given: dict[str, Any] = {"settings": QUICK, "out": "c", "workers": 1}
    compare(None, "fedavg,own_ed:Ed", "0", **given)
    # Another class of the file may change, and be added.
    write_own(here, OWN.replace("class Flo", "class Florence"))
    compare(None, "fedavg,own_ed:Ed,own_ed:Florence", "0", **given)
    changed = OWN.replace("round.size_weights", "round.size_weights ** 2", 1)
    write_own(here, changed.replace("class Flo", "class Florence"))
    with pytest.raises(ConfigurationError) as caught:
        compare(None, "fedavg,own_ed:Ed,own_ed:Florence", "0-1", **given)
    assert str(caught.value).startswith(
        "the code of strategy.name (own_ed:Ed) changed since ed-seed0 ran."
    )
    assert "delete the folder ed-seed0 in c" in str(caught.value)


def test_data_given_in_python_are_looked_at_every_time(here: Path) -> None:
    given: dict[str, Any] = {"settings": QUICK, "out": "c"}
    data = load("digits")
    compare(None, "fedavg", "0", dataset=data, **given)
    compare(None, "fedavg", "0", dataset=replace(data), **given)
    data.train.y[:] = data.train.y[::-1].copy()
    with pytest.raises(ConfigurationError, match=r"the data \(digits\) changed since"):
        compare(None, "fedavg", "0-1", dataset=data, **given)


def test_a_folder_from_before_goes_on_with_a_line(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_csv(here / "own.csv")
    given: dict[str, Any] = {"settings": {**QUICK, **CSV}, "out": "c", "workers": 1}
    compare(None, "fedavg", "0", **given)
    path = here / "c" / "fedavg-seed0" / "environment.json"
    about = json.loads(path.read_text())
    assert set(about.pop("made_of")) == {"data"}
    path.write_text(json.dumps(about))
    write_csv(here / "own.csv", shift=1)
    with caplog.at_level(logging.WARNING, "fedweight"):
        assert len(compare(None, "fedavg", "0-1", **given).cells) == 2
    assert "c: fedavg-seed0: written before runs kept digests" in caplog.text


class Stop(Exception):
    pass


def stop_after_two(state: Any) -> None:
    if state.round == 2:
        raise Stop


@pytest.mark.parametrize("what", ["data", "code"])
def test_a_run_goes_on_with_the_same_only(here: Path, what: str) -> None:
    write_csv(here / "own.csv")
    write_own(here)
    with pytest.raises(Stop):
        fedweight.run(
            strategy="own_ed:Ed",
            settings={**QUICK, **CSV, "run.checkpoint-rounds": 1, "run.rounds": 3},
            out="r",
            report=False,
            progress=False,
            callbacks=[stop_after_two],
        )
    changes = {
        "data": lambda shift: write_csv(here / "own.csv", shift),
        "code": lambda shift: write_own(
            here, OWN.replace("weights\n", "weights + 0\n") if shift else OWN
        ),
    }
    changes[what](1)
    called = {"data": "the data (", "code": "the code of strategy.name (own_ed:Ed)"}
    with pytest.raises(DataError) as caught:
        fedweight.resume("r", report=False, progress=False)
    assert str(caught.value).startswith(called[what])
    assert "changed since the run in r began" in str(caught.value)
    changes[what](0)
    assert fedweight.resume("r", report=False, progress=False).complete


def test_contributions_are_of_the_same_data(here: Path) -> None:
    write_csv(here / "own.csv")
    settings = {**QUICK, **CSV, "partition.name": "iid", "partition.clients": 2}
    contribution(settings=settings, out="k")
    write_csv(here / "own.csv", shift=1)
    with pytest.raises(DataError, match=r"own\.csv\) changed since the run in k"):
        contribution(settings=settings, out="k")


def points(**changes: Any) -> DataSet:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(20, 2)).astype(np.float32)
    part = Examples(x, np.arange(20) % 2, {"sex": np.array(["f", "m"] * 10, object)})
    return DataSet(
        "points", **{"train": part, "test": part, "num_classes": 2} | changes
    )


def test_a_digest_is_of_all_that_data_hold() -> None:
    usual, part = points().digest, points().train
    assert points().digest == points(notes=("x",)).digest == usual
    assert replace(points(), name="other").digest == usual
    flipped = Examples(part.x, 1 - part.y, part.attributes)
    other = {"sex": part.attributes["sex"][::-1]}
    regrouped = Examples(part.x, part.y, other)
    several = [
        points(train=flipped),
        points(test=flipped),
        points(train=regrouped),
        points(train=Examples(part.x.astype(np.float64), part.y, part.attributes)),
        points(num_classes=3),
        points(natural_clients=np.arange(20) % 4),
        points(class_names=("no", "yes")),
    ]
    assert len({usual, *(one.digest for one in several)}) == 1 + len(several)


def test_data_of_files_are_known_by_these_whatever_is_drawn(here: Path) -> None:
    write_csv(here / "own.csv")
    write_csv(here / "more.csv")
    one, other = (load("csv", "own.csv", seed, label="y") for seed in (0, 1))
    assert not np.array_equal(one.train.x, other.train.x)
    known = digest_of_files("csv", "own.csv", label="y")
    assert one.digest == other.digest == known
    # Data that were changed after they were read are known by what they hold.
    assert replace(one).digest != replace(other).digest
    two = load("csv", "own.csv", label="y", test="more.csv").digest
    write_csv(here / "more.csv", shift=1)
    assert load("csv", "own.csv", label="y", test="more.csv").digest != two != known
    assert digest_of_files("digits") == ""
    configuration = Configuration.read(None, {**CSV, "data.path": "own.csv"})
    assert LastData().digest(configuration) == known
    usual = Configuration.read(None, {})
    assert LastData().digest(usual) == load("digits").digest


def test_a_digest_costs_little(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all cells of one data set: the object, and the process, keep it."""
    last, configuration = LastData(), Configuration.read(None, {})
    data = last.of(configuration)
    assert last.digest(configuration) is data.digest is data.digest
    write_csv(here / "own.csv")
    of_file = Configuration.read(None, CSV)
    before = last.digest(of_file)
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", None)
        assert last.digest(of_file) == before
    write_csv(here / "own.csv", shift=1)
    assert last.digest(of_file) != before


def test_what_changes_while_it_runs_is_noticed(here: Path) -> None:
    write_csv(here / "own.csv")

    def told(ended: Any) -> None:
        write_csv(here / "own.csv", shift=1)

    given: dict[str, Any] = {"settings": {**QUICK, **CSV}, "out": "c", "workers": 1}
    with pytest.raises(ConfigurationError) as caught:
        compare(None, "fedavg", "0-1", progress=told, **given)
    assert "own.csv) changed while this ran: one part of the" in str(caught.value)
    assert "runs are fedavg-seed0; others fedavg-seed1." in str(caught.value)
    assert not (here / "c" / "summary.csv").exists()
    shutil.rmtree(here / "c" / "fedavg-seed0")
    assert len(compare(None, "fedavg", "0-1", **given).cells) == 2


def test_own_data_may_be_others_with_each_seed(here: Path) -> None:
    (here / "own_ed.py").write_text(DRAWN)
    settings = {**QUICK, "data.name": "own_ed:drawn"}
    found = compare(None, "fedavg,ida", "0-1", settings=settings, out="c", workers=1)
    digests = [
        json.loads((found.folder / name / "environment.json").read_text())["made_of"]
        for name in found.cells["folder"]
    ]
    assert digests[0] == digests[2] != digests[1] == digests[3]
    assert {*digests[0]} == {"data", "data.name"}
    compare(None, "fedavg,ida", "0-2", settings=settings, out="c", workers=1)
