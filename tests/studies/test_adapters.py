"""Runs in which a part of the model is frozen: what travels, and what is kept."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common.serde import recorddict_to_proto
from safetensors.torch import load_file

import fedweight
from fedweight import models
from fedweight.core.layout import Layout
from fedweight.data import DataSet, Examples
from fedweight.models.adapters import load_peft, save_peft
from fedweight.simulations import local

LENGTH, TOKENS, CLIENTS = 6, 12, 5
MODEL: dict[str, Any] = {"width": 8, "heads": 2, "depth": 1}
LORA: dict[str, Any] = {**MODEL, "adapters": "lora", "rank": 2, "alpha": 4.0}

PRIVATE = """
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from fedweight.strategies import FedAvg

class Private(DifferentialPrivacyServerSideFixedClipping):
    def __init__(self):
        super().__init__(FedAvg(), 0.01, 1.0, 4)
"""


def texts() -> DataSet:
    """Texts in which a token follows the one before by each client's own rule."""
    rng = np.random.default_rng(0)
    parts, clients = [], []
    for client in range(CLIENTS):
        first = rng.integers(0, TOKENS, 40)
        x = (first[:, None] + np.arange(LENGTH) * (1 + client % 2)) % TOKENS
        y = (first + LENGTH * (1 + client % 2)) % TOKENS
        parts.append((x, y))
        clients.append(np.full(len(y), client))
    x = np.concatenate([a for a, _ in parts])
    y = np.concatenate([b for _, b in parts])
    whole = Examples(x.astype(np.int64), y)
    return DataSet(
        "texts", whole, whole, TOKENS, natural_clients=np.concatenate(clients)
    )


def settings_of(**more: Any) -> dict[str, Any]:
    model = {f"model.{key}": value for key, value in LORA.items()}
    return {
        "model.name": "char-transformer",
        **model,
        "partition.name": "natural",
        "partition.clients": 0,
        "data.proxy": 0.1,
        "run.rounds": 3,
        "training.epochs": 1,
        "training.learning-rate": 0.5,
        "engine.name": "local",
        **more,
    }


def run(**more: Any) -> fedweight.Run:
    named = {key.replace("__", ".").replace("_", "-"): v for key, v in more.items()}
    return fedweight.run(
        settings=settings_of(**named), dataset=texts(), report=False, progress=False
    )


def built(**options: Any) -> torch.nn.Module:
    given = {**LORA, **options}
    return models.build("char-transformer", (LENGTH,), TOKENS, seed=0, **given)


def adapters() -> tuple[int, set[str]]:
    """Return how many bytes the adapters are, and their names."""
    layout = Layout.of_module(built())
    return layout.travelling.num_bytes, {e.name for e in layout.parameters}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "own_private_lora.py").write_text(PRIVATE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)


def assert_kept(found: dict[str, torch.Tensor]) -> None:
    """The base has the bits that it was built with; adapters were trained."""
    before = built().state_dict()
    assert set(found) == set(before)
    for name, tensor in before.items():
        changed = name in adapters()[1]
        assert torch.equal(found[name], tensor) != changed, name


@pytest.mark.parametrize("strategy", ["fedavg", "fedlaw", "fedce", "ida"])
@pytest.mark.parametrize("plan", ["loop", "batched-3"])
def test_only_adapters_travel_and_the_model_is_whole(elsewhere, strategy, plan):
    result = run(strategy__name=strategy, engine__plan=plan, run__keep_best="")
    size, _ = adapters()
    asked = 8 if strategy == "fedce" else 0
    for row in result.clients.itertuples():
        assert row.bytes_up == size + asked
        told = 8 if strategy == "fedce" and row.round > 1 else 0
        assert row.bytes_down - told in (size, 2 * size)  # With evaluation.
    assert result.rounds.bytes_up.tolist()[1:] == [CLIENTS * (size + asked)] * 3
    assert size < sum(p.numel() * 4 for p in built().parameters()) / 3
    found = load_file(result.folder / "model.safetensors")
    assert_kept(found)
    model = built()
    model.load_state_dict(found)  # It is a model of PyTorch's.
    losses = result.rounds.test_loss.tolist()
    assert losses[-1] < losses[0]


