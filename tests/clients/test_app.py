"""The ClientApp, spoken to as Flower does."""

import math
import pickle
import threading

import cloudpickle
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedweight import simulate
from fedweight.clients import TrainingSettings, client_number
from fedweight.clients.evaluation import evaluate
from fedweight.clients.objectives import Objective, Plain, Proximal
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core.errors import AggregationError, ClientError, ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.core.rng import Purpose, keys
from fedweight.data import ClientData
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort

SETTINGS = TrainingSettings(epochs=2, batch_size=5)


def directly(kit, client=1, round=1, epochs=2, goal=None, settings=SETTINGS):
    """What the app must come to, without messages."""
    module = FlatModule(kit.linear())
    return train(
        module,
        module.save(),
        task_of(kit, client, round, epochs),
        goal or Plain(),
        settings,
        learning_rate=settings.learning_rate_in(round),
    )


def task_of(kit, client, round, epochs=2):
    part = kit.client_of(kit.context(client)).train
    return Task(part, epochs, int(keys(0, Purpose.SHUFFLE, round, [client])[0]))


def test_a_train_reply_has_what_the_contract_says_and_no_more(kit):
    reply = kit.app()(kit.message(kit.start()), kit.context(1))
    expected = directly(kit)
    assert set(reply.content) == {"arrays", "metrics"}
    assert dict(reply.content["metrics"]) == {
        "num-examples": 13,
        "train-loss": expected.loss,
        "train-accuracy": expected.accuracy,
        "num-steps": 6,
    }
    assert list(reply.content["arrays"]) == ["weight", "bias"]
    np.testing.assert_array_equal(
        kit.vector(reply.content["arrays"]), expected.model.parameters.numpy()
    )


def test_an_evaluate_reply_measures_the_held_out_part(kit):
    message = kit.message(kit.start(), MessageType.EVALUATE)
    reply = kit.app()(message, kit.context(1))
    module = FlatModule(kit.linear())
    part = kit.client_of(kit.context(1)).held_out
    loss, accuracy = evaluate(module, module.save(), part).values()
    assert set(reply.content) == {"metrics"}
    assert dict(reply.content["metrics"]) == {
        "num-examples": 6,
        "loss": loss,
        "accuracy": accuracy,
    }


def test_label_counts_are_told_when_asked_and_only_then(kit):
    labels = kit.client_of(kit.context(2)).train.y
    counts = np.bincount(labels, minlength=3).tolist()
    asked = kit.message(kit.start(), request=["label-counts"])
    reply = kit.app()(asked, kit.context(2))
    assert dict(reply.content["profile"]) == {"label-counts": counts}
    other = kit.message(kit.start(), request=["loss-before"])
    assert "profile" not in kit.app()(other, kit.context(2)).content


def test_label_counts_can_be_queried_without_training(kit):
    message = kit.message(None, "query.label_counts")
    reply = kit.app(num_classes=5)(message, kit.context(2))
    counts = reply.content["profile"]["label-counts"]
    assert len(counts) == 5
    assert sum(counts) == reply.content["metrics"]["num-examples"] == 14
    assert not reply.content.array_records


def test_loss_before_and_accuracy_after_are_of_the_models_they_say(kit):
    asked = kit.message(kit.start(), request=["loss-before", "accuracy-after"])
    metrics = kit.app()(asked, kit.context(1)).content["metrics"]
    part = kit.client_of(kit.context(1)).train
    module = FlatModule(kit.linear())
    assert metrics["loss-before"] == evaluate(module, module.save(), part)["loss"]
    assert (
        metrics["accuracy-after"]
        == evaluate(module, directly(kit).model, part)["accuracy"]
    )
    assert metrics["train-loss"] == directly(kit).loss


def test_the_server_may_tell_epochs_and_the_proximal_term(kit):
    app = kit.app()
    message = kit.message(kit.start(), local_epochs=1, proximal_mu=0.5)
    reply = app(message, kit.context(1))
    expected = directly(kit, epochs=1, goal=Proximal(0.5))
    assert reply.content["metrics"]["num-steps"] == 3
    np.testing.assert_array_equal(
        kit.vector(reply.content["arrays"]), expected.model.parameters.numpy()
    )
    # It holds for that message only.
    after = app(kit.message(kit.start()), kit.context(1))
    np.testing.assert_array_equal(
        kit.vector(after.content["arrays"]), directly(kit).model.parameters.numpy()
    )


