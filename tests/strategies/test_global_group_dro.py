"""Global group DRO: its golden values, limits, and what it makes of any answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.clients.objectives import Batch, Facts, Focal
from fedweight.clients.objectives.base import TOLD
from fedweight.clients.objectives.group_dro import GroupDRO
from fedweight.clients.objectives.sam import SAM
from fedweight.core.errors import ClientError, ConfigurationError
from fedweight.messages import keys
from fedweight.strategies.global_group_dro import GlobalGroupDRO, GroupWeighted

CASES = range(3)


def build(**options):
    return GlobalGroupDRO(min_train_nodes=1, min_available_nodes=1, **options)


def by_client(kit, strategy, losses, sizes=None):
    sizes = sizes or [10.0] * len(losses)
    clients = {
        k: kit.Client(np.eye(len(losses))[k], n, {keys.LOSS_BEFORE: loss})
        for k, (loss, n) in enumerate(zip(losses, sizes, strict=True))
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(len(losses))}))


def by_group(kit, counts, sums, counted=None, **options):
    """A federation of clients with some examples, and sums of losses, of each group."""
    counts, sums = np.asarray(counts), np.asarray(sums, float)
    strategy = build(group="site", num_groups=counts.shape[1], **options)
    total = counts.sum(0) if counted is None else counted
    state = {**strategy.begin(), "counts": total.tolist()}
    strategy.restore({**strategy.state, "prepared": True, "method": state})
    clients = {
        k: kit.Client(
            np.eye(len(counts))[k],
            int(counts[k].sum()),
            profile={
                keys.GROUP_COUNTS: counts[k].tolist(),
                keys.GROUP_LOSSES: sums[k].tolist(),
            },
        )
        for k in range(len(counts))
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(len(counts))}))


def weights_of(record):
    return [c.weight for c in record.clients if c.status == "ok"]


def told(run, k=0):
    return run.clients[k].told[-1][keys.GROUP_WEIGHTS]


@pytest.mark.parametrize("case", CASES)
def test_golden_over_clients(kit, golden, case):
    """A round's losses count in the same round."""
    table = golden("global_group_dro")
    expected = table["case"][case]
    run = by_client(kit, build(step=expected["step"]), table["losses"])
    record = run.round()
    assert weights_of(record) == pytest.approx(expected["q"], abs=1e-8)
    np.testing.assert_allclose(run.vector, expected["q"], atol=1e-7)
    assert keys.GROUP_WEIGHTS not in run.clients[0].told[-1]
    second = np.array(expected["q"]) * np.exp(
        expected["step"] * np.array(table["losses"])
    )
    assert weights_of(run.round()) == pytest.approx(second / second.sum(), abs=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_golden_over_groups(kit, golden, case):
    """What clients are told is what the rounds before have left."""
    table = golden("global_group_dro")
    expected = table["case"][case]
    counts = np.array([[8, 1, 0], [0, 1, 20]])
    sums = counts * np.array(table["losses"])
    run = by_group(kit, counts, sums, step=expected["step"])
    record = run.round()
    equal = counts / counts.sum(0)
    assert told(run) == pytest.approx(30 / 3 / counts.sum(0))
    assert weights_of(record) == pytest.approx(equal.mean(1))
    assert record.metrics["group-0-loss"] == pytest.approx(2)
    record = run.round()
    q = np.array(expected["q"])
    assert told(run) == pytest.approx(30 * q / counts.sum(0), abs=1e-6)
    assert weights_of(record) == pytest.approx(equal @ q, abs=1e-7)
    assert record.metrics["group-2-q"] == pytest.approx(q[2], abs=1e-8)


def test_told_weights_are_1_on_average_over_all_examples(kit):
    counts = np.array([[30, 2, 5], [1, 0, 4]])
    run = by_group(kit, counts, counts * [[0.1, 3.0, 1.0]], step=0.7)
    for _ in range(4):
        run.round()
        own = np.array(told(run))
        assert own @ counts.sum(0) / counts.sum() == pytest.approx(1)


def test_the_model_is_that_of_the_weighed_sum_of_gradients(kit):
    """One step of full batches is one of ``sum_g q_g L_g``, whoever has the groups."""
    rng = np.random.default_rng(0)
    counts = np.array([[5, 3], [0, 7], [4, 0]])
    gradients = [[rng.normal(size=(n, 2)) for n in own] for own in counts]
    run = by_group(kit, counts, counts * [[2.0, 0.3]], step=1.0)
    run.arrays = kit.record({"w": np.zeros(2)})
    for k in run.clients:
        run.clients[k].model = np.zeros(2)
    run.round()
    weights = None
    for k, own in enumerate(gradients):
        q = np.exp([2.0, 0.3]) / np.exp([2.0, 0.3]).sum()
        weights = counts.sum() * q / counts.sum(0)
        each = np.repeat(weights, counts[k])
        step = np.concatenate(own)
        run.clients[k].model = -(each[:, None] * step).sum(0) / each.sum()
    run.round()
    of_group = [np.concatenate([own[g] for own in gradients]) for g in range(2)]
    expected = -sum(q[g] * of_group[g].mean(0) for g in range(2))
    np.testing.assert_allclose(run.vector, expected, atol=1e-7)


def test_one_group_only_is_fedavg(kit):
    counts = np.array([[8], [24]])
    run = by_group(kit, counts, counts * [[3.0]], step=5.0)
    for _ in range(3):
        assert weights_of(run.round()) == pytest.approx([0.25, 0.75])
        assert told(run) == [1.0]


def test_a_group_absent_from_the_cohort_keeps_its_weight_but_for_the_scaling(kit):
    counts = np.array([[8, 0], [8, 0]])
    run = by_group(
        kit, counts, counts * [[1.0, 0.0]], np.array([16, 16]), step=math.log(3)
    )
    run.round()
    run.round()
    assert told(run) == pytest.approx([2 * 0.75, 2 * 0.25])
    assert "group-1-loss" not in run.strategy.history[-1].metrics


def test_a_group_that_nobody_has_does_not_count(kit):
    counts = np.array([[8, 0, 4], [8, 0, 4]])
    run = by_group(kit, counts, counts * [[1.0, 0.0, 1.0]], step=1.0)
    for _ in range(3):
        run.round()
        assert told(run) == pytest.approx([24 / 2 / 16, 0, 24 / 2 / 8])


@pytest.mark.parametrize("groups", [True, False])
def test_the_adjustment_favours_small_groups(kit, groups):
    options = {"step": 0.5, "adjustment": 4.0}
    if groups:
        counts = np.array([[16, 4]])
        run = by_group(kit, counts, counts * [[1.0, 1.0]], **options)
        run.round()
        run.round()
        q = np.array(told(run)) * [16, 4] / 20
    else:
        run = by_client(kit, build(**options), [1.0, 1.0], [16.0, 4.0])
        q = np.array(weights_of(run.round()))
    assert q[1] / q[0] == pytest.approx(math.exp(0.5 * 4 * (1 / 2 - 1 / 4)))


losses = st.lists(st.floats(0, 1e300), min_size=1, max_size=6)


@settings(max_examples=40)
@given(losses, st.floats(0, 1e300), st.data())
def test_weights_are_a_distribution_whatever_the_losses(kit, values, step, data):
    order = data.draw(st.permutations(range(len(values))))
    found = []
    for places in (range(len(values)), order):
        run = by_client(kit, build(step=step), [values[k] for k in places])
        for _ in range(2):
            weights = np.array(weights_of(run.round()))
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1)
        found.append(dict(zip(places, weights, strict=True)))
    assert found[0] == pytest.approx(found[1], abs=1e-12)