def test_at_once_is_as_one_after_another(elsewhere):
    one = load_file(run(engine__plan="loop").folder / "model.safetensors")
    several = load_file(run(engine__plan="batched-5").folder / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_strategy_that_is_not_ours_has_all_of_the_model(elsewhere, caplog):
    result = run(strategy__name="flwr.serverapp.strategy:FedAvg")
    lines = [r.message for r in caplog.records if "whole model travels" in r.message]
    assert len(lines) == 1
    assert "FedAvg" in lines[0]
    assert {r.levelno for r in caplog.records if r.message in lines} == {
        logging.WARNING
    }
    whole = Layout.of_module(built()).num_bytes
    assert set(result.clients.bytes_up) >= {whole}
    found = load_file(result.folder / "model.safetensors")
    assert {e.name for e in Layout.of_module(built()).entries} == set(found)


OWN = """
import torch
from torch import nn
from flwr.serverapp.strategy import FedAvg

def partly(input_shape, num_classes):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Embedding(num_classes, 8), nn.Flatten(), nn.Linear(48, num_classes)
    )
    model[0].requires_grad_(False)
    return model

class Alone(FedAvg):
    def start(self, *arguments, **named):
        return super().start(*arguments, **named)
"""
FLOWERS = [
    "flwr.serverapp.strategy:FedAvg",
    "flwr.serverapp.strategy:FedAdam",
    "own_partly:Alone",
]


@pytest.mark.parametrize("strategy", FLOWERS)
def test_frozen_tensors_keep_their_bits_whatever_the_strategy(
    elsewhere, tmp_path, strategy
):
    (tmp_path / "own_partly.py").write_text(OWN)
    assert_kept(load_file(run(strategy__name=strategy).folder / "model.safetensors"))


@pytest.mark.parametrize("strategy", FLOWERS)
def test_without_adapters_frozen_tensors_keep_their_bits_too(
    elsewhere, tmp_path, strategy
):
    (tmp_path / "own_partly.py").write_text(OWN)
    settings = settings_of(
        **{"model.name": "own_partly:partly", "strategy.name": strategy}
    )
    settings = {
        key: value
        for key, value in settings.items()
        if key == "model.name" or not key.startswith("model.")
    }
    result = fedweight.run(
        settings=settings, dataset=texts(), report=False, progress=False
    )
    found = load_file(result.folder / "model.safetensors")
    before = importlib.import_module("own_partly").partly((LENGTH,), TOKENS)
    for name, tensor in before.state_dict().items():
        assert torch.equal(found[name], tensor) == (name == "0.weight"), name


def test_of_a_model_that_is_trained_whole_nothing_is_told(elsewhere, caplog):
    caplog.set_level(logging.INFO, "fedweight")
    fedweight.run(
        settings={
            "run.rounds": 1,
            "training.epochs": 1,
            "strategy.name": "flwr.serverapp.strategy:FedAvg",
        },
        report=False,
        progress=False,
    )
    assert "whole model travels" not in caplog.text


def test_inside_a_wrapper_for_privacy_only_adapters_travel(elsewhere):
    result = run(strategy__name="own_private_lora:Private")
    size, names = adapters()
    assert set(result.clients.bytes_up) == {size}
    found = load_file(result.folder / "model.safetensors")
    before = built().state_dict()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor) == (name not in names)


def test_the_best_model_is_whole_too(elsewhere):
    result = run(run__keep_best="evaluate-loss")
    assert_kept(load_file(result.folder / "best-model.safetensors"))


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(elsewhere, tmp_path):
    data = tmp_path / "texts.npz"
    table = texts()
    np.savez(data, x=table.train.x, y=table.train.y)
    settings = {
        **settings_of(),
        "data.name": "npz",
        "data.path": str(data),
        "data.proxy": 0.0,
        "partition.name": "iid",
        "partition.clients": CLIENTS,
        "run.checkpoint-rounds": 1,
        "run.rounds": 4,
    }

    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.round == 3:
            raise Stop

    def go(out: str, **more: Any) -> fedweight.Run:
        return fedweight.run(
            settings=settings, out=out, report=False, progress=False, **more
        )

    whole = go("whole")
    with pytest.raises(Stop):
        go("stopped", callbacks=[stops])
    again = fedweight.resume("stopped", report=False, progress=False)
    for name in ("model.safetensors", "rounds.csv", "clients.csv"):
        one, other = whole.folder / name, again.folder / name
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
def test_bytes_and_bits_are_the_same_on_ray(elsewhere):
    one = run(engine__plan="batched-2", strategy__name="ida")
    other = run(
        engine__plan="batched-2",
        strategy__name="ida",
        engine__name="ray",
        engine__workers=2,
    )
    for name in ("model.safetensors", "rounds.csv", "clients.csv"):
        mine, theirs = one.folder / name, other.folder / name
        assert mine.read_bytes() == theirs.read_bytes(), name


def test_adapters_of_a_run_are_files_of_peft(elsewhere, tmp_path):
    result = run()
    model = built()
    model.load_state_dict(load_file(result.folder / "model.safetensors"))
    save_peft(model, tmp_path / "adapter")
    other = built()
    load_peft(other, tmp_path / "adapter")
    x = torch.from_numpy(texts().test.x)
    assert torch.equal(other(x), model(x))
    assert not torch.equal(built()(x), model(x))


# What Flower would put on the wire.


class Weighed(local.LocalGrid):
    """Sends messages one by one, and weighs each as Flower writes it."""

    sums_models = False
    down: int
    up: int

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
        several = list(messages)
        replies = list(super().send_and_receive(several, timeout=timeout))
        type(self).down += sum(map(weight, several))
        type(self).up += sum(weight(r) for r in replies if len(r.content.array_records))
        return replies


def weight(message: Any) -> int:
    return int(recorddict_to_proto(message.content).ByteSize())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("strategy", ["fedavg", "flwr.serverapp.strategy:FedAvg"])
def test_bytes_are_those_of_flower_within_2_percent(
    elsewhere, monkeypatch, adapted, strategy
):
    from fedweight.simulations import engine

    Weighed.down = Weighed.up = 0
    monkeypatch.setattr(engine, "LocalGrid", Weighed)
    wide = {"model.width": 256, "model.rank": 64}
    if not adapted:
        wide = {"model.width": 64}
    settings = {**settings_of(), **wide, "strategy.name": strategy, "run.rounds": 1}
    settings["strategy.fraction-evaluate"] = 0.0
    if not adapted:
        for key in ("adapters", "rank", "alpha"):
            del settings[f"model.{key}"]
    result = fedweight.run(
        settings=settings, dataset=texts(), report=False, progress=False
    )
    row = result.rounds.iloc[-1]
    assert row.bytes_up == pytest.approx(Weighed.up, rel=0.02)
    assert row.bytes_down == pytest.approx(Weighed.down, rel=0.02)