def test_the_servers_mu_takes_the_place_of_the_clients_own(kit):
    app = kit.app(objective=Proximal(3.0))
    own = app(kit.message(kit.start()), kit.context(1))
    told = app(kit.message(kit.start(), proximal_mu=0.5), kit.context(1))
    for reply, mu in ((own, 3.0), (told, 0.5)):
        expected = directly(kit, goal=Proximal(mu)).model.parameters.numpy()
        np.testing.assert_array_equal(kit.vector(reply.content["arrays"]), expected)


def test_a_mu_that_makes_training_diverge_is_told_once(kit, caplog):
    app = kit.app()
    limit = app.settings.diverging_mu
    app(kit.message(kit.start(), proximal_mu=0.99 * limit), kit.context(1))
    assert not caplog.text
    for _ in range(2):
        app(kit.message(kit.start(), proximal_mu=limit), kit.context(1))
    assert len(caplog.records) == 1
    assert "local training diverges" in caplog.text


class Frozen(nn.Module):
    """Its statistics stay as they are, by the usual idiom."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(4, 5),
            nn.BatchNorm1d(5),
            nn.Linear(5, 3),
        )

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_model_says_itself_what_training_means(kit):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Frozen()

    app = kit.app(make)
    start = FlatRecord(FlatModule(make()).save())
    first, _, again = (
        app(kit.message(start, kind), kit.context(1)).content.array_records
        for kind in (MessageType.TRAIN, MessageType.EVALUATE, MessageType.TRAIN)
    )
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert not first["arrays"][name].numpy().any()
    np.testing.assert_array_equal(
        kit.vector(first["arrays"]), kit.vector(again["arrays"])
    )


@pytest.mark.parametrize("batched", [True, False])
def test_labels_that_are_no_classes_are_refused_by_the_clients_number(kit, batched):
    def data(context):
        own = kit.client_of(context)
        if client_number(context) == 1:
            own.train.y[3] = -100
        return own

    replies = Contexts(kit).answers(
        kit.app(data=data), cohort_of(kit, range(3)), batched
    )
    assert [reply.error is None for reply in replies] == [True, False, True]
    assert "client 1 has an example with label -100" in replies[1].error


def test_zero_epochs_are_refused(kit):
    with pytest.raises(ConfigurationError, match="epochs must be in"):
        kit.app()(kit.message(kit.start(), local_epochs=0), kit.context(0))


def test_the_round_decides_order_and_learning_rate(kit):
    settings = TrainingSettings(epochs=2, batch_size=5, learning_rate_decay=0.5)
    app = kit.app(settings=settings)
    for round in (1, 3):
        reply = app(kit.message(kit.start(), server_round=round), kit.context(1))
        expected = directly(kit, round=round, settings=settings)
        np.testing.assert_array_equal(
            kit.vector(reply.content["arrays"]), expected.model.parameters.numpy()
        )


def test_a_client_without_examples_says_so(kit):
    nothing = ClientData(kit.examples(0), kit.examples(0))
    app = kit.app(data=lambda context: nothing)
    metrics = app(kit.message(kit.start()), kit.context(0)).content
    assert metrics["metrics"]["num-examples"] == 0
    assert np.isnan(metrics["metrics"]["train-loss"])
    np.testing.assert_array_equal(
        kit.vector(metrics["arrays"]), kit.vector(kit.start())
    )


# FedCE's minus model.


class OneWeight(nn.Module):
    """Answers class 1 where its weight is at least the example, else class 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), self.w - x + 1e-4], 1)


def fedce(kit, held_out, objective=None):
    """A client with one weight that is told what to hold out."""
    from fedweight.data import Examples

    x = np.array(held_out, np.float32)[:, None]
    part = Examples(x, np.ones(len(x), np.int64))
    return kit.app(
        OneWeight,
        lambda context: ClientData(part, part),
        num_classes=2,
        settings=TrainingSettings(learning_rate=0.0),
    )


def one(value):
    return ArrayRecord({"w": torch.tensor([float(value)])})