tables = st.integers(1, 4).flatmap(
    lambda groups: st.lists(
        st.lists(st.integers(0, 50), min_size=groups, max_size=groups).filter(any),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=40)
@given(tables, st.floats(0, 1e3), st.randoms(use_true_random=False))
def test_groups_weigh_clients_by_a_distribution(kit, counts, step, random):
    counts = np.array(counts)
    sums = counts * np.array([[random.uniform(0, 5) for _ in row] for row in counts])
    run = by_group(kit, counts, sums, step=step)
    for _ in range(3):
        weights = np.array(weights_of(run.round()))
        assert (weights >= 0).all()
        assert weights.sum() == pytest.approx(1)
        own = np.array(told(run))
        assert (own >= 0).all()
        assert own @ counts.sum(0) == pytest.approx(counts.sum())


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ({keys.GROUP_COUNTS: [10]}, "must be 2 numbers, one a group"),
        ({keys.GROUP_COUNTS: [11, -1]}, "below 0"),
        ({keys.GROUP_COUNTS: [4, 4]}, "are 8 examples, and it has 10"),
        ({keys.GROUP_LOSSES: [1.0, -0.1]}, "below 0"),
        ({keys.GROUP_LOSSES: [1.0, math.nan]}, "finite"),
    ],
)
def test_answers_that_are_none_are_rejected(kit, profile, why):
    counts = np.array([[6, 4], [6, 4]])
    run = by_group(kit, counts, counts * 1.0)
    run.clients[0].profile |= profile
    record = run.round()
    assert [c.status for c in record.clients] == ["rejected", "ok"]
    assert why in record.clients[0].reason


