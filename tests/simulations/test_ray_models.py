"""Local models on Ray: summed or left where they were trained, always the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from torch import nn

from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.clients.objectives import Objective
from fedweight.clients.personal import Ditto
from fedweight.core.local_models import SummedModels
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Replies
from fedweight.simulations import Plan
from fedweight.simulations.grid import FIRST_NODE
from fedweight.simulations.local import LocalGrid
from fedweight.strategies.fedavg import FedAvg
from fedweight.strategies.fedce import FedCE
from fedweight.strategies.feddisco import FedDisco
from fedweight.strategies.fedlaw import FedLAW
from fedweight.strategies.ida import IDA

pytestmark = pytest.mark.ray

CLIENTS = 11
FEATURES = 6
CLASSES = 3


def examples_of(client: int) -> Examples:
    """Return client k's: 6 + 4k of them."""
    rng = np.random.default_rng(client)
    count = 6 + 4 * client
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    return Examples(x, rng.integers(0, CLASSES, count))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 40), nn.ReLU(), nn.Linear(40, CLASSES))


def with_buffers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, CLASSES)
    )


def half_frozen() -> nn.Module:
    model = with_buffers()
    for parameter in model[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    return model


def app_of(
    model: Callable[[], nn.Module] = plain,
    *,
    faulty: bool = False,
    before: Callable[[int], None] | None = None,
    batch_size: int = 8,
    **more: Any,
) -> TrainingApp:
    """Make an app; a ``faulty`` one has a client that raises, and one with NaN.

    ``before`` is called with each client's number before it begins.
    """

    def data(context: Context) -> ClientData:
        client = int(context.node_config["partition-id"])
        if before is not None:
            before(client)
        examples = examples_of(client)
        if faulty and client == 3:
            raise FileNotFoundError("no data here")
        if faulty and client == 5:
            examples.x[0, 0] = np.nan
        return ClientData(examples, examples_of(client + 100))

    return TrainingApp(
        model,
        data,
        num_classes=CLASSES,
        settings=TrainingSettings(epochs=2, batch_size=batch_size, learning_rate=0.1),
        sizes=[6 + 4 * client for client in range(CLIENTS)],
        **more,
    )


STRATEGIES: dict[str, Callable[[Callable[[], nn.Module]], Any]] = {
    "fedavg": lambda model: FedAvg(),
    "fedavg, float64": lambda model: FedAvg(accumulate="float64"),
    "feddisco": lambda model: FedDisco(),
    "ida": lambda model: IDA(),
    "ida, per tensor": lambda model: IDA(per_tensor=True),
    "fedce": lambda model: FedCE(),
    "fedlaw": lambda model: FedLAW(
        model=model(), proxy=examples_of(99), server_epochs=3
    ),
}


def play(
    grid: Any, strategy: Any, model: Callable[[], nn.Module] = plain, rounds: int = 3
) -> tuple[bytes, ...]:
    """Run some rounds; return the model's bytes and the record of the rounds."""
    initial = FlatRecord(FlatModule(model()).save())
    result = strategy.start(grid, initial, num_rounds=rounds)
    arrays = [a.tobytes() for a in result.arrays.to_numpy_ndarrays()]
    history = repr(getattr(strategy, "history", ""))
    # A traceback names the lines of the grid that it went through.
    return (*arrays, history.split("Traceback", 1)[0].encode())


@pytest.fixture
def everywhere(ray_grids: list[Any]) -> Callable[..., Any]:
    """Give a function that expects the same bits of every grid, and returns them."""

    def run(
        what: Callable[[Any], Any], app: TrainingApp, plan: Plan | None = None
    ) -> Any:
        plan = plan or Plan()
        local = what(LocalGrid(app, CLIENTS, plan=plan))
        for grid in ray_grids:
            grid.load(app, CLIENTS)
            grid.plan = plan
            try:
                assert what(grid) == local, f"Ray, {grid.workers} workers"
            finally:
                grid.plan = Plan()
        return local

    return run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a function that says who reads the models: the server, or its workers."""

    def say(who: str) -> None:
        if who == "workers":
            monkeypatch.setattr(
                "fedweight.simulations.ray.rows.ShardedModels._are_here",
                lambda self, shards: False,
            )

    return say


# Who reads the models, and how many train at once.
WAYS = [("server", 1), ("workers", 4)]


# The same bits.


@pytest.mark.parametrize(("who", "chunk"), WAYS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy(name: str, who: str, chunk: int, read: Any, everywhere: Any) -> None:
    read(who)

    def run(grid: Any) -> tuple[bytes, ...]:
        return play(grid, STRATEGIES[name](plain))

    *_, history = everywhere(run, app_of(), Plan(chunk))
    assert history.count(b"status='ok'") == 3 * (CLIENTS + 1)


@pytest.mark.parametrize("name", ["fedavg", "fedavg, float64", "ida"])
def test_buffers_and_integers(name: str, read: Any, everywhere: Any) -> None:
    read("workers")

    def run(grid: Any) -> tuple[bytes, ...]:
        return play(grid, STRATEGIES[name](with_buffers), with_buffers)

    everywhere(run, app_of(with_buffers))


@pytest.mark.parametrize("who", ["server", "workers"])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_tensors_keep_their_bits(
    name: str, told: bool, who: str, read: Any, everywhere: Any
) -> None:
    """Whether the server is told what is frozen or knows names only."""
    read(who)
    base = {n: half_frozen().state_dict()[n].numpy() for n in ("0.weight", "0.bias")}

    def run(grid: Any) -> list[bytes]:
        initial = FlatRecord(FlatModule(half_frozen()).save())
        strategy = STRATEGIES[name](half_frozen)
        start = initial if told else initial.plain()
        arrays = strategy.start(grid, start, num_rounds=2).arrays
        for tensor, values in base.items():
            np.testing.assert_array_equal(arrays[tensor].numpy(), values)
        assert (arrays["3.weight"].numpy() != initial["3.weight"].numpy()).any()
        return [a.tobytes() for a in arrays.to_numpy_ndarrays()]

    everywhere(run, app_of(half_frozen))


@pytest.mark.parametrize(("who", "chunk"), WAYS)
@pytest.mark.parametrize("name", ["fedavg", "ida"])
def test_clients_that_fail(
    name: str, who: str, chunk: int, read: Any, everywhere: Any
) -> None:
    read(who)

    def run(grid: Any) -> tuple[bytes, ...]:
        strategy = STRATEGIES[name](plain)
        found = play(grid, strategy)
        for record in strategy.history:
            status = {c.client: c.status for c in record.clients if c.status != "ok"}
            assert status == {3: "failed", 5: "rejected"}
        return found

    everywhere(run, app_of(faulty=True), Plan(chunk))


class LooksAround(nn.Module):
    """An example's output depends on who shares its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x - x.mean(0))
        return result


class Noisy(nn.Linear):
    """Draws from PyTorch's stream, which a process has one of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.randn_like(x))


def looks_around() -> nn.Module:
    torch.manual_seed(0)
    return LooksAround()


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return Noisy(FEATURES, CLASSES)


def alone_with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))


@pytest.mark.parametrize("model", [looks_around, noisy, alone_with_batch_norm])
def test_models_that_a_trial_is_made_for(
    model: Callable[[], nn.Module], everywhere: Any
) -> None:
    # With 9 of them a batch, client 1's tenth example is alone in its last one.
    def run(grid: Any) -> tuple[bytes, ...]:
        return play(grid, FedAvg(), model)

    app = app_of(model, batch_size=9)
    *_, history = at_once = everywhere(run, app, Plan(4))
    assert history.count(b"status='ok'") == 3 * (CLIENTS + 1)
    if model is not alone_with_batch_norm:
        assert at_once == play(LocalGrid(app, CLIENTS), FedAvg(), model)


def test_stragglers_that_are_left_out(everywhere: Any) -> None:
    def run(grid: Any) -> tuple[bytes, ...]:
        strategy = FedAvg(drop_stragglers=True, stragglers=0.4)
        initial = FlatRecord(FlatModule(plain()).save())
        config = ConfigRecord({"local-epochs": 3})
        result = strategy.start(grid, initial, num_rounds=3, train_config=config)
        assert any(c.status == "dropped" for c in strategy.history[-1].clients)
        return tuple(a.tobytes() for a in result.arrays.to_numpy_ndarrays())

    everywhere(run, app_of())


def test_wrapper_that_looks_at_messages_gets_arrays(everywhere: Any) -> None:
    def run(grid: Any) -> tuple[bytes, ...]:
        np.random.seed(0)  # noqa: NPY002 - Flower draws its noise there
        private = DifferentialPrivacyServerSideFixedClipping(IDA(), 0.1, 1.0, CLIENTS)
        return play(grid, private)

    everywhere(run, app_of())


def test_foreign_reader_of_one_reply(ray_grid: Any) -> None:
    """Of the models, only what is looked at comes."""
    app = app_of(with_buffers)
    ray_grid.load(app, CLIENTS)
    replies = replies_of(ray_grid, IDA(), with_buffers)
    local = replies_of(LocalGrid(app, CLIENTS), IDA(), with_buffers)
    ours = replies[4].content["arrays"]
    theirs = local[4].content["arrays"]
    assert {n: a.numpy().tobytes() for n, a in ours.items()} == {
        n: a.numpy().tobytes() for n, a in theirs.items()
    }
    assert replies[4].content["metrics"] == local[4].content["metrics"]


# What travels, and what stays.


def replies_of(
    grid: Any,
    strategy: Any,
    model: Callable[[], nn.Module] = plain,
    timeout: float | None = None,
) -> Replies:
    """Let a grid answer the first round of a strategy."""
    strategy._now.outermost = True
    initial = FlatRecord(FlatModule(model()).save())
    cohort = strategy.configure_train(1, initial, ConfigRecord(), grid)
    replies = grid.send_and_receive(cohort, timeout=timeout)
    assert isinstance(replies, Replies)
    return replies


def test_sums_come_instead_of_models(ray_grid: Any) -> None:
    ray_grid.load(app_of(), CLIENTS)
    replies = replies_of(ray_grid, FedAvg())
    assert isinstance(replies.models, SummedModels)
    assert replies.plain is not None
    assert all(reply.summed and reply.model is None for reply in replies.plain)


def test_lists_are_taken_in_order(
    ray_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first list that takes longest holds the others back, and no more than that."""
    from fedweight.simulations.workers.jobs import CohortBatch

    held: list[int] = []
    take = CohortBatch.take

    def noting(self: CohortBatch, **options: Any) -> Any:
        held.append(len(self._arrived))
        return take(self, **options)

    def slow(client: int) -> None:
        time.sleep(0.3 if client == CLIENTS - 1 else 0)  # the largest, hence first

    monkeypatch.setattr(CohortBatch, "take", noting)
    app = app_of(before=slow)
    ray_grid.load(app, CLIENTS)
    bits = play(ray_grid, FedAvg())
    assert max(held) > 1
    assert bits == play(LocalGrid(app, CLIENTS), FedAvg())


@pytest.fixture
def late(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Give what app_of calls ``before``: client 6 waits for the end of the test.

    Or until somebody calls it with -1.
    """
    over = tmp_path / "over"

    def wait(client: int) -> None:
        if client < 0:
            over.touch()
        while client == 6 and not over.exists():
            time.sleep(0.01)

    yield wait
    wait(-1)


@pytest.mark.parametrize("strategy", [FedAvg, IDA])
def test_timeout(strategy: Any, ray_grid: Any, late: Any) -> None:
    ray_grid.load(app_of(before=late), CLIENTS)
    method = strategy()
    # The others take a fifth of this on an idle machine.
    replies = replies_of(ray_grid, method, timeout=2.5)
    arrived = {reply.node - FIRST_NODE for reply in replies.plain or ()}
    assert 6 not in arrived
    assert len(arrived) >= 5
    arrays, _ = method.aggregate_train(1, replies)
    assert arrays is not None
    status = {c.client: c.status for c in method.history[-1].clients}
    assert status == {k: "ok" if k in arrived else "missing" for k in range(CLIENTS)}


def test_what_comes_too_late_is_not_kept(ray_grid: Any, late: Any) -> None:
    ray_grid.load(app_of(before=late, personal=Ditto()), CLIENTS)
    with ray_grid.store.staged() as keep:
        replies = replies_of(ray_grid, FedAvg(), timeout=1.5)
        arrived = {reply.node - FIRST_NODE for reply in replies.plain or ()}
        assert 6 not in arrived
        assert arrived
        keep()
    late(-1)
    while ray_grid._pool._queue.busy:
        time.sleep(0.05)
    kept = ray_grid.store.read("personal", np.arange(CLIENTS)).clients
    assert set(kept.tolist()) == arrived


class Odd(Objective):
    """One client carries something else than the others."""

    wants = frozenset({"class-counts"})

    def begin(self, facts: Any) -> Any:
        odd = int(facts.class_counts.sum()) == 6 + 4 * 6
        return {"seen": torch.zeros(2 + odd)}

    def example_losses(self, outputs: Any, batch: Any, facts: Any) -> Any:
        return nn.functional.cross_entropy(outputs, batch.y, reduction="none")


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_client_that_carries_something_else_fails_alone(
    chunk: int, ray_grid: Any, tmp_path: Path
) -> None:
    known = tmp_path / "known"

    def last(client: int) -> None:
        """Let the others say first what is carried, also where all else is slow."""
        time.sleep(3 if client == 6 and not known.exists() else 0)

    ray_grid.load(app_of(before=last, objective=Odd(), personal=Ditto()), CLIENTS)
    ray_grid.plan = Plan(chunk)
    try:
        for _ in range(2):
            replies = replies_of(ray_grid, FedAvg())
            errors = {
                r.node - FIRST_NODE: r.error for r in replies.plain or () if r.error
            }
            assert list(errors) == [6], errors
            assert "client 6, train: ClientError: " in errors[6]
            known.touch()
    finally:
        ray_grid.plan = Plan()
    for table in ("personal", "objective"):
        kept = ray_grid.store.read(table, np.arange(CLIENTS)).clients
        assert kept.tolist() == [k for k in range(CLIENTS) if k != 6]


@pytest.mark.parametrize(
    ("strategy", "who", "chunk"),
    [(FedAvg, "server", 1), (FedAvg, "server", 4), (IDA, "workers", 4)],
)
def test_client_that_kills_its_worker(
    strategy: Any, who: str, chunk: int, read: Any, ray_grid: Any
) -> None:
    read(who)

    def kills(client: int) -> None:
        if client == 6:
            os._exit(1)

    def rows(grid: Any) -> Any:
        method = strategy(accumulate=None)
        arrays, _ = method.aggregate_train(1, replies_of(grid, method))
        status = {c.client: c.status for c in method.history[-1].clients}
        assert status == {k: "failed" if k == 6 else "ok" for k in range(CLIENTS)}
        return torch.cat(
            [torch.from_numpy(a.numpy()).reshape(-1) for a in arrays.values()]
        )

    def fails(client: int) -> None:
        if client == 6:
            raise RuntimeError

    ray_grid.load(app_of(before=kills), CLIENTS)
    ray_grid.plan = Plan(chunk)
    try:
        found = rows(ray_grid)
    finally:
        ray_grid.plan = Plan()
    expected = rows(LocalGrid(app_of(before=fails), CLIENTS, plan=Plan(chunk)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("who", ["server", "workers"])
def test_models_outlive_their_worker(
    who: str, read: Any, ray_session: Any, ray_grids: list[Any]
) -> None:
    """It ends between training and aggregation; another reads what it has left."""
    read(who)
    app, grid = app_of(), ray_grids[0]
    grid.load(app, CLIENTS)
    method = IDA()
    replies = replies_of(grid, method)
    [lost] = grid._pool.crew.handles
    ray_session.kill(lost)
    arrays, _ = method.aggregate_train(1, replies)
    assert method.history[-1].status == "ok", method.history[-1].reason
    expected = IDA()
    local = replies_of(LocalGrid(app, CLIENTS), expected)
    other, _ = expected.aggregate_train(1, local)
    assert [a.data for a in arrays.values()] == [a.data for a in other.values()]
    assert replies_of(grid, IDA())  # The next round goes on.
    assert grid._pool.crew.handles != [lost]


def test_models_that_are_lost_fail_the_round(
    ray_grid: Any, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read("workers")
    ray_grid.load(app_of(), CLIENTS)
    method = IDA()
    replies = replies_of(ray_grid, method)
    monkeypatch.setattr(ray_grid._pool, "on", lambda place: [])
    arrays, _ = method.aggregate_train(1, replies)
    assert arrays is None
    assert method.history[-1].status == "failed"
    reason = method.history[-1].reason
    assert "cannot be reached on Ray node" in reason
    assert "no worker is left on their node" in reason


def wide(width: int = 60_000) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Linear(width, CLASSES))


@pytest.mark.slow
def test_models_that_do_not_fit_the_store(
    everywhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 models of 24 MB, in a store of 200 MB: Ray moves some to disk."""
    from fedweight.simulations.ray.rows import ShardedUpdates

    monkeypatch.setattr("fedweight.simulations.ray.rows.CALL_BYTES", 30_000_000)
    made: list[Any] = []
    make = ShardedUpdates.__init__

    def noting(self: ShardedUpdates, *arguments: Any) -> None:
        made.append(self)
        make(self, *arguments)

    monkeypatch.setattr(ShardedUpdates, "__init__", noting)

    def wider() -> nn.Module:
        return wide(600_000)

    def run(grid: Any) -> tuple[bytes, ...]:
        return play(grid, IDA(fraction_evaluate=0), wider, rounds=1)

    everywhere(run, app_of(wider, batch_size=64))
    assert len(made) == 2


def test_models_are_let_go_of_after_the_round(ray_grid: Any, ray_session: Any) -> None:
    """20 rounds of 11 models of 2.4 MB do not fit the store together."""

    def used() -> float:
        whole = ray_session.cluster_resources()["object_store_memory"]
        # Ray leaves out what is used up.
        return whole - ray_session.available_resources().get("object_store_memory", 0)

    ray_grid.load(app_of(wide, batch_size=64), CLIENTS)
    base = used()
    method = IDA(fraction_evaluate=0)
    play(ray_grid, method, wide, rounds=20)
    assert [record.status for record in method.history] == ["ok"] * 20
    deadline = time.monotonic() + 10  # Ray tells once a second or so.
    while used() > base + 20e6 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert used() <= base + 20e6