def test_the_minus_model_has_the_golden_value(kit):
    # Global 10, previous local 4, c = 0.25: the minus model is 12. It gets examples
    # up to 12 right, and those above wrong.
    app, context = fedce(kit, [11.0, 11.9, 12.0, 12.1]), kit.context(0)
    first = app(kit.message(one(4), request=["minus-error"]), context)
    assert first.content["metrics"]["minus-error"] == 1.0
    second = app(
        kit.message(one(10), request=["minus-error"], coefficient=0.25), context
    )
    # The first round's accuracy of 0 stays in the mean.
    assert second.content["metrics"]["minus-error"] == 1 - (0 + 3 / 4) / 2
    third = app(kit.message(one(20), request=["minus-error"], coefficient=0.5), context)
    # The model before was 10: minus is 30, all are right.
    assert third.content["metrics"]["minus-error"] == 1 - (0 + 3 / 4 + 1) / 3
    assert list(third.content["metrics"]).count("minus-error") == 1


def test_a_coefficient_of_one_does_not_divide_by_zero(kit):
    app, context = fedce(kit, [1.0]), kit.context(0)
    app(kit.message(one(1), request=["minus-error"]), context)
    reply = app(kit.message(one(2), request=["minus-error"], coefficient=1.0), context)
    assert reply.content["metrics"]["minus-error"] == 0.5


def test_a_client_that_the_server_does_not_know_starts_anew(kit):
    # The server tells no coefficient where it never used a reply of this client.
    app, context = fedce(kit, [1.0]), kit.context(0)
    for _ in range(3):
        reply = app(kit.message(one(1), request=["minus-error"]), context)
        assert reply.content["metrics"]["minus-error"] == 1.0
    reply = app(kit.message(one(2), request=["minus-error"], coefficient=0.5), context)
    assert reply.content["metrics"]["minus-error"] == 0.5


def test_personal_state_is_the_contexts_and_is_kept_only_where_it_is_needed(kit):
    app = fedce(kit, [1.0])
    contexts = [kit.context(k) for k in range(3)]
    for context in contexts[:2]:
        app(kit.message(one(1), request=["minus-error"]), context)
    app(kit.message(one(1)), contexts[2])
    assert [len(c.state) for c in contexts] == [2, 2, 0]
    # The state travels as Flower stores it.
    kept = {
        name: pickle.loads(pickle.dumps(r)) for name, r in contexts[0].state.items()
    }
    moved = kit.context(0)
    for name, record in kept.items():
        moved.state[name] = record
    message = kit.message(one(3), request=["minus-error"], coefficient=0.5)
    assert app(message, moved).content["metrics"]["minus-error"] == 0.5


# What else may come.


def test_missing_or_other_arrays_are_a_clear_error(kit):
    app = kit.app()
    with pytest.raises(ClientError, match="0 array records"):
        app(kit.message(None), kit.context(0))
    other = ArrayRecord({"weight": torch.zeros(3, 4), "bais": torch.zeros(3)})
    with pytest.raises(AggregationError, match=r"missing 'bias', unexpected 'bais'"):
        app(kit.message(other), kit.context(0))
    wide = ArrayRecord({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)})
    with pytest.raises(AggregationError, match=r"'weight' has shape \[3, 5\]"):
        app(kit.message(wide), kit.context(0))
    two = kit.message(kit.start())
    two.content["more"] = kit.start()
    with pytest.raises(ClientError, match="2 array records"):
        app(two, kit.context(0))


def test_records_may_be_called_otherwise(kit):
    content = RecordDict(
        {"model": kit.start(), "settings": ConfigRecord({"local-epochs": 1})}
    )
    message = Message(content, dst_node_id=1000, message_type=MessageType.TRAIN)
    reply = kit.app()(message, kit.context(0))
    assert reply.content["metrics"]["num-steps"] == 3


def test_a_flat_record_trains_as_an_ordinary_one(kit):
    flat = FlatRecord(FlatModule(kit.linear()).save())
    replies = [
        kit.app()(kit.message(arrays), kit.context(0)) for arrays in (flat, kit.start())
    ]
    vectors = [kit.vector(reply.content["arrays"]) for reply in replies]
    np.testing.assert_array_equal(*vectors)


def test_batch_norm_travels_in_the_arrays(kit):
    settings = TrainingSettings(epochs=3, batch_size=4)
    app = kit.app(kit.batch_norm, settings=settings)
    reply = app(kit.message(kit.start(kit.batch_norm)), kit.context(0))
    arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
    assert list(arrays) == list(kit.batch_norm().state_dict())
    assert arrays["1.num_batches_tracked"] == 9
    assert arrays["1.num_batches_tracked"].dtype == np.int64
    assert np.abs(arrays["1.running_mean"]).max() > 0


