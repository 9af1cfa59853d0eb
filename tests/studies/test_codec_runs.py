"""Runs whose clients write what they have trained with fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedweight
from fedweight.core.errors import ConfigurationError

SETTINGS: dict[str, Any] = {
    "partition.clients": 6,
    "run.rounds": 3,
    "training.epochs": 1,
    "model.name": "softmax",
    "strategy.fraction-train": 0.5,
}
PARAMETERS = 64 * 10 + 10  # 8 x 8 pixels, 10 classes


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(**more: Any) -> fedweight.Run:
    keys = {key.replace("__", "."): value for key, value in more.items()}
    keys = {key.replace("_", "-"): value for key, value in keys.items()}
    settings = {**SETTINGS, **keys}
    return fedweight.run(settings=settings, report=False, progress=False)


def parameters(result: fedweight.Run) -> torch.Tensor:
    found = load_file(result.folder / "model.safetensors")
    return torch.cat([found[name].reshape(-1) for name in sorted(found)])


def test_fewer_bits_are_fewer_bytes_and_lose_little():
    dense = run()
    up, down = 3 * 4 * PARAMETERS, 3 * 4 * PARAMETERS
    assert dense.rounds.bytes_up.tolist()[1:] == [up] * 3
    far = []
    for bits in (12, 8, 3):
        result = run(codec__name="low-bits", codec__bits=bits)
        size = 4 + 640 * bits // 8 + 4 + -(-10 * bits // 8)
        assert result.rounds.bytes_up.tolist()[1:] == [3 * size] * 3
        assert (result.rounds.bytes_down == dense.rounds.bytes_down).all()
        far.append(float((parameters(result) - parameters(dense)).norm()))
    assert 0 < far[0] < far[1] < far[2]
    assert far[0] < 1e-3 * parameters(dense).norm()
    assert down  # evaluation brings the model once more


def test_two_bytes_a_value():
    result = run(codec__name="bfloat16")
    assert result.rounds.bytes_up.tolist()[1:] == [3 * 2 * PARAMETERS] * 3


def same_files(one: fedweight.Run, other: fedweight.Run) -> None:
    for name in ("model.safetensors", "rounds.csv", "clients.csv"):
        mine, theirs = one.folder / name, other.folder / name
        assert mine.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("strategy", ["fedavg", "ida"])
def test_clients_at_once_lose_what_each_alone_loses(strategy):
    more = {"strategy__name": strategy, "codec__name": "low-bits"}
    more["codec__rounding"] = "nearest"
    loop = run(engine__plan="loop", **more)
    batched = run(engine__plan="batched-2", **more)
    # A value next to a border may be read as the next level.
    torch.testing.assert_close(parameters(loop), parameters(batched), atol=2e-3, rtol=0)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits():
    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.round == 2:
            raise Stop

    settings = {**SETTINGS, "codec.name": "low-bits", "run.checkpoint-rounds": 1}

    def go(out: str, **more: Any) -> fedweight.Run:
        return fedweight.run(
            settings=settings, out=out, report=False, progress=False, **more
        )

    whole = go("whole")
    with pytest.raises(Stop):
        go("stopped", callbacks=[stops])
    same_files(whole, fedweight.resume("stopped", report=False, progress=False))


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
@pytest.mark.parametrize("strategy", ["fedavg", "ida"])
def test_bytes_and_bits_are_the_same_on_ray(strategy):
    more = {"strategy__name": strategy, "codec__name": "low-bits"}
    more["engine__plan"] = "batched-2"
    here = run(**more)
    for workers in (1, 2):
        same_files(here, run(engine__name="ray", engine__workers=workers, **more))


def test_a_strategy_that_cannot_read_it_is_refused():
    with pytest.raises(ConfigurationError, match=r"codec\.name is 'low-bits'.*FedAvg"):
        run(strategy__name="flwr.serverapp.strategy:FedAvg", codec__name="low-bits")


def test_options_are_checked():
    with pytest.raises(ConfigurationError, match=r"codec\.bits must be"):
        run(codec__name="low-bits", codec__bits=1)
    with pytest.raises(ConfigurationError, match=r"no codec"):
        run(codec__name="gzip")
    assert Path("runs").exists() is False
