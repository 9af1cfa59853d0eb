"""AgnosticFair: golden values, its linear programme, and what it is told and asked."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedweight.clients.coding import Coding
from fedweight.clients.objectives import Batch, Facts, Focal, Objective
from fedweight.clients.objectives.base import TOLD
from fedweight.clients.objectives.group_dro import GroupDRO
from fedweight.clients.probes import ClientRound
from fedweight.clients.queries import feature_sums
from fedweight.core import extras
from fedweight.core.errors import ConfigurationError
from fedweight.data import ClientData, Examples
from fedweight.messages import keys
from fedweight.server.phase import feature_moments
from fedweight.strategies.agnostic_fair import (
    BASES,
    COEFFICIENTS,
    SUMS,
    WIDTHS,
    AgnosticFair,
    KernelWeighted,
    Sums,
    agnostic_sums,
    kernels,
    uniform_coefficients,
    worst_coefficients,
)
from fedweight.strategies.round import Selection


def build(**options):
    return AgnosticFair(min_train_nodes=1, min_available_nodes=1, **options)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def total_of(table):
    return Sums(
        np.array(table["masses"]),
        np.array(table["basis_losses"]),
        np.array(table["fairness_pieces"]),
        3.0,
    )


def seen(table, some=slice(None), group="site", **told):
    """What a client with some of the golden examples measures."""
    x = np.array(table["x"], np.float32)[some, None]
    y = np.zeros(len(x), np.int64)
    codes = np.array(table["groups"])[some]
    part = Examples(x, y, {"site": codes})
    scores = doubles(table["scores"])[some]
    config = ConfigRecord(
        {
            keys.GROUP: group,
            BASES: table["bases"],
            WIDTHS: [1.0],
            COEFFICIENTS: table["coefficients"],
            **told,
        }
    )
    losses = doubles(table["losses"])[some]
    task = SimpleNamespace(example_losses=lambda outputs, labels: losses)
    coding = Coding(2, {"site": 2}, task)
    nothing = SimpleNamespace()
    return ClientRound(
        client=0,
        number=1,
        told=config,
        data=ClientData(part, part),
        num_classes=2,
        received=nothing,
        _model=nothing,
        num_steps=1,
        settings=nothing,
        learning_rate=0.1,
        _peers=SimpleNamespace(
            outputs=lambda client, part: torch.stack([-scores, 0 * scores], 1)
        ),
        _coding=coding,
        _state=nothing,
    )


# ------------------------------------------------------------------------ golden values


def test_kernels_and_sums_have_their_golden_values(golden):
    table = golden("agnostic_fair")
    found = kernels(
        doubles(table["x"])[:, None], doubles(table["bases"])[:, None], torch.ones(1)
    )
    np.testing.assert_allclose(found, table["kernels"], atol=1e-8)
    total = Sums.of(np.array(agnostic_sums(seen(table))), 3.0)
    for ours, theirs in zip(total, total_of(table), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_sums_of_clients_add_up_to_those_of_all(golden):
    table = golden("agnostic_fair")
    parts = [slice(0, 1), slice(1, 3), slice(0, 0)]
    added = np.sum([agnostic_sums(seen(table, part)) for part in parts], axis=0)
    np.testing.assert_allclose(added, agnostic_sums(seen(table)), atol=1e-12)


@pytest.mark.parametrize("case", range(3))
def test_the_linear_programme_has_its_golden_values(golden, case):
    table = golden("agnostic_fair")
    expected, total = table["case"][case], total_of(table)
    found = worst_coefficients(total, 5.0, expected["tolerance"])
    if "a" not in expected:
        assert found is None
        return
    np.testing.assert_allclose(found, expected["a"], atol=1e-7)
    assert float(found @ total.losses) == pytest.approx(expected["value"], abs=1e-7)
    assert float(found @ total.masses) == pytest.approx(3)


class Given(Objective):
    """Has losses whatever the outputs are."""

    def __init__(self, losses):
        self.losses = losses

    def example_losses(self, outputs, batch, facts):
        return self.losses


def on_golden(table, penalty=1.0, group="site", a=None, mask=None, inner=None):
    """What the objective finds on the golden examples, some of them padding."""
    scores = doubles(table["scores"])
    outputs = torch.stack([0 * scores, scores], 1)
    batch = Batch(
        doubles(table["x"])[:, None],
        torch.zeros(3, dtype=torch.long),
        mask,
        torch.tensor(table["groups"]),
    )
    known = {
        BASES: doubles(table["bases"]),
        WIDTHS: torch.ones(1, dtype=torch.float64),
        COEFFICIENTS: doubles(a or table["coefficients"]),
    }
    facts = Facts(torch.zeros(0), {TOLD + n: v for n, v in known.items()})
    goal = KernelWeighted(group, penalty, inner or Given(doubles(table["losses"])))
    found = goal.loss(lambda x: outputs, batch, facts)
    return goal, batch, facts, float(found.value)


def test_the_objective_has_its_golden_values(golden):
    table = golden("agnostic_fair")
    goal, batch, facts, value = on_golden(table)
    theta = goal.example_weights(batch, facts)
    np.testing.assert_allclose(theta, table["theta"], atol=1e-8)
    weighed = float(np.mean(np.array(table["theta"]) * table["losses"]))
    assert value == pytest.approx(weighed + table["penalty"], abs=1e-8)
    assert on_golden(table, 0.0)[-1] == pytest.approx(weighed, abs=1e-8)
    assert on_golden(table, 5.0, "")[-1] == pytest.approx(weighed, abs=1e-8)
    member = np.array(table["theta"]) * table["groups"]
    fairness = ((member - member.mean()) * table["scores"]).sum()
    assert fairness == pytest.approx(table["fairness"], abs=1e-7)


def test_padding_does_not_count(golden):
    table = golden("agnostic_fair")
    mask = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    first = {n: np.array(table[n][:2]) for n in ("groups", "scores", "losses")}
    theta = np.array(table["kernels"])[:2] @ table["coefficients"]
    theta /= theta.mean()
    member = theta * first["groups"]
    unfair = (member - member.mean()) * first["scores"]
    expected = np.mean(theta * first["losses"]) + np.mean(unfair**2)
    assert on_golden(table, mask=mask)[-1] == pytest.approx(expected, abs=1e-7)


def test_one_group_only_has_the_penalty_of_its_weights_spread(golden):
    """With equal weights there is none, whatever the scores."""
    table = golden("agnostic_fair")
    for codes in ([0, 0, 0], [1, 1, 1]):
        one = {**table, "groups": codes, "bases": [0.0, 0.0]}
        one["x"] = [1.0, -1.0, 1.0]
        assert on_golden(one)[-1] == pytest.approx(np.mean(one["losses"]), abs=1e-8)
        total = Sums.of(np.array(agnostic_sums(seen({**table, "groups": codes}))), 3.0)
        if codes[0] == 0:
            np.testing.assert_array_equal(total.unfairness, 0)


def test_where_no_base_is_near_all_examples_count_alike(golden):
    table = {**golden("agnostic_fair"), "bases": [1e4, -1e4]}
    goal, batch, facts, value = on_golden(table, 0.0)
    assert goal.example_weights(batch, facts).tolist() == [1, 1, 1]
    assert value == pytest.approx(0.4)
    total = Sums.of(np.array(agnostic_sums(seen(table))), 3.0)
    assert worst_coefficients(total, 5.0, 1e9) is None
    assert uniform_coefficients(total).tolist() == [1, 1]


def test_another_objective_is_weighed_but_not_one_that_is_no_mean():
    with pytest.raises(ConfigurationError, match="cannot be weighed besides"):
        KernelWeighted("site", 1.0, GroupDRO("site"))
    assert KernelWeighted("site", 1.0, Focal()).wants == {"groups"}
    assert KernelWeighted("", 1.0, Focal()).wants == frozenset()


# ----------------------------------------------------------------- the linear programme

sums_of_some = st.integers(1, 6).flatmap(
    lambda m: st.builds(
        lambda masses, means, unfair: Sums(
            np.array(masses),
            np.array(masses) * means,
            np.array(masses) * unfair,
            100.0,
        ),
        *[
            st.lists(st.floats(low, high), min_size=m, max_size=m).map(np.array)
            for low, high in ((0, 100), (0, 10), (-5, 5))
        ],
    )
)


@settings(max_examples=80)
@given(sums_of_some, st.floats(0.1, 20), st.floats(0, 1000))
def test_coefficients_are_feasible_and_no_feasible_ones_are_worse(
    total, bound, tolerance
):
    found = worst_coefficients(total, bound, tolerance)
    rng = np.random.default_rng(0)
    near = 1e-6 * total.examples
    if found is not None:
        assert (found >= 0).all()
        assert (found <= bound).all()
        assert found @ total.masses == pytest.approx(total.examples, abs=near)
        assert abs(found @ total.unfairness) <= tolerance + near
    for _ in range(20):
        other = rng.uniform(0, bound, len(total.masses))
        mass = other @ total.masses
        if not mass > 0:
            continue
        with np.errstate(over="ignore"):
            other *= total.examples / mass
        if (other > bound).any() or abs(other @ total.unfairness) > tolerance:
            continue
        assert found is not None
        assert other @ total.losses <= found @ total.losses + near


@settings(max_examples=40)
@given(sums_of_some)
def test_uniform_coefficients_have_the_mass_of_all_examples(total):
    found = uniform_coefficients(total)
    assert (found > 0).all()
    if total.masses.sum() > 1e-290:
        assert found @ total.masses == pytest.approx(total.examples)


# --------------------------------------------------------------------------- the rounds


def federation(kit, sums, sizes, **options):
    """Clients that answer with some sums, and a strategy that has asked before."""
    sums = np.asarray(sums, float)
    bases = (sums.shape[1] - 1) // 4
    strategy = build(bases=bases, group="site", **options)
    state = {
        "bases": np.zeros((bases, 1)),
        "widths": np.ones(1),
        "coefficients": [1.0] * bases,
        "feasible": True,
    }
    strategy.restore({**strategy.state, "prepared": True, "method": state})
    clients = {
        k: kit.Client(np.eye(len(sums))[k], n, profile={SUMS: sums[k].tolist()})
        for k, n in enumerate(sizes)
    }
    return kit.Federation(strategy, clients, kit.record({"w": np.zeros(len(sums))}))


def golden_clients(table):
    return [agnostic_sums(seen(table, part)) for part in (slice(0, 1), slice(1, 3))]


def test_a_round_weighs_by_mass_and_chooses_the_next_coefficients(kit, golden):
    table = golden("agnostic_fair")
    run = federation(kit, golden_clients(table), [1, 2], tolerance=1.0)
    record = run.round()
    kernel = np.array(table["kernels"])
    expected = np.array([kernel[0].sum(), kernel[1:].sum()])
    weights = [c.weight for c in record.clients]
    assert weights == pytest.approx(expected / expected.sum())
    assert run.clients[0].told[-1][COEFFICIENTS] == [1.0, 1.0]
    assert record.metrics["feasible"] == 1
    assert record.metrics["worst-loss"] == pytest.approx(0.68302817 / 3, abs=1e-7)
    assert record.metrics["unfairness"] == pytest.approx(1.0, abs=1e-6)
    record = run.round()
    a = np.array(table["case"][1]["a"])
    assert run.clients[0].told[-1][COEFFICIENTS] == pytest.approx(a, abs=1e-7)
    theta = kernel @ a
    assert theta.sum() == pytest.approx(3)
    weights = [c.weight for c in record.clients]
    assert weights == pytest.approx([theta[0] / 3, theta[1:].sum() / 3], abs=1e-7)


def test_infeasible_is_said_and_all_bases_count_alike(kit, golden, caplog):
    table = golden("agnostic_fair")
    run = federation(kit, golden_clients(table), [1, 2], tolerance=0.5)
    with caplog.at_level(logging.WARNING):
        record = run.round()
    assert "round 1: no weighing of the examples is feasible" in caplog.text
    assert record.metrics["feasible"] == 0
    assert run.round().metrics["feasible"] == 0
    assert "round 2" not in caplog.text  # Said once.
    mass = 2 * table["masses"][0]
    told = run.clients[1].told[-1][COEFFICIENTS]
    assert told == pytest.approx([3 / mass] * 2, abs=1e-7)


def test_far_bases_leave_the_weights_to_data_size(kit, caplog):
    zeros = [[0.0] * 8 + [1.0]] * 2
    run = federation(kit, zeros, [30, 10])
    with caplog.at_level(logging.WARNING):
        record = run.round()
    assert [c.weight for c in record.clients] == [0.75, 0.25]
    assert "no weighing of the examples is feasible" in caplog.text
    assert "falling back to data size" in caplog.text
    run.round()
    assert run.clients[0].told[-1][COEFFICIENTS] == [1.0, 1.0]


client_sums = st.integers(1, 3).flatmap(
    lambda m: st.lists(
        st.tuples(
            st.integers(1, 50),
            *[
                st.lists(st.floats(low, 1), min_size=m, max_size=m)
                for low in (0, 0, 0, -1)
            ],
            st.floats(-1, 1),
        ),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=30)
@given(client_sums, st.floats(0, 10), st.randoms(use_true_random=False))
def test_weights_are_a_distribution_and_no_order_matters(
    kit, clients, tolerance, random
):
    sums, sizes = [], []
    for n, mass, loss, member, score, scores in clients:
        masses = np.array(mass) * n
        parts = (masses, masses * loss, masses * member, masses * score, [scores * n])
        sums.append(np.concatenate(parts))
        sizes.append(n)
    order = list(range(len(sizes)))
    random.shuffle(order)
    found = []
    for places in (range(len(sizes)), order):
        run = federation(
            kit,
            [sums[k] for k in places],
            [sizes[k] for k in places],
            tolerance=tolerance,
        )
        for _ in range(2):
            record = run.round()
            weights = [c.weight for c in record.clients]
            assert min(weights) >= 0
            assert sum(weights) == pytest.approx(1)
        found.append(record.metrics["worst-loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        (0, -1.0, "masses must be from 0 to its"),
        (0, 11.0, "masses must be from 0 to its"),
        (1, -0.1, "a sum of its losses is below 0"),
        (2, 9.0, "masses of a group exceed those of all"),
        (4, math.nan, "finite"),
        (None, None, "must be 5 numbers"),
    ],
)
def test_sums_that_nobody_has_are_rejected(kit, place, value, why):
    good = [5.0, 3.0, 2.0, 1.0, 4.0]
    run = federation(kit, [good, good], [10, 10])
    bad = [*good]
    if place is None:
        bad = bad[1:]
    else:
        bad[place] = value
    run.clients[1].profile = {SUMS: bad}
    record = run.round()
    assert [c.status for c in record.clients] == ["ok", "rejected"]
    assert why in record.clients[1].reason


# -------------------------------------------------------------------- before the rounds


class Population:
    """Clients that answer the query with the sums of their own rows."""

    def __init__(self, parts):
        self.parts = parts
        self.clients = tuple(range(len(parts)))
        self.rejected = []

    def ask(self, query, questions):
        assert query == keys.FEATURE_SUMS
        answers = {}
        for client, question in questions.items():
            x = np.asarray(self.parts[client], np.float64)
            if "mean" in question.arrays:
                if x.shape[1:] != question.arrays["mean"].shape:
                    continue  # It cannot answer.
                x = (x - question.arrays["mean"]) ** 2
            answers[client] = SimpleNamespace(
                metrics={keys.NUM_EXAMPLES: len(x)},
                arrays={"sums": x.sum(0)},
                profile={},
            )
        return answers

    def reject(self, query, client, why):
        self.rejected.append((client, why))


ROWS = np.random.default_rng(0).normal(size=(40, 3)) * [1, 10, 0] + [5, 0, 2]


@pytest.mark.parametrize("drawn", [True, False])
def test_bases_are_rows_of_the_proxy_set_or_drawn(drawn):
    proxy = SimpleNamespace(x=np.zeros((0, 3)) if drawn else ROWS[::-1] + 1)
    strategy = build(bases=8, group="site", proxy=proxy)
    state = strategy.prepare(Population([ROWS[:7], ROWS[7:]]))
    deviation = ROWS.std(0)
    deviation[2] = 1
    scaled = (state["bases"] - ROWS.mean(0)) / deviation
    pairs = [np.linalg.norm(a - b) for i, a in enumerate(scaled) for b in scaled[:i]]
    np.testing.assert_allclose(state["widths"], np.median(pairs) * deviation)
    for row in state["bases"]:
        assert any(np.array_equal(row, own) for own in proxy.x) != drawn
        assert not any(np.array_equal(row, own) for own in ROWS)
    again = build(bases=8, group="site", proxy=proxy)
    np.testing.assert_array_equal(
        again.prepare(Population([ROWS[:7], ROWS[7:]]))["bases"], state["bases"]
    )
    other = build(bases=8, group="site", proxy=proxy, seed=1)
    assert not np.array_equal(
        other.prepare(Population([ROWS]))["bases"], state["bases"]
    )


def test_a_given_sigma_is_in_deviations():
    state = build(sigma=0.5).prepare(Population([ROWS]))
    np.testing.assert_allclose(state["widths"][:2], 0.5 * ROWS.std(0)[:2])


def test_a_client_without_examples_answers_sums_of_0():
    nobody = Examples(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    for arrays in ({}, {"mean": np.ones(3)}):
        asked = SimpleNamespace(data=SimpleNamespace(train=nobody), arrays=arrays)
        found = feature_sums(asked)
        assert found.metrics == {keys.NUM_EXAMPLES: 0}
        assert found.arrays["sums"].tolist() == [0.0, 0.0, 0.0]


def test_a_feature_that_is_the_same_everywhere_has_a_deviation_of_1():
    parts = [np.full((n, 2), [0.1, 0.7]) for n in (3, 3)]
    mean, deviation = feature_moments(Population(parts))
    assert (mean != [0.1, 0.7]).any()  # By its last bits.
    assert deviation.tolist() == [1.0, 1.0]


def test_clients_of_other_features_are_left_out():
    population = Population([ROWS[:20], ROWS[:5, :2], ROWS[20:], ROWS[:0]])
    state = build().prepare(population)
    whole = build().prepare(Population([ROWS]))
    np.testing.assert_allclose(state["bases"], whole["bases"])
    assert {client for client, _ in population.rejected} == {1}
    with pytest.raises(ConfigurationError, match="no client told the sums"):
        build().prepare(Population([ROWS[:0]]))


def test_what_is_told_and_asked():
    strategy = build(bases=2, group="site")
    state = strategy.prepare(Population([ROWS]))
    told = strategy.tell(Selection(1, (0,), state))
    assert len(told[BASES].values) == 6
    assert told[keys.GROUP] == "site"
    assert strategy.ask(Selection(1, (0,), state)) == {SUMS: True}
    assert strategy.tell(Selection(1, (0,), strategy.begin())) == {}


def test_without_a_group_it_says_that_nothing_is_held_fair(caplog):
    with caplog.at_level(logging.WARNING):
        build().prepare(Population([ROWS]))
    assert "nothing is held to be fair" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bases": 0}, "bases must be"),
        ({"sigma": 0.0}, "sigma must be"),
        ({"bound": 0.0}, "bound must be"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"penalty": -1.0}, "penalty must be"),
        ({"input_shape": (1, 28, 28)}, r"inputs have shape \[1, 28, 28\].*embedding"),
        ({"group": "race", "num_groups": 5}, "two groups, and there are 5"),
        ({"group": "sex", "num_classes": 10}, "two classes, and there are 10"),
    ],
)
def test_what_it_cannot_do_is_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        build(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bases": 1}, "no two bases are apart"),
        ({"bases": 400_000}, "at most 1,000,000 numbers"),
        ({"proxy": SimpleNamespace(x=np.zeros((99, 2)))}, "30 bases of 3 features"),
    ],
)
def test_bases_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigurationError, match=said):
        build(**options).prepare(Population([ROWS]))


def test_bases_are_drawn_where_the_proxy_set_is_too_small(caplog):
    small = build(proxy=SimpleNamespace(x=ROWS[:4])).prepare(Population([ROWS]))
    assert "the proxy set has 4 rows, and strategy.bases is 30" in caplog.text
    drawn = build().prepare(Population([ROWS]))
    np.testing.assert_array_equal(small["bases"], drawn["bases"])


def test_scipy_is_asked_for_when_it_is_made(monkeypatch):
    monkeypatch.setattr(extras, "is_installed", lambda package: False)
    with pytest.raises(ConfigurationError, match=r"Install fedweight\[studies\]"):
        build()