def test_dropout_depends_on_round_and_client_and_nothing_else(kit):
    start = kit.start(kit.dropout)

    def model(app, client, round=1):
        message = kit.message(start, server_round=round)
        return kit.vector(app(message, kit.context(client)).content["arrays"])

    app = kit.app(kit.dropout)
    alone = model(app, 2)
    before = torch.get_rng_state()
    model(app, 0)
    model(app, 1)
    torch.rand(7)  # somebody else's numbers
    np.testing.assert_array_equal(model(app, 2), alone)
    np.testing.assert_array_equal(model(kit.app(kit.dropout), 2), alone)
    assert not np.array_equal(model(app, 2, round=2), alone)
    torch.set_rng_state(before)
    model(app, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_mods_may_keep_state_and_so_forbid_threads(kit):
    assert kit.app().thread_safe
    mod = [lambda message, context, call: call(message, context)]
    assert not kit.app(mods=mod).thread_safe


def test_mods_see_every_message(kit):
    seen = []

    def mod(message, context, call):
        seen.append(message.metadata.message_type)
        reply = call(message, context)
        reply.content["metrics"]["seen"] = 1
        return reply

    app = kit.app(mods=[mod])
    for kind in ("train", "evaluate", "query.label_counts"):
        arrays = None if kind.startswith("query") else kit.start()
        reply = app(kit.message(arrays, kind), kit.context(0))
        assert reply.content["metrics"]["seen"] == 1
    assert seen == ["train", "evaluate", "query.label_counts"]


def test_it_pickles_before_and_after_use(kit):
    app = kit.app(objective=Proximal(0.1))
    before = cloudpickle.loads(cloudpickle.dumps(app))
    expected = app(kit.message(kit.start()), kit.context(1))
    after = cloudpickle.loads(cloudpickle.dumps(app))
    for copy in (before, after):
        reply = copy(kit.message(kit.start()), kit.context(1))
        np.testing.assert_array_equal(
            kit.vector(reply.content["arrays"]), kit.vector(expected.content["arrays"])
        )
        assert isinstance(copy, ClientApp)


class Waits(Objective):
    """Says when the first step begins, and goes on when it may."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def batch_loss(self, outputs, batch, facts):
        self.begun.set()
        assert self.go.wait(20)
        return Plain().batch_loss(outputs, batch, facts)


def test_cancel_stops_who_is_training_and_nobody_later(kit):
    goal = Waits()
    app = kit.app(objective=goal)
    message, errors = kit.message(kit.start()), []

    def client():
        try:
            app(message, kit.context(0))
        except ClientError as error:
            errors.append(str(error))

    thread = threading.Thread(target=client)
    thread.start()
    assert goal.begun.wait(20)
    app.cancel()
    goal.go.set()
    thread.join(20)
    assert errors == ["training was cancelled"]
    reply = app(kit.message(kit.start()), kit.context(0))
    assert reply.content["metrics"]["num-steps"] == 6


def test_a_client_is_its_partition_or_else_its_node(kit):
    context = kit.context(3)
    assert client_number(context) == 3
    del context.node_config["partition-id"]
    assert client_number(context) == 1003


def test_flowers_plain_fedavg_works_with_it(kit):
    reached = {}
    server_app = ServerApp()

    @server_app.main()
    def main(grid, context):
        result = FedAvg(min_available_nodes=3).start(
            grid, kit.start(), num_rounds=2, timeout=60
        )
        reached["arrays"] = result.arrays
        reached["metrics"] = result.evaluate_metrics_clientapp

    simulate(server_app, kit.app(), num_clients=3, engine="local")
    assert set(reached["metrics"]) == {1, 2}
    assert {"loss", "accuracy"} <= set(reached["metrics"][2])

    # The same by hand.
    w = FlatModule(kit.linear())
    model = w.save()
    for round in (1, 2):
        total = torch.zeros(15, dtype=torch.float64)
        for client in range(3):
            task = task_of(kit, client, round)
            local = train(w, model, task, Plain(), SETTINGS, learning_rate=0.1).model
            total += local.parameters.double() * len(task.examples) / (12 + 13 + 14)
        model = model.with_parameters(total)
    np.testing.assert_allclose(
        kit.vector(reached["arrays"]), model.parameters.numpy(), atol=1e-6
    )


def test_threads_never_change_the_result_even_with_dropout(kit):
    settings = TrainingSettings(epochs=20, batch_size=5)
    models = []
    for threads in (1, 3):
        server_app = ServerApp()

        @server_app.main()
        def main(grid, context):
            start = kit.start(kit.dropout)
            messages = [kit.message(start, client=k) for k in range(12)]
            replies = grid.send_and_receive(messages)
            models.append([kit.vector(r.content["arrays"]) for r in replies])

        simulate(
            server_app,
            kit.app(kit.dropout, settings=settings),
            num_clients=12,
            engine="local",
            threads=threads,
        )
    np.testing.assert_array_equal(models[0], models[1])


# Several clients of a cohort in one go.


def cohort_of(kit, clients, model=None, kind=MessageType.TRAIN, own=None, **config):
    arrays = kit.start(model) if model else kit.start()
    config = {key.replace("_", "-"): value for key, value in config.items()}
    content = RecordDict(
        {"arrays": arrays, "config": ConfigRecord({"server-round": 1, **config})}
    )
    nodes = [1000 + client for client in clients]
    return Cohort(content, nodes, kind, own)


class Contexts(dict):
    """Contexts by node, made when they are asked for."""

    def __init__(self, kit):
        super().__init__()
        self.kit = kit

    def __missing__(self, node):
        self[node] = self.kit.context(node - 1000)
        return self[node]

    def answers(self, app, cohort, batched=True):
        answers = app.answer(cohort, cohort.nodes, self.__getitem__, batched=batched)
        replies = answers.replies
        assert [reply.node for reply in replies] == cohort.nodes
        return replies


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
@pytest.mark.parametrize("batched", [False, True])
def test_an_answer_is_what_the_messages_bring(kit, kind, batched):
    app = kit.app(kit.dropout)
    asks = ["label-counts", "loss-before", "accuracy-after"]
    cohort = cohort_of(kit, [2, 0, 3], kit.dropout, kind, request=asks)
    replies = Contexts(kit).answers(app, cohort, batched)
    for reply, message in zip(replies, cohort, strict=True):
        expected = app(message, kit.context(reply.node - 1000)).content
        assert dict(reply.metrics) == pytest.approx(dict(expected["metrics"]), abs=1e-5)
        assert list(reply.metrics) == list(expected["metrics"])
        assert dict(reply.profile) == dict(expected.get("profile", {}))
        if kind == MessageType.TRAIN:
            np.testing.assert_allclose(
                kit.vector(FlatRecord(reply.model)),
                kit.vector(expected["arrays"]),
                atol=0 if not batched else 1e-5,
            )


def test_clients_that_are_told_different_things_do_them(kit):
    own = {
        1000: ConfigRecord({"server-round": 1, "local-epochs": 1}),
        1001: ConfigRecord({"server-round": 1, "proximal-mu": 0.5}),
        1002: ConfigRecord(),
    }
    for some in ([0, 2, 3], [0, 1, 2, 3]):
        cohort = cohort_of(kit, some, own={1000 + k: own[1000 + k] for k in some[:-1]})
        replies = Contexts(kit).answers(kit.app(), cohort)
        for client, reply in zip(some, replies, strict=True):
            expected = directly(
                kit,
                client,
                epochs=1 if client == 0 else 2,
                goal=Proximal(0.5) if client == 1 else None,
            )
            torch.testing.assert_close(
                reply.model.parameters, expected.model.parameters, atol=1e-5, rtol=0
            )
            assert reply.metrics["num-steps"] == expected.num_steps


@pytest.mark.parametrize("batched", [False, True])
def test_each_client_trains_with_the_learning_rate_that_it_is_told(kit, batched):
    settings = TrainingSettings(epochs=2, batch_size=5, learning_rate_decay=0.5)
    app, rates = kit.app(settings=settings), {0: 0.3, 2: 0.0, 3: 0.02}
    told = {"server-round": 3}
    own = {
        1000 + k: ConfigRecord({**told, "learning-rate": r}) for k, r in rates.items()
    }
    own[1001] = ConfigRecord(told)
    cohort = cohort_of(kit, [0, 1, 2, 3], own=own)
    replies = Contexts(kit).answers(app, cohort, batched)
    for client, reply in enumerate(replies):
        module = FlatModule(kit.linear())
        rate = rates.get(client, 0.1 * 0.5**2)  # What is told is not decayed.
        task = task_of(kit, client, 3)
        expected = train(
            module, module.save(), task, Plain(), settings, learning_rate=rate
        )
        torch.testing.assert_close(
            reply.model.parameters,
            expected.model.parameters,
            atol=1e-5 if batched else 0,
            rtol=0,
        )


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf])
def test_a_learning_rate_out_of_range_is_refused(kit, wrong):
    config = {1001: ConfigRecord({"server-round": 1, "learning-rate": wrong})}
    replies = Contexts(kit).answers(kit.app(), cohort_of(kit, [0, 1], own=config))
    assert replies[0].error is None
    assert "learning-rate must be in [0, inf), got" in replies[1].error


def test_clients_without_examples_answer_in_a_chunk(kit):
    def data(context):
        part = kit.client_of(context).train
        some = client_number(context) % 2
        return ClientData(part if some else part.take(slice(0)), part)

    for clients in ([0, 1, 2, 3], [0, 1], [0, 2]):
        cohort = cohort_of(kit, clients)
        replies = Contexts(kit).answers(kit.app(data=data), cohort)
        for client, reply in zip(clients, replies, strict=True):
            assert reply.error is None
            assert (reply.metrics["num-steps"] > 0) == (client % 2 == 1)
            assert np.isnan(reply.metrics["train-loss"]) == (client % 2 == 0)


@pytest.mark.parametrize("batched", [False, True])
def test_one_client_that_fails_costs_the_others_nothing(kit, batched):
    def data(context):
        own = kit.client_of(context)
        if client_number(context) == 2:
            own.train.y[3] = 99  # there are three classes
        if client_number(context) == 1:
            raise OSError("no such file")
        return own

    app, contexts = kit.app(data=data), Contexts(kit)
    replies = contexts.answers(app, cohort_of(kit, range(5)), batched)
    assert [reply.error is None for reply in replies] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert replies[1].error.startswith("client 1, train: OSError: no such file")
    assert replies[2].error.startswith("client 2, train: IndexError")
    for reply in (replies[0], replies[3], replies[4]):
        expected = directly(kit, reply.node - 1000)
        assert torch.equal(reply.model.parameters, expected.model.parameters)


@pytest.mark.parametrize("batched", [False, True])
def test_a_failure_does_not_count_a_round_of_fedce_twice(kit, batched):
    broken = set()

    def data(context):
        own = kit.client_of(context)
        if client_number(context) in broken:
            own.train.y[0] = 99
        return own

    app, contexts = kit.app(data=data), Contexts(kit)
    told = {"request": ["minus-error", "label-counts"], "coefficient": 0.2}
    for round, bad in enumerate(({}, {3}, {}), start=1):
        broken.clear()
        broken.update(bad)
        cohort = cohort_of(kit, range(4), server_round=round, **told)
        replies = contexts.answers(app, cohort, batched)
        assert [r.error is None for r in replies] == [k not in bad for k in range(4)]
    kept = [contexts[1000 + k].state["minus-error-accuracies"] for k in range(4)]
    assert [len(record["values"]) for record in kept] == [3, 3, 3, 2]


@pytest.mark.parametrize("batched", [False, True])
def test_cancel_stops_a_whole_list_of_clients(kit, batched):
    steps = []

    class Cancels(Objective):
        def batch_loss(self, outputs, batch, facts):
            steps.append(None)
            if len(steps) == 1:
                app.cancel()
            return Plain().batch_loss(outputs, batch, facts)

    app = kit.app(objective=Cancels())
    replies = Contexts(kit).answers(app, cohort_of(kit, range(4)), batched)
    assert all("training was cancelled" in reply.error for reply in replies)
    assert len(steps) <= 2  # nobody was tried alone


class Recurrent(nn.Module):
    """Draws noise that PyTorch keeps to itself."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(1, 4, 2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.gru(x[:, :, None])[0][:, -1])


def test_noise_out_of_reach_is_seeded_for_each_client_and_forbids_threads(kit):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Recurrent()

    app = kit.app(make)
    assert not app.thread_safe
    assert kit.app(kit.dropout).thread_safe
    cohort = cohort_of(kit, range(3), make)
    before = torch.get_rng_state()
    models = []
    for batched in (True, False):
        torch.rand(3)  # somebody else's numbers
        replies = Contexts(kit).answers(app, cohort, batched)
        models.append([reply.model.parameters for reply in replies])
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))
    torch.set_rng_state(before)
    Contexts(kit).answers(app, cohort)
    assert torch.equal(torch.get_rng_state(), before)
    # Round and client decide.
    other = Contexts(kit).answers(app, cohort_of(kit, [0], make, server_round=2))
    assert not torch.equal(other[0].model.parameters, models[0][0])


