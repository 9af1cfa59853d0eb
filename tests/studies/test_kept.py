"""What clients keep, read after a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedweight import Run, resume, run
from fedweight.clients.client_state import BUFFERS, INTEGERS, PARAMETERS
from fedweight.core.client_store import ClientRows, ClientStore
from fedweight.core.errors import DataError, OutputError
from fedweight.core.layout import Layout
from fedweight.data import DataSet, Examples
from fedweight.studies import kept
from fedweight.studies.kept import PerClient, write_kept

QUICK: dict[str, Any] = {
    "run.rounds": 2,
    "partition.clients": 5,
    "training.epochs": 1,
    "strategy.fraction-train": 0.5,
    "engine.name": "local",
}


def module() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    made[0].bias.requires_grad_(False)
    return made


@pytest.mark.parametrize("block", [1, 200, 1 << 20])
def test_rows_are_read_as_they_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(kept, "BLOCK", block)
    layout = Layout.of_module(module())
    rng = np.random.default_rng(0)
    clients = np.array([7, 2, 11, 0])
    sizes = layout.num_parameters, layout.num_buffers
    store = ClientStore()
    rows = ClientRows(
        clients,
        {
            PARAMETERS: rng.normal(size=(4, sizes[0])).astype(np.float32),
            BUFFERS: rng.normal(size=(4, sizes[1])).astype(np.float32),
            INTEGERS + "1.num_batches_tracked": np.arange(4),
            "carry weights": rng.normal(size=(4, 3)),
        },
        {"kept loss": rng.normal(size=9).astype(np.float32)},
        np.array([2, 0, 4, 3]),
    )
    store.write("personal", rows)
    write_kept(tmp_path, store, lambda: layout)
    assert [p.name for p in tmp_path.iterdir()] == ["personal-models.safetensors"]
    base = {"0.bias": torch.tensor([5.0, 6.0])}
    path, names = tmp_path / "personal-models.safetensors", {2: "b", 7: "a"}
    found = PerClient(path, lambda c: names.get(c, str(c)), lambda: base)
    states = PerClient(path, str)
    assert [*found] == sorted(clients.tolist())
    assert 3 not in found
    with pytest.raises(KeyError, match=r"'aa'. Did you mean 'a'"):
        found["aa"]
    for k, client in enumerate(clients.tolist()):
        own = found[client]
        assert own.keys() == module().state_dict().keys()
        for e in layout.parameters:
            np.testing.assert_array_equal(
                own[e.name].reshape(-1), rows.arrays[PARAMETERS][k, e.start : e.stop]
            )
        np.testing.assert_array_equal(
            torch.cat([own["1.running_mean"], own["1.running_var"]]),
            rows.arrays[BUFFERS][k],
        )
        assert own["1.num_batches_tracked"] == k
        assert own["0.bias"].tolist() == [5.0, 6.0]
        carried = states[client]
        np.testing.assert_array_equal(
            carried["carry weights"], rows.arrays["carry weights"][k]
        )
        begin = int(rows.ends[k] - rows.lengths[k])
        np.testing.assert_array_equal(
            carried["kept loss"], rows.items["kept loss"][begin : rows.ends[k]]
        )
    assert found["a"].keys() == found[7].keys()
    assert torch.equal(found["a"]["0.weight"], found[7]["0.weight"])


def test_a_personal_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    settings = QUICK | {"personal.name": "ditto", "objective.name": "aldr"}
    found = run(settings=settings, out=tmp_path / "run", report=False)
    measured = found.clients.dropna(subset="personal_accuracy")
    last = measured[measured["round"] == 2].set_index("client")["personal_accuracy"]
    models = found.personal_models()
    assert [*models] == last.index.tolist()
    for client in models:
        own = found.predictions(clients=[client], model=models[client])
        right = (own["target"] == own["prediction"]).mean()
        assert right == pytest.approx(last[client])
    state = found.client_states()[last.index[0]]
    partition = found.partition.set_index("client")
    [name] = state
    assert len(state[name]) == partition["train_examples"][last.index[0]]


def test_own_layers_come_with_the_last_global_model(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    y = np.arange(60) % 3
    names = np.array([f"site {k % 4}" for k in range(60)])
    data = DataSet(
        "own", Examples(x, y), Examples(x[:6], y[:6]), 3, natural_clients=names
    )
    settings = {
        "run.rounds": 1,
        "partition.name": "natural",
        "partition.clients": 0,
        "model.head": "etf",
        "personal.name": "fedetf",
        "personal.turns": 1,
        "training.epochs": 1,
    }
    found = run(settings=settings, dataset=data, out=tmp_path / "run", report=False)
    shared, models = found.model(), found.personal_models()
    for k in range(4):
        own = models[f"site {k}"]
        moved = {n for n in shared if not torch.equal(shared[n], own[n])}
        head = ("etf", "projection.weight", "projection.bias")
        assert moved == {f"layers.2.{name}" for name in head}


def test_what_nobody_keeps_is_not_there(tmp_path: Path) -> None:
    plain = run(settings=QUICK, out=tmp_path / "plain", report=False)
    with pytest.raises(DataError, match=r"personal-models.safetensors is missing"):
        plain.personal_models()
    off = QUICK | {"personal.name": "ditto", "run.keep-clients": False}
    found = run(settings=off, out=tmp_path / "off", report=False)
    with pytest.raises(DataError, match=r"unless run.keep-clients = false"):
        found.personal_models()
    (found.folder / "personal-models.safetensors").write_bytes(b"no model")
    with pytest.raises(DataError, match="cannot be read"):
        Run(found.folder).personal_models()


def test_a_full_disk_leaves_no_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ClientStore()
    store.write("objective", ClientRows(np.array([1]), {"carry n": np.ones((1, 2))}))

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "_write", full)
    with pytest.raises(OutputError, match="Make room"):
        write_kept(tmp_path, store, lambda: Layout(()))
    assert not [*tmp_path.iterdir()]


def test_a_run_whose_clients_could_not_be_written_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    settings = QUICK | {"personal.name": "ditto", "run.checkpoint-rounds": 1}
    whole = run(settings=settings, out=tmp_path / "whole", report=False)
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_write", full)
        with pytest.raises(OutputError, match="Make room"):
            run(settings=settings, out=tmp_path / "run", report=False)
    assert not Run(tmp_path / "run").complete
    found = resume(tmp_path / "run", report=False)
    assert found.complete
    for name in ("personal-models.safetensors", "model.safetensors", "rounds.csv"):
        mine, other = found.folder / name, whole.folder / name
        assert mine.read_bytes() == other.read_bytes()
