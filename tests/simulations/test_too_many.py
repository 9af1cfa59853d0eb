"""Where a device has no room for so many clients at once: fewer, told once."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MessageType, RecordDict

from fedweight.clients import TrainingApp, TrainingSettings, client_number
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort
from fedweight.simulations.grid import FIRST_NODE
from fedweight.simulations.local import LocalGrid
from fedweight.simulations.plan import Plan

CLIENTS, SAMPLES = 13, 6

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
NO_INDEX = RuntimeError(
    "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, "
    "but got false."
)

RNG = np.random.default_rng(0)
X = RNG.standard_normal((CLIENTS * SAMPLES, 4)).astype(np.float32)
Y = RNG.integers(0, 2, CLIENTS * SAMPLES)

REALLY = BatchedTrainer.train


def make_room_for(most, error=NO_MEMORY, tried=None):
    """Let no more than so many clients train at once in this process."""

    def train(self, start, tasks, **more):
        if tried is not None:
            tried.append(len(tasks))
        if len(tasks) > most:
            raise error
        return REALLY(self, start, tasks, **more)

    BatchedTrainer.train = train


@pytest.fixture(autouse=True)
def room():
    yield
    BatchedTrainer.train = REALLY


def data(context):
    begin = client_number(context) * SAMPLES
    part = slice(begin, begin + SAMPLES)
    return ClientData(Examples(X[part], Y[part]), Examples(X[:2], Y[:2]))


def data_where_three_fit(context):
    make_room_for(3, NO_INDEX)  # In whatever process the client is.
    return data(context)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def app_of(data=data):
    settings = TrainingSettings(batch_size=3, learning_rate=0.1)
    return TrainingApp(model, data, num_classes=2, settings=settings)


def cohort(summed=None):
    arrays = FlatRecord(FlatModule(model()).save())
    content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord()})
    nodes = [FIRST_NODE + client for client in range(CLIENTS)]
    return Cohort(content, nodes, MessageType.TRAIN, summed_by=summed)


def round_of(grid, summed=None):
    """Return what came of a round, as bytes: of each client, or of the sum."""
    with _flower.task_identity(run_id=0):
        replies = grid.send_and_receive(cohort(summed))
    plain = replies.plain
    assert [reply.error for reply in plain] == [None] * CLIENTS
    assert [reply.node for reply in plain] == cohort().nodes
    start = FlatModule(model()).save()
    if summed:
        return replies.models.total.parameters.numpy().tobytes()
    rows = replies.models.updates(cohort().nodes, start)
    return rows.combine(torch.ones(CLIENTS)).numpy().tobytes()


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [NO_MEMORY, NO_INDEX, MemoryError()])
@pytest.mark.parametrize("threads", [1, 2, None])
def test_the_chunk_is_halved_told_once_and_stays_halved(caplog, error, threads):
    tried = []
    make_room_for(4, error, tried)
    grid = LocalGrid(app_of(), CLIENTS, threads=threads, plan=Plan(13))
    halved = [round_of(grid) for _ in range(3)]
    assert grid.plan == Plan(4)
    more = [count for count in tried if count > 4]  # A trial has trained two or three.
    # Two threads may have begun with the seven and the six.
    assert more in ([13, 7], *([[13, 7, 6], [13, 6, 7]] if threads != 1 else []))
    (line,) = told(caplog)
    assert line.startswith("engine.plan: batched-13 is too many clients at once")
    assert "it is batched-4" in line
    # A run that begins with that plan gives the same bits.
    make_room_for(CLIENTS)
    again = LocalGrid(app_of(), CLIENTS, threads=threads, plan=Plan(4))
    assert [round_of(again) for _ in range(3)] == halved
    assert len(told(caplog)) == 1


def test_where_not_even_two_fit_clients_train_one_after_another(caplog):
    grid = LocalGrid(app_of(), CLIENTS, threads=1, plan=Plan(5))
    make_room_for(1)  # The trial, of two or three, is over.
    halved = round_of(grid)
    assert grid.plan == Plan()
    assert len(told(caplog)) == 1
    assert halved == round_of(LocalGrid(app_of(), CLIENTS, threads=1))


def test_any_other_failure_is_not_about_room(caplog):
    make_room_for(4, RuntimeError("something else"))
    grid = LocalGrid(app_of(), CLIENTS, threads=1, plan=Plan(13))
    round_of(grid)
    assert grid.plan == Plan(13)
    assert "13 clients cannot train at once, each can alone" in told(caplog)[0]


def test_a_client_alone_that_has_no_room_has_failed(monkeypatch):
    def no_room(*_, **__):
        raise NO_MEMORY

    monkeypatch.setattr("fedweight.clients.cohort_trainer.train", no_room)
    grid = LocalGrid(app_of(), CLIENTS, threads=1)
    with _flower.task_identity(run_id=0):
        replies = grid.send_and_receive(cohort())
    assert all("CUDA out of memory" in reply.error for reply in replies.plain)


def test_memory_that_was_kept_is_given_back_before_fewer_are_tried(monkeypatch):
    kept, let_go = [], BatchedTrainer.let_go
    monkeypatch.setattr(
        BatchedTrainer, "let_go", lambda self: kept.append(let_go(self))
    )
    make_room_for(4)
    round_of(LocalGrid(app_of(), CLIENTS, threads=1, plan=Plan(13)))
    assert len(kept) == 2  # After 13, and after 7.


def test_rays_workers_halve_as_well_and_give_the_same(caplog):
    ray_grid = pytest.importorskip("fedweight.simulations.ray.grid")
    expected = {}
    for summed in (None, keys.NUM_EXAMPLES):
        grid = LocalGrid(app_of(), CLIENTS, threads=1, plan=Plan(3))
        expected[summed] = [round_of(grid, summed) for _ in range(2)]
    app = app_of(data_where_three_fit)
    with contextlib.closing(
        ray_grid.RayGrid(app, CLIENTS, workers=2, plan=Plan(6))
    ) as grid:
        for summed, rounds in expected.items():
            assert [round_of(grid, summed) for _ in range(2)] == rounds
        assert grid.plan == Plan(3)  # Of lists of five.
    assert len(told(caplog)) == 1


@pytest.mark.gpu
def test_a_real_card_without_room_trains_half_as_many_and_the_same(caplog):
    def wide():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(4, 40_000), torch.nn.Linear(40_000, 2)
        )

    def rows(device, plan):
        settings = TrainingSettings(batch_size=3, learning_rate=0.1)
        app = TrainingApp(wide, data, num_classes=2, settings=settings, device=device)
        arrays = FlatRecord(FlatModule(wide()).save())
        content = RecordDict({keys.ARRAYS: arrays, keys.CONFIG: ConfigRecord()})
        nodes = [FIRST_NODE + client for client in range(CLIENTS)]
        grid = LocalGrid(app, CLIENTS, plan=plan)
        with _flower.task_identity(run_id=0):
            for _ in range(2):
                replies = grid.send_and_receive(
                    Cohort(content, nodes, MessageType.TRAIN)
                )
        assert all(reply.error is None for reply in replies.plain)
        models = [reply.model.parameters for reply in replies.plain]
        app.let_go()
        return grid.plan, torch.stack(models)

    _, expected = rows("cpu", Plan())
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    taken = torch.cuda.memory_reserved()
    try:
        # A client has 1.1 MB of parameters, and needs some times that.
        torch.cuda.set_per_process_memory_fraction((taken + 48e6) / total)
        plan, found = rows("cuda", Plan(13))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= plan.chunk < 13
    assert sum("is too many clients at once" in line for line in told(caplog)) == 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