# What a trial finds out.


@pytest.mark.parametrize("batched", [False, True])
def test_a_lone_last_example_joins_the_batch_before_where_it_has_to(kit, batched):
    settings = TrainingSettings(epochs=2, batch_size=6)  # client 1 has 13 examples
    for model, steps in ((kit.batch_norm, [2, 2, 3]), (kit.linear, [2, 3, 3])):
        app = kit.app(model, settings=settings)
        replies = Contexts(kit).answers(app, cohort_of(kit, range(3), model), batched)
        assert [reply.error for reply in replies] == [None] * 3
        assert [r.metrics["num-steps"] for r in replies] == [2 * s for s in steps]
        again = Contexts(kit).answers(app, cohort_of(kit, range(3), model))
        for one, other in zip(replies, again, strict=True):
            torch.testing.assert_close(
                one.model.parameters, other.model.parameters, atol=1e-6, rtol=0
            )


@pytest.mark.parametrize("batched", [False, True])
def test_a_client_with_too_few_examples_for_the_model_does_not_train(kit, batched):
    def data(context):
        own = kit.client_of(context)
        few = client_number(context) == 2
        return ClientData(own.train.take(slice(1)), own.held_out) if few else own

    app = kit.app(kit.batch_norm, data)
    replies = Contexts(kit).answers(app, cohort_of(kit, range(4), kit.batch_norm))
    start = FlatModule(kit.batch_norm()).save()
    assert [reply.error for reply in replies] == [None] * 4
    assert [reply.metrics["num-steps"] > 0 for reply in replies] == [1, 1, 0, 1]
    few = replies[2]
    assert few.metrics["num-examples"] == 1
    assert np.isnan([few.metrics["train-loss"], few.metrics["train-accuracy"]]).all()
    assert torch.equal(few.model.parameters, start.parameters)
    assert torch.equal(few.model.buffers, start.buffers)
    # A model that can train on it does.
    replies = Contexts(kit).answers(kit.app(data=data), cohort_of(kit, [2, 3]), batched)
    assert replies[0].metrics["num-steps"] == 2


