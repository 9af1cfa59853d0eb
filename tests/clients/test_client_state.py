"""What clients keep: in the engine's store, or on a device in their context."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.objectives.ldr import ALDR
from fedweight.clients.personal import Ditto
from fedweight.core.client_store import ClientStore
from fedweight.core.errors import AggregationError
from fedweight.core.module import FlatModule
from fedweight.core.threads import one_thread
from fedweight.data import ClientData, Examples
from fedweight.messages import _flower, keys
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort
from fedweight.server.loop import ServerState, federate
from fedweight.simulations import LocalGrid, Plan
from fedweight.simulations.grid import FIRST_NODE
from fedweight.strategies import FedAvg

CLIENTS = 6


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def data(context: Any) -> ClientData:
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(6 + client, 4)).astype(np.float32)
    part = Examples(x, stream.integers(0, 3, len(x)))
    return ClientData(part, part)


def app(**options: Any) -> TrainingApp:
    return TrainingApp(
        model,
        data,
        num_classes=3,
        objective=ALDR(),
        settings=TrainingSettings(batch_size=3),
        personal=Ditto(),
        **options,
    )


def train(grid: Any, rounds: int, strategy: Any = None) -> None:
    begin = ServerState(
        FlatRecord(FlatModule(model()).save()),
        train_config=ConfigRecord({keys.LOCAL_EPOCHS: 1}),
    )
    with _flower.task_identity(1):
        federate(strategy or FedAvg(fraction_train=0.5), grid, begin, until=rounds)


def kept(store: ClientStore) -> dict[str, dict[str, bytes]]:
    """Return all that is in a store, to the bit."""
    found = {}
    for table in ("objective", "personal"):
        rows = store.read(table, np.arange(CLIENTS))
        found[table] = {
            "clients": rows.clients.tobytes(),
            **{name: values.tobytes() for name, values in rows.arrays.items()},
            **{name: values.tobytes() for name, values in rows.items.items()},
        }
    return found


def forward(message: Message, context: Context, call_next: Any) -> Message:
    return call_next(message, context)


@pytest.mark.parametrize("plan", [Plan(), Plan(2)])
def test_the_store_has_what_clients_keep_and_contexts_nothing(plan: Plan) -> None:
    grid = LocalGrid(app(), CLIENTS, plan=plan)
    train(grid, 3)
    assert grid.client_states() == {}
    rows = grid.store.read("personal", np.arange(CLIENTS))
    assert rows.arrays["parameters"].shape == (len(rows.clients), 53)
    assert rows.arrays["buffers"].shape == (len(rows.clients), 10)
    assert rows.arrays["integer 1.num_batches_tracked"].min() > 0
    (name,) = rows.items
    assert len(rows.items[name]) == int((6 + rows.clients).sum())
    assert np.array_equal(rows.lengths, 6 + rows.clients)


def test_messages_and_cohorts_share_the_store() -> None:
    """A mod has the engine send each client its message."""
    grids = [LocalGrid(app(), CLIENTS), LocalGrid(app(mods=[forward]), CLIENTS)]
    for grid in grids:
        train(grid, 3)
        assert grid.client_states() == {}
    for table in ("objective", "personal"):
        ours, mods = (g.store.read(table, np.arange(CLIENTS)) for g in grids)
        assert ours.clients.tolist() == mods.clients.tolist() != []
        for name, values in {**ours.arrays, **ours.items}.items():
            other = {**mods.arrays, **mods.items}[name]
            np.testing.assert_allclose(values, other, atol=1e-3)


def test_rows_that_went_to_files_are_the_same(monkeypatch: Any) -> None:
    memory = LocalGrid(app(), CLIENTS)
    monkeypatch.setattr(
        "fedweight.simulations.grid.ClientStore", partial(ClientStore, memory=0)
    )
    files = LocalGrid(app(), CLIENTS)
    for grid in (memory, files):
        train(grid, 4)
    assert all(table.rows.filed for table in files.store._tables.values())
    assert not any(table.rows.filed for table in memory.store._tables.values())
    assert kept(memory.store) == kept(files.store)


class Fails(FedAvg):
    """Makes no model of its third round."""

    def weights(self, round: Any) -> Any:
        if round.number == 3:
            raise AggregationError("no")
        return super().weights(round)


def test_a_round_that_fails_leaves_what_clients_keep_as_it_was() -> None:
    states = []
    for rounds in (2, 3, 4):
        grid = LocalGrid(app(), CLIENTS)
        train(grid, rounds, Fails(fraction_train=1.0))
        states.append(kept(grid.store))
    assert states[0] == states[1]
    assert states[2] != states[1]


def test_a_device_keeps_the_same_in_its_context() -> None:
    with _flower.task_identity(1), one_thread():
        content = RecordDict(
            {
                keys.ARRAYS: FlatRecord(FlatModule(model()).save()),
                keys.CONFIG: ConfigRecord({keys.LOCAL_EPOCHS: 1}),
            }
        )
        grid, device = LocalGrid(app(), CLIENTS), app()
        own = Context(
            run_id=0,
            node_id=7,
            node_config={"partition-id": 4, "num-partitions": CLIENTS},
            state=RecordDict(),
            run_config={},
        )
        for _ in range(2):
            cohort = Cohort(content, [FIRST_NODE + 4], "train")
            list(grid.send_and_receive(cohort))
            device(Message(content, dst_node_id=7, message_type="train"), own)
    for table in ("objective", "personal"):
        rows = grid.store.read(table, np.array([4]))
        record = own.state.array_records[table]
        simulated = {n: v[0] for n, v in rows.arrays.items()} | dict(rows.items)
        assert record.keys() == simulated.keys()
        for name, values in simulated.items():
            np.testing.assert_array_equal(record[name].numpy(), values)
