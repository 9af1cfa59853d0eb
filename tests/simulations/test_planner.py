"""Choosing a plan: measured within some seconds, remembered, the same ever after."""

import json
import math
import platform
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.steps import batched
from fedweight.core.errors import ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.simulations import measuring, planner
from fedweight.simulations.allocator import keep_freed_memory
from fedweight.simulations.local import LocalGrid
from fedweight.simulations.measuring import Measured, Meter
from fedweight.simulations.plan import Plan
from fedweight.simulations.plan_search import MARGIN, Search
from fedweight.simulations.planner import plans_for

DENSE = torch.nn.Linear(4, 2)


class Machine:
    """A stand-in for devices and the clock: how fast each trains by each plan.

    Parameters
    ----------
    speeds : Mapping[str, Callable[[int], float]]
        By device, the updates a second of so many clients at once.
    most : Mapping[str, int], optional
        By device, how many it has room for.
    traced : float
        Seconds that each size takes besides.
    """

    def __init__(self, speeds, most=None, traced=0.02):
        self.speeds, self.most, self.traced = speeds, most or {}, traced
        self.tried, self.clock = [], 0.0

    def __call__(self, device, plan, limit):
        assert limit > 0
        self.tried.append((device, plan.chunk))
        if plan.chunk > self.most.get(device, math.inf):
            fits = plan
            while fits.chunk > self.most[device]:
                fits = fits.halved(fits.chunk)
            self.clock += self.traced
            return Measured(device, plan, None, self.traced, "no room", fits)
        speed = self.speeds[device](plan.chunk)
        took = self.traced + 3 * plan.chunk / speed
        self.clock += min(took, limit)
        if took > limit:
            return Measured(device, plan, None, limit, "cut off")
        return Measured(device, plan, speed, took)


# Updates a second of S: measured on a CPU, and for a card like on an H200.
def cpu(chunk):
    return 1_100 if chunk == 1 else 3_600 * (1.0 if chunk < 80 else 0.8)


def card(chunk):
    return 212 if chunk == 1 else min(10_300, 250 * chunk)


def chosen(
    speeds,
    cohort,
    *,
    updates=10_000,
    estimate=0.0,
    most=None,
    model=DENSE,
    traced=0.02,
):
    machine = Machine(speeds, most, traced)
    plans = {device: plans_for(device, model, cohort) for device in speeds}
    search = Search(machine, plans, updates=updates, estimate=estimate)
    return *search.best(), machine, search


@pytest.mark.parametrize("cohort", [20, 100, 1_000, 10_000])
def test_on_a_card_the_best_is_found_within_a_second(cohort):
    device, plan, machine, _ = chosen({"cuda": card, "cpu": cpu}, cohort)
    best = max(
        [card(p.chunk) for p in plans_for("cuda", DENSE, cohort)]
        + [cpu(p.chunk) for p in plans_for("cpu", DENSE, cohort)]
    )
    assert {"cuda": card, "cpu": cpu}[device](plan.chunk) >= 0.9 * best
    assert machine.clock <= 1.0
    assert len(machine.tried) <= 8


def test_the_cpu_is_taken_where_the_card_is_slower():
    def slow(chunk):
        return card(chunk) / 20

    device, plan, machine, _ = chosen({"cuda": slow, "cpu": cpu}, 100)
    assert device == "cpu"
    assert cpu(plan.chunk) == 3_600
    assert machine.clock <= 1.0


def test_a_cpu_that_cannot_win_is_cut_off_early():
    device, plan, machine, search = chosen(
        {"cuda": card, "cpu": lambda chunk: 0.2}, 100
    )
    assert (device, plan) == ("cuda", Plan(100))
    assert [chunk for on, chunk in machine.tried if on == "cpu"] == [1]
    notes = [one.note for one in search.found if one.device == "cpu"]
    assert notes == ["cut off", "not tried: it cannot be the fastest"]
    assert machine.clock <= 1.0


@pytest.mark.parametrize("model", [DENSE, torch.nn.Conv2d(1, 1, 3)])
def test_the_loop_of_a_cpu_takes_no_time_from_a_card(model):
    speeds = {"cuda": card, "cpu": lambda chunk: 0.2}
    _, plan, machine, _ = chosen(speeds, 100, model=model)
    assert plan == Plan(100)
    assert machine.clock <= 1.0