class LooksAround(nn.Module):
    """An example's output depends on who shares its batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


def test_a_model_that_looks_across_the_batch_is_evaluated_client_by_client(kit):
    cohort = cohort_of(kit, range(4), LooksAround, MessageType.EVALUATE)
    together = Contexts(kit).answers(kit.app(LooksAround), cohort)
    alone = [
        kit.app(LooksAround)(message, kit.context(k)).content["metrics"]
        for k, message in enumerate(cohort)
    ]
    assert [dict(r.metrics) for r in together] == [dict(m) for m in alone]


class AlwaysDrops(nn.Linear):
    """Forgets that dropout is for training, as ``F.dropout(x)`` does."""

    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.5))


def test_an_evaluation_that_draws_is_the_same_whoever_is_evaluated_before(kit):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AlwaysDrops(4, 3)

    before = torch.get_rng_state()
    cohort = cohort_of(kit, range(4), make, MessageType.EVALUATE)
    together = Contexts(kit).answers(kit.app(make), cohort)
    backwards = cohort_of(kit, [3, 1, 0], make, MessageType.EVALUATE)
    others = Contexts(kit).answers(kit.app(make), backwards)
    by_node = {reply.node: dict(reply.metrics) for reply in together}
    assert all(dict(reply.metrics) == by_node[reply.node] for reply in others)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_does_not_matter_which_clients_are_tried_at_once_first(kit):
    """Of a client with one example nobody learns that a model looks around."""
    parts = [kit.examples(1 if k < 3 else 9, seed=k) for k in range(6)]
    cohort = cohort_of(kit, range(6), LooksAround)

    def data(context):
        part = parts[client_number(context)]
        return ClientData(part, part)

    results = []
    for first in ([0, 1, 2], [3, 4, 5]):
        app = kit.app(LooksAround, data)
        Contexts(kit).answers(app, cohort_of(kit, first, LooksAround))
        replies = Contexts(kit).answers(app, cohort)
        results.append([reply.model.parameters for reply in replies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_findings_travel_with_the_app(kit, caplog):
    app = kit.app(LooksAround)
    context = kit.context(0)
    assert not app.trains_batched(context)
    assert len(caplog.records) == 1
    copy = cloudpickle.loads(cloudpickle.dumps(app))
    assert not copy.trains_batched(context)
    assert len(caplog.records) == 1


def test_trainers_of_a_few_values_of_mu_are_kept(kit):
    app = kit.app()

    def answer(mu):
        cohort = cohort_of(kit, [0, 1], proximal_mu=mu)
        return [r.model.parameters for r in Contexts(kit).answers(app, cohort)]

    first = answer(0.1)
    for mu in (0.2, 0.3, 0.4, 0.1, 0.5, 0.6):
        again = answer(mu)
        assert all(map(torch.equal, first, again)) == (mu == 0.1)
        assert len(app._trainer._trainers) <= 4
    assert [mu for mu, _ in app._trainer._trainers] == [0.4, 0.1, 0.5, 0.6]


@pytest.mark.parametrize("shared", ["all", "a layer"])
def test_a_model_that_is_always_the_same_object_is_copied(kit, shared):
    def of(layer):
        return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        whole = of(layer)
    settings = TrainingSettings(epochs=20, batch_size=2)
    make = (lambda: whole) if shared == "all" else (lambda: of(layer))
    start = FlatRecord(FlatModule(of(nn.Linear(4, 3))).save())

    def vectors(model, threads):
        found = []
        server_app = ServerApp()

        @server_app.main()
        def main(grid, context):
            messages = [kit.message(start, client=k) for k in range(12)]
            replies = grid.send_and_receive(messages)
            found.extend(kit.vector(r.content["arrays"]) for r in replies)

        simulate(
            server_app,
            kit.app(model, settings=settings),
            num_clients=12,
            engine="local",
            threads=threads,
        )
        return found

    expected = vectors(lambda: of(nn.Linear(4, 3)), 1)
    np.testing.assert_array_equal(vectors(make, 3), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_what_building_a_model_draws_reaches_nobody(kit, batched):
    """Another thread's client may be drawing from the same stream."""
    start, before = FlatRecord(FlatModule(kit.linear()).save()), torch.get_rng_state()
    app = kit.app(lambda: nn.Linear(4, 3))
    for stage in (MessageType.TRAIN, MessageType.EVALUATE):
        nodes = [1000, 1001]
        cohort = Cohort(kit.message(start).content, nodes, stage)
        replies = Contexts(kit).answers(app, cohort, batched)
        assert [reply.error for reply in replies] == [None, None]
    assert torch.equal(torch.get_rng_state(), before)


