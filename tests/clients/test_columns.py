from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedweight.clients.client_tasks import (
    ClientTasks,
    Instructions,
    alike,
    cast,
    examples_of,
    instructions_of,
    nodes_of,
    numbers_of,
    sizes_in,
)
from fedweight.clients.steps.schedule import Schedule
from fedweight.clients.steps.task import Task, Tasks
from fedweight.core.batches import batches
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.local_models import ModelSum
from fedweight.core.model_rows import ModelRows
from fedweight.core.rng import permutation
from fedweight.data import ClientData, Examples
from fedweight.data.parts import Parts


def parts_of(sizes):
    n = int(sum(sizes))
    whole = Examples(np.arange(2.0 * n, dtype=np.float32).reshape(n, 2), np.arange(n))
    first = np.cumsum([0, *sizes])[:-1]
    return Parts(whole, first, np.array(sizes, np.int64))


def tasks_of(sizes, epochs):
    keys = np.arange(len(sizes), dtype=np.uint64) * np.uint64(977) + np.uint64(5)
    return Tasks(parts_of(sizes), np.array(epochs, np.int64), keys, keys)


def rows_by_hand(tasks, first, batch_size, least):
    """Return what each step takes, as the loop goes through it."""
    steps = [
        [
            place + permutation(task.order_key, epoch, len(task.examples))[some]
            for epoch in range(task.epochs)
            for some in batches(len(task.examples), batch_size, least)
        ]
        for task, place in zip(tasks, first, strict=True)
    ]
    total, width = max(map(len, steps)), max(len(one) for own in steps for one in own)
    rows = np.empty((total, len(tasks), max(width, batch_size)), np.int64)
    rows[:] = np.asarray(first)[:, None]
    for k, own in enumerate(steps):
        for step, some in enumerate(own):
            rows[step, k, : len(some)] = some
    return rows


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 3)), min_size=1, max_size=25),
    st.integers(1, 20),
    st.sampled_from([1, 2]),
)
def test_every_step_takes_what_the_loop_takes(clients, batch_size, least):
    sizes, epochs = zip(*clients, strict=True)
    tasks = tasks_of(sizes, epochs)
    schedule = Schedule.of(tasks, batch_size, least)
    first = tasks.examples.first
    expected = rows_by_hand(tasks, first, batch_size, least)
    found = schedule.rows(tasks, first)
    assert np.array_equal(found[:, :, : expected.shape[2]], expected)
    assert (found[:, :, expected.shape[2] :] == first[:, None]).all()


def test_many_sizes_are_shuffled_together():
    tasks = tasks_of([*range(20, 60)], [1] * 40)
    schedule = Schedule.of(tasks, 8, 1)
    assert len(schedule.passes[0]) == 40
    assert [len(some) for some in schedule.like_size] == [11, 16, 13]
    assert sorted(k for some in schedule.like_size for k in some) == [*range(40)]


def test_tasks_as_columns_are_the_tasks():
    columns = tasks_of([3, 1, 4], [1, 2, 1])
    several = [*columns]
    assert all(isinstance(task, Task) for task in several)
    again = Tasks.of(several)
    assert Tasks.of(columns) is columns
    for name in ("sizes", "epochs", "order_keys", "noise_keys"):
        assert np.array_equal(getattr(again, name), getattr(columns, name))
    assert [task.examples.y.tolist() for task in again] == [
        [0, 1, 2],
        [3],
        [4, 5, 6, 7],
    ]
    some = columns.take([2, 0])
    assert [task.epochs for task in some] == [1, 1]
    assert [task.examples.y[0] for task in columns[1:]] == [3, 4]
    assert some.examples.whole is columns.examples.whole


def clients_of(sizes, made):
    parts = parts_of(sizes)

    def context(node):
        made.append(node)
        return Context(0, node, {"partition-id": node - 1}, RecordDict(), {})

    def data(context):
        number = int(context.node_config["partition-id"])
        return ClientData(parts[number], parts[number].take(slice(0)))

    shared = Instructions.of(ConfigRecord({}))
    nodes = [k + 1 for k in range(len(sizes))]
    told = [shared] * len(sizes)
    return ClientTasks(nodes, [*range(len(sizes))], told, parts, context, data)


def test_clients_as_columns_are_made_when_they_are_asked_for():
    made = []
    clients = clients_of([2, 5], made)
    assert cast(clients, np.dtype(np.float32), "classification") is clients
    assert (nodes_of(clients), numbers_of(clients)) == ([1, 2], [0, 1])
    assert sizes_in(clients) == [2, 5]
    assert len(alike(instructions_of(clients))) == 1
    assert not made
    assert clients[1] is clients[-1]
    assert made == [2]
    listed = [*clients]
    assert made == [2, 1]
    for ask in (nodes_of, numbers_of, sizes_in, instructions_of):
        assert list(ask(listed)) == list(ask(clients))
    for own, other in zip(examples_of(listed), examples_of(clients), strict=True):
        assert np.shares_memory(own.x, other.x)
        assert own.y.tolist() == other.y.tolist()
    with pytest.raises(IndexError):
        clients[2]


def test_clients_whose_data_do_not_fit_are_cast_one_by_one():
    clients = cast(clients_of([2, 5], []), np.dtype(np.float64), "classification")
    assert [client.data.train.x.dtype for client in clients] == [np.float64] * 2


def rows_of(count, generator):
    layout = Layout.of(
        {"w": ((7,), "float32"), "b": ((2,), "float32"), "n": ((), "int64")}, {"b"}
    )
    return ModelRows(
        layout,
        torch.randn(count, 7, generator=generator),
        torch.randn(count, 2, generator=generator),
        {"n": np.arange(count)},
        torch.empty(0),
    )


@pytest.mark.parametrize("count", [1, 5, 33, 64, 100])
@pytest.mark.parametrize("left_out", [(), (0,), (0, 3)])
def test_rows_are_added_up_as_models_are(count, left_out):
    rows = rows_of(count, torch.Generator().manual_seed(count))
    good = [k for k in range(count) if k not in left_out]
    counts = {k + 10: float(k % 4 + 1) for k in good}
    found = ModelSum.of_rows(rows, good, counts)
    # The rows as views of the matrix, which is how they were added up before.
    views = [
        FlatModel(rows.layout, p, b, {"n": np.asarray(k)})
        for k, (p, b) in enumerate(
            zip(rows.parameters.unbind(), rows.buffers.unbind(), strict=True)
        )
    ]
    expected = ModelSum.of({k + 10: (views[k], counts[k + 10]) for k in good})
    assert found.coefficients == expected.coefficients
    assert found.integers == expected.integers
    if not good:
        assert found.parameters is None
        return
    assert torch.equal(found.parameters, expected.parameters)
    assert torch.equal(found.buffers, expected.buffers)


@pytest.mark.gpu
@pytest.mark.parametrize("left_out", [(), (0,), (0, 3)])
def test_rows_on_a_gpu_are_added_up_there(left_out):
    rows = rows_of(100, torch.Generator().manual_seed(0))
    there = replace(
        rows, parameters=rows.parameters.cuda(), buffers=rows.buffers.cuda()
    )
    counts = {k: float(k % 4 + 1) for k in range(100) if k not in left_out}
    found = ModelSum.of_rows(there, [*counts], counts)
    expected = ModelSum.of_rows(rows, [*counts], counts)
    for name in ("parameters", "buffers"):
        assert getattr(found, name).is_cpu
        torch.testing.assert_close(
            getattr(found, name).float(), getattr(expected, name).float()
        )
    assert there[3].parameters.is_cpu
    assert torch.equal(there[3].parameters, rows[3].parameters)