def test_a_cpu_stops_growing_once_it_does_not_get_faster():
    _, plan, machine, _ = chosen({"cpu": cpu}, 10_000, updates=10**7)
    assert [chunk for _, chunk in machine.tried] == [1, 10, 20]
    assert plan.chunk in (10, 20)


def test_a_card_goes_back_where_it_went_too_far():
    def falls(chunk):
        return 212 if chunk == 1 else min(250 * chunk, 40_000 * 160 / chunk)

    _, plan, machine, _ = chosen({"cuda": falls}, 10_000, updates=10**8)
    assert falls(plan.chunk) == 40_000
    assert machine.tried[1][1] > plan.chunk


@pytest.mark.parametrize("most", [3, 60, 150, 640])
def test_where_there_is_no_room_half_as_many_are_tried(most):
    _, plan, _, search = chosen(
        {"cuda": card}, 1_000, most={"cuda": most}, updates=10**6
    )
    assert plan.chunk <= most
    assert sum(one.too_many for one in search.found) >= 1
    assert plan.chunk == 1 or plan.chunk > most / 2 or card(plan.chunk) == 10_300


def test_two_percent_of_a_long_run_may_be_spent():
    def slow(chunk):
        return card(chunk) / 200

    short = chosen({"cuda": slow}, 100, updates=10)
    long = chosen({"cuda": slow}, 100, updates=10**6, estimate=10**6 / slow(1))
    assert short[1] != Plan(100)
    assert long[1] == Plan(100)
    assert short[2].clock <= 1.0 < long[2].clock <= 0.02 * 10**6 / slow(100)


@given(
    speeds=st.lists(st.floats(0.1, 1e5), min_size=30, max_size=30),
    cohort=st.integers(1, 10_000),
    updates=st.integers(1, 10**7),
    most=st.none() | st.integers(1, 1_000),
    traced=st.floats(0, 0.3),
    devices=st.sampled_from([["cuda"], ["cpu"], ["cuda", "cpu"]]),
)
def test_however_fast_devices_are_the_seconds_are_kept_and_the_fastest_is_taken(
    speeds, cohort, updates, most, traced, devices
):
    def of(which):
        return lambda chunk: speeds[which + math.ceil(math.log2(chunk))]

    given = {device: of(15 * (device == "cpu")) for device in devices}
    device, plan, machine, search = chosen(
        given,
        cohort,
        updates=updates,
        most=dict.fromkeys(devices, most) if most else None,
        traced=traced,
    )
    # What a size takes besides cannot be cut off.
    assert search.spent == pytest.approx(machine.clock)
    slowest = min((one.updates_per_second or 1e9 for one in search.found), default=1e9)
    assert machine.clock <= max(1.0, 0.02 * updates / slowest) + traced
    known = [one for one in search.found if one.updates_per_second]
    taken = [o for o in known if (o.device, o.plan) == (device, plan)]
    fastest = max((one.updates_per_second for one in known), default=0.0)
    if known:
        assert taken[0].updates_per_second * MARGIN >= fastest
    if most and plan.chunk > 1:
        assert plan.chunk <= most
    assert len(set(machine.tried)) == len(machine.tried)


def test_a_narrow_win_is_not_enough():
    _, plan, _, _ = chosen({"cpu": lambda chunk: 1_000 + 4 * chunk}, 20)
    assert plan == Plan(1)


# What is kept, and the real measurement.


@pytest.fixture
def kit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 4)).astype(np.float32)
    part = Examples(x, rng.integers(0, 2, 8))
    app = TrainingApp(
        lambda: torch.nn.Linear(4, 2),
        lambda context: ClientData(part, part),
        num_classes=2,
        settings=TrainingSettings(batch_size=4),
    )
    return app, FlatRecord(FlatModule(DENSE).save())


def choose(kit, cache, about, monkeypatch, speeds, plans=None, **more):
    machine = Machine(speeds, **more)
    monkeypatch.setattr(Meter, "__call__", lambda self, *given: machine(*given))
    monkeypatch.setattr(planner, "await_device", lambda device: None)
    monkeypatch.setattr(Meter, "let_go", lambda *_: None)
    app, arrays = kit
    choice = planner.choose_plan(
        lambda device: app,
        arrays,
        plans or {device: plans_for(device, DENSE, 40) for device in speeds},
        clients=range(40),
        num_clients=40,
        cohort=40,
        rounds=10,
        about=about,
        cache=cache,
    )
    return choice, machine