class Noisy(nn.Module):
    """Draws from PyTorch's stream, from some step on."""

    def __init__(self, after):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.after = after

    def forward(self, x):
        self.steps += self.training
        noise = torch.rand(x.shape) if int(self.steps) > self.after else 0
        return self.linear(x + noise)


@pytest.mark.parametrize("after", [0, 1, 30])
def test_draws_from_the_processs_stream_are_the_same_in_threads(kit, after):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Noisy(after)

    settings = TrainingSettings(epochs=20, batch_size=5)
    models = []
    for threads in (1, 3):
        server_app = ServerApp()

        @server_app.main()
        def main(grid, context):
            messages = [kit.message(kit.start(make), client=k) for k in range(9)]
            replies = grid.send_and_receive(messages)
            models.append([kit.vector(r.content["arrays"]) for r in replies])

        app = kit.app(make, settings=settings)
        assert app.thread_safe == (after == 30)  # That is not seen in a trial.
        simulate(server_app, app, num_clients=9, engine="local", threads=threads)
    np.testing.assert_array_equal(*models)


def test_a_told_proximal_term_takes_the_place_of_all_of_the_objectives(kit):
    from fedweight.clients.objectives import Plain, Proximal

    nested = Proximal(0.3, Proximal(0.2))
    told = kit.message(kit.start(), **{"proximal-mu": 0.05})
    context = kit.context()
    found, expected = (
        kit.app(objective=objective)(told, context).content["arrays"]
        for objective in (nested, Proximal(0.9, Plain()))
    )
    np.testing.assert_array_equal(kit.vector(found), kit.vector(expected))
