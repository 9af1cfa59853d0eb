"""Choosing a plan: measured once, remembered, and the same ever after."""

import json
import platform

import numpy as np
import pytest
import torch

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.steps import batched
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import planner
from fedweight.simulations.allocator import keep_freed_memory
from fedweight.simulations.local import LocalGrid
from fedweight.simulations.plan import Plan


@pytest.fixture
def kit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    part = Examples(x, rng.integers(0, 2, 8))

    def model():
        return torch.nn.Linear(4, 2)

    app = TrainingApp(
        model,
        lambda context: ClientData(part, part),
        num_classes=2,
        settings=TrainingSettings(batch_size=4),
    )
    return app, FlatRecord(FlatModule(model()).save())


def choose(kit, cache, about, monkeypatch, speeds):
    monkeypatch.setattr(planner, "num_cores", lambda: 2)
    measured = []

    def speed(app, arrays, clients, num_clients, plan):
        measured.append(plan.chunk)
        return speeds[plan.chunk]

    monkeypatch.setattr(planner, "_speed", speed)
    app, arrays = kit
    plan = planner.choose_plan(
        app,
        arrays,
        clients=range(40),
        num_clients=40,
        cohort=40,
        about=about,
        cache=cache,
    )
    return plan, measured


def test_the_fastest_plan_is_chosen_and_remembered(kit, tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "plans.json"
    speeds = {1: 100.0, 10: 150.0, 20: 300.0}
    first = choose(kit, cache, {"model": "a"}, monkeypatch, speeds)
    assert first == (Plan(20), [1, 10, 20])
    # However the clock would decide the next time.
    again = choose(kit, cache, {"model": "a"}, monkeypatch, {1: 9.0, 10: 1.0, 20: 1.0})
    assert again == (Plan(20), [])
    other, measured = choose(
        kit, cache, {"model": "b"}, monkeypatch, {1: 1, 10: 1, 20: 1}
    )
    assert (other, measured) == (Plan(1), [1, 10, 20])
    assert len(json.loads(cache.read_text())) == 2


def test_a_narrow_win_is_not_enough(kit, tmp_path, monkeypatch):
    speeds = {1: 100.0, 10: 105.0, 20: 109.0}
    plan, _ = choose(kit, tmp_path / "p.json", {}, monkeypatch, speeds)
    assert plan == Plan(1)


class LooksAround(torch.nn.Module):
    """An example's output depends on who shares its batch."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x - x.mean(0))


def test_where_many_at_once_would_give_something_else_nothing_is_measured(
    kit, tmp_path, monkeypatch
):
    cache, speeds = tmp_path / "plans.json", {1: 1.0, 10: 5.0, 20: 9.0}
    assert choose(kit, cache, {}, monkeypatch, speeds)[0] == Plan(20)
    app, arrays = kit
    app = TrainingApp(LooksAround, app.data, num_classes=2)
    for about in ({"model": "another"}, {}):  # The other's plan may be remembered.
        chosen = choose((app, arrays), cache, about, monkeypatch, speeds)
        assert chosen == (Plan(1), [])


def test_a_broken_or_forbidden_cache_costs_only_the_memory(kit, tmp_path, monkeypatch):
    broken = tmp_path / "plans.json"
    broken.write_text("{half")
    speeds = {1: 1.0, 10: 5.0, 20: 2.0}
    assert choose(kit, broken, {}, monkeypatch, speeds)[0] == Plan(10)
    blocked = tmp_path / "file" / "plans.json"
    blocked.parent.write_text("not a folder")
    assert choose(kit, blocked, {}, monkeypatch, speeds)[0] == Plan(10)


def test_the_speed_is_of_real_training(kit, monkeypatch):
    monkeypatch.setattr(planner, "LEAST_SECONDS", 0.01)
    app, arrays = kit
    assert planner._speed(app, arrays, [0, 1, 2], 5, Plan(1)) > 0
    assert planner._speed(app, arrays, [0, 1, 2, 3], 5, Plan(2)) > 0


def test_tracing_is_over_before_the_measurement_begins(kit, monkeypatch):
    app, arrays = kit
    app = TrainingApp(
        app.model,
        app.data,
        num_classes=2,
        settings=TrainingSettings(batch_size=4, epochs=2 * batched.SEVERAL),
    )
    sent, traced = [], []
    send, several, trace = (
        LocalGrid.send_and_receive,
        batched.several,
        batched.ChunkStep.trace,
    )
    monkeypatch.setattr(
        LocalGrid, "send_and_receive", lambda *a: sent.append(0) or send(*a)
    )
    monkeypatch.setattr(
        batched, "several", lambda *a: traced.append(len(sent)) or several(*a)
    )
    monkeypatch.setattr(
        batched.ChunkStep,
        "trace",
        lambda *a, **k: traced.append(len(sent)) or trace(*a, **k),
    )
    planner._speed(app, arrays, [0, 1, 2, 3], 5, Plan(2))
    assert len(traced) >= 2
    assert max(traced) <= planner.WARM_UPS < len(sent)


@pytest.mark.parametrize(("text", "plan"), [("loop", Plan(1)), ("batched-7", Plan(7))])
def test_a_plan_is_read_as_it_is_written(text, plan):
    assert Plan.parse(text) == plan
    assert str(plan) == text


@pytest.mark.parametrize("text", ["batched-1", "batched", "batched-x", "fast", ""])
def test_an_unknown_plan_is_refused(text):
    with pytest.raises(
        ConfigurationError, match=r"engine\.plan must be 'auto', 'loop'"
    ):
        Plan.parse(text)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told"
)
def test_memory_is_kept_where_the_allocator_can():
    assert keep_freed_memory()


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()