def test_the_choice_is_remembered_with_all_that_was_measured(
    kit, tmp_path, monkeypatch
):
    cache = tmp_path / "deep" / "plans.json"
    both = {"cuda": card, "cpu": cpu}
    first, machine = choose(kit, cache, {"model": "a"}, monkeypatch, both)
    assert (first.device, first.plan) == ("cuda", Plan(40))
    assert first.why["by"] == "a measurement"
    assert first.why["seconds"] == pytest.approx(machine.clock, abs=1e-3)
    assert first.why["seconds_allowed"] == 1.0
    rows = first.why["measured"]
    tried = [(row["device"], row["plan"]) for row in rows if row["updates_per_second"]]
    assert {("cuda", "loop"), ("cpu", "loop"), ("cuda", "batched-40")} <= {*tried}
    # However the clock would decide the next time.
    turned = {"cuda": cpu, "cpu": card}
    again, machine = choose(kit, cache, {"model": "a"}, monkeypatch, turned)
    assert (again.device, again.plan) == (first.device, first.plan)
    assert machine.tried == []
    assert again.why == {
        **first.why,
        "by": f"an earlier measurement, kept in {cache}",
    }
    choose(kit, cache, {"model": "b"}, monkeypatch, both)
    choose(kit, cache, {"model": "a"}, monkeypatch, {"cpu": cpu})
    assert len(json.loads(cache.read_text())) == 3


def test_what_had_no_room_in_a_run_is_remembered(kit, tmp_path, monkeypatch):
    cache = tmp_path / "plans.json"
    first, _ = choose(kit, cache, {}, monkeypatch, {"cuda": card})
    first.remember(Plan(20))
    again, _ = choose(kit, cache, {}, monkeypatch, {"cuda": card})
    assert again.plan == Plan(20)
    cache.unlink()
    again.remember(Plan(10))  # Nobody's, by now.
    assert not cache.exists()


def test_no_room_while_measuring_is_told_once_and_recorded(
    kit, tmp_path, monkeypatch, caplog
):
    room = {"cuda": 12}
    choice, _ = choose(
        kit, tmp_path / "p.json", {}, monkeypatch, {"cuda": card}, most=room
    )
    assert choice.plan == Plan(10)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("engine.plan: batched-40 is too many clients at once for")
    assert "no more than batched-10" in line
    notes = [row["note"] for row in choice.why["measured"] if "note" in row]
    assert notes.count("no room") == 1


def test_what_another_version_kept_is_passed_over(kit, tmp_path, monkeypatch):
    cache = tmp_path / "plans.json"
    choose(kit, cache, {}, monkeypatch, {"cpu": cpu})
    ((key, _),) = json.loads(cache.read_text()).items()
    old = {"chunk": 10, "updates_per_second": {"1": 1.0}, "about": {}}
    for there in ({key: old}, {key: 7, "x": [old]}, [old], "text", None):
        cache.write_text(json.dumps(there))
        choice, machine = choose(kit, cache, {}, monkeypatch, {"cpu": cpu})
        assert machine.tried
        assert choice.plan.chunk > 1
        assert [*json.loads(cache.read_text())] == [key]


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
    cache = tmp_path / "plans.json"
    assert choose(kit, cache, {}, monkeypatch, {"cpu": cpu})[0].plan.chunk > 1
    app, arrays = kit
    app = TrainingApp(LooksAround, app.data, num_classes=2)
    for about in ({"model": "another"}, {}):  # The other's plan may be remembered.
        choice, machine = choose((app, arrays), cache, about, monkeypatch, {"cpu": cpu})
        assert (choice.plan, machine.tried) == (Plan(1), [])


def test_a_plan_that_is_told_is_kept_and_only_the_device_measured(
    kit, tmp_path, monkeypatch
):
    plans = {"cuda": [Plan(20)], "cpu": [Plan(20)]}
    both = {"cuda": lambda chunk: 10.0, "cpu": lambda chunk: 2_000.0}
    cache = tmp_path / "p.json"
    choice, machine = choose(kit, cache, {}, monkeypatch, both, plans)
    assert (choice.device, choice.plan) == ("cpu", Plan(20))
    assert machine.tried == [("cuda", 20), ("cpu", 20)]