def test_goes_on_from_its_state(kit):
    counts = np.array([[6, 4], [1, 9]])
    runs = [by_group(kit, counts, counts * [[1.0, 2.0]], step=0.3) for _ in range(2)]
    for _ in range(3):
        runs[0].round()
    runs[1].strategy.restore(runs[0].strategy.state)
    runs[1].arrays, runs[1].number = runs[0].arrays, runs[0].number
    for run in runs:
        run.round()
    assert told(runs[0]) == told(runs[1])
    np.testing.assert_array_equal(runs[0].vector, runs[1].vector)


def test_bad_options_are_refused():
    with pytest.raises(ConfigurationError, match="step must be"):
        build(step=-0.1)
    with pytest.raises(ConfigurationError, match="num_groups must say how many"):
        build(group="sex")


# -------------------------------------------------------------------- the client's half


def facts(weights, counts):
    known = {
        "groups": torch.tensor(counts),
        TOLD + keys.GROUP_WEIGHTS: torch.tensor(weights),
    }
    return Facts(torch.zeros(0), known)


def test_examples_are_weighed_by_their_groups_to_a_mean_of_1():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
    y, groups = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0])
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    batch = Batch(logits, y, mask, groups)
    goal, known = GroupWeighted("site"), facts([3.0, 0.5], [5, 5])
    found = goal.loss(lambda x: logits, batch, known).value
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    expected = np.average(losses[:3], weights=[0.5, 3.0, 0.5])
    assert float(found) == pytest.approx(expected, abs=1e-6)
    focal = GroupWeighted("site", Focal(2.0))
    each = Focal(2.0).example_losses(logits, batch, facts([1.0, 1.0], [5, 5]))
    found = focal.batch_loss(logits, batch, facts([1.0, 1.0], [5, 5]))
    assert float(found) == pytest.approx(float(each[:3].mean()), abs=1e-6)


def test_weights_of_other_groups_are_refused():
    batch = Batch(torch.zeros(1, 2), torch.tensor([0]), groups=torch.tensor([0]))
    with pytest.raises(ClientError, match="tells 3 weights, and 'site' has 2 groups"):
        GroupWeighted("site").batch_loss(
            torch.zeros(1, 2), batch, facts([1.0] * 3, [5, 5])
        )


@pytest.mark.parametrize("inner", [GroupDRO("site"), SAM(0.1, GroupDRO("site"))])
def test_an_objective_that_is_no_mean_of_losses_is_refused(inner):
    with pytest.raises(ConfigurationError, match="its examples cannot be weighed"):
        GroupWeighted("site", inner)


def test_weights_are_not_weighed_again():
    with pytest.raises(ConfigurationError, match="GroupWeighted makes a batch's loss"):
        GroupWeighted("site", SAM(0.1, GroupWeighted("site")))


def test_what_is_not_told_is_said():
    from fedweight.clients.coding import Coding

    goal = GroupWeighted("site")
    config = ConfigRecord({"group": "site"})
    with pytest.raises(ClientError, match="hears 'group-weights' from the strategy"):
        Coding(2, {"site": 2}).heard(goal, dict(config))