def test_a_broken_or_forbidden_cache_costs_only_the_memory(kit, tmp_path, monkeypatch):
    broken = tmp_path / "plans.json"
    broken.write_text("{half")
    speeds = {"cpu": cpu}
    assert choose(kit, broken, {}, monkeypatch, speeds)[0].plan.chunk > 1
    blocked = tmp_path / "file" / "plans.json"
    blocked.parent.write_text("not a folder")
    assert choose(kit, blocked, {}, monkeypatch, speeds)[0].plan.chunk > 1


def meter_of(kit, sizes=None):
    app, arrays = kit
    return Meter(lambda device: app, arrays, range(40), 40, sizes=sizes)


@pytest.mark.parametrize("sizes", [None, [8] * 20 + [1] * 20])
def test_the_speed_is_of_real_training(kit, sizes, monkeypatch):
    monkeypatch.setattr(measuring, "ENOUGH", 0.01)
    meter = meter_of(kit, sizes)
    for chunk in (1, 2, 40):
        found = meter("cpu", Plan(chunk), 60.0)
        assert found.note == ""
        assert found.updates_per_second > 0
        assert 0 < found.seconds < 30


def test_a_measurement_is_cut_off(kit):
    app, arrays = kit
    settings = TrainingSettings(batch_size=1, epochs=200_000)
    long = TrainingApp(app.model, app.data, num_classes=2, settings=settings)
    meter = meter_of((long, arrays))
    for chunk in (1, 10):
        began = time.perf_counter()
        found = meter("cpu", Plan(chunk), 0.2)
        assert found.updates_per_second is None
        assert found.note == "cut off"
        assert time.perf_counter() - began < 60  # And not the hours that it would take.


def test_a_client_that_fails_says_why(kit):
    app, arrays = kit

    def data(context):
        raise OSError("the disk is gone")

    broken = TrainingApp(app.model, data, num_classes=2)
    found = meter_of((broken, arrays))("cpu", Plan(1), 5.0)
    assert found.updates_per_second is None
    assert "the disk is gone" in found.note


def test_one_client_that_fails_does_not_decide(kit):
    app, arrays = kit

    def data(context):
        if context.node_config["partition-id"] == 21:
            raise OSError("the disk is gone")
        return app.data(context)

    broken = TrainingApp(app.model, data, num_classes=2)
    meter = meter_of((broken, arrays))
    assert meter("cpu", Plan(40), 30.0).updates_per_second > 0


def test_no_room_in_a_real_measurement_says_what_fits(kit, monkeypatch, caplog):
    really = batched.BatchedTrainer.train

    def train(self, start, tasks, **more):
        if len(tasks) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return really(self, start, tasks, **more)

    monkeypatch.setattr(batched.BatchedTrainer, "train", train)
    found = meter_of(kit)("cpu", Plan(40), 60.0)
    assert (found.updates_per_second, found.fits) == (None, Plan(10))
    assert "CUDA out of memory" in found.note
    assert not caplog.records  # The planner says it, once.


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
    monkeypatch.setattr(measuring, "LONG", 60.0)
    meter_of((app, arrays))("cpu", Plan(2), 60.0)
    assert len(traced) >= 2
    assert max(traced) <= measuring.WARM_UPS < len(sent)


@pytest.mark.gpu
def test_on_a_real_card_both_devices_are_measured_within_a_second(kit, tmp_path):
    app, arrays = kit
    apps = {
        device: TrainingApp(app.model, app.data, num_classes=2, device=device)
        for device in ("cuda", "cpu")
    }
    choice = planner.choose_plan(
        apps.__getitem__,
        arrays,
        {device: plans_for(device, DENSE, 400) for device in apps},
        clients=range(400),
        num_clients=400,
        cohort=400,
        rounds=10,
        about={},
        cache=tmp_path / "plans.json",
    )
    measured = [r for r in choice.why["measured"] if r["updates_per_second"]]
    assert {row["device"] for row in measured} == {"cuda", "cpu"}
    assert choice.why["seconds"] <= 1.5  # To trace a step cannot be cut off.
    of_card = [row for row in measured if row["device"] == "cuda"]
    assert of_card[-1]["updates_per_second"] > 2 * of_card[0]["updates_per_second"]


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
