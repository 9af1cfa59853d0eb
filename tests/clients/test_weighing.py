"""Objectives that weigh examples or groups: golden values, limits and their weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from fedweight.clients.noise import GAMMA_UNIFORMS, log_gamma
from fedweight.clients.objectives import Batch, Facts, Objective
from fedweight.clients.objectives.base import TOLD
from fedweight.clients.objectives.class_balanced import ClassBalanced, class_balanced
from fedweight.clients.objectives.dice import dice_losses
from fedweight.clients.objectives.dynamic import Dynamic, dynamic_weights
from fedweight.clients.objectives.fair_error_bound import (
    FairErrorBound,
    bound_scales,
)
from fedweight.clients.objectives.ldam import LDAM, margins
from fedweight.clients.objectives.noisy_labels import (
    DWS,
    RENT,
    label_weights,
    pooled_transition,
    resampled,
    transition_matrix,
    transition_sums,
)
from fedweight.core.errors import ConfigurationError
from fedweight.data import ClientData, Examples
from fedweight.messages import keys

COUNTS = torch.tensor([100.0, 10.0, 1.0], dtype=torch.float64)

SHAPES = ("linupper", "mid", "extremes", "upper")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch_of(n=6, classes=3, seed=0, **more):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(n, classes)) * 2)
    y = torch.from_numpy(rng.integers(0, classes, n))
    return logits, Batch(torch.zeros(n, 1), y, stream=(11, 3), **more)


def facts(carry=None, **known):
    names = {name.replace("_", "-"): value for name, value in known.items()}
    return Facts(torch.zeros(0), names, carry or {})


def loss(goal, logits, batch, known):
    """Return what an objective finds where the model gives these logits."""
    batch.begin()
    return float(goal.loss(lambda x: logits, batch, known).value)


def cross_entropy(logits, batch, weights=None):
    losses = F.cross_entropy(logits, batch.y, reduction="none").numpy()
    return float(np.average(losses, weights=weights))


# ------------------------------------------------------------------- the batch's mean


def test_weights_are_scaled_to_a_mean_of_1():
    batch = Batch(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    values, weights = doubles(1.0, 2.0, 4.0), doubles(3.0, 1.0, 0.0)
    assert float(batch.mean(values, weights)) == pytest.approx(1.25)
    assert float(batch.mean(values, 100 * weights)) == pytest.approx(1.25)
    assert float(batch.mean(values, torch.zeros_like(weights))) == 0


def test_padding_has_no_weight_whatever_it_is():
    mask = torch.tensor([1.0, 1.0, 0.0])
    batch = Batch(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), mask)
    values, weights = doubles(1.0, 2.0, math.nan), doubles(3.0, 1.0, math.inf)
    assert float(batch.mean(values, weights)) == pytest.approx(1.25)


# ---------------------------------------------------------------------- class balanced


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.999, [0.02836301, 0.27125554, 2.70038144]),
        (0.9999, [0.02715872, 0.27036887, 2.7024724]),
        (0.0, [1.0, 1.0, 1.0]),
        (1 - 1e-12, [3 / 111, 30 / 111, 300 / 111]),
    ],
)
def test_class_balanced_has_its_golden_values(beta, expected):
    found = class_balanced(COUNTS, beta).tolist()
    assert found == pytest.approx(expected, abs=1e-8 if 0 < beta < 0.99999 else 1e-4)
    single = class_balanced(COUNTS.float(), beta).tolist()
    assert single == pytest.approx(expected, rel=1e-4)


def test_a_class_that_nobody_has_counts_nothing():
    found = class_balanced(doubles(100.0, 0.0, 1.0), 0.999)
    assert float(found[1]) == 0
    assert float(found.sum()) == pytest.approx(2)
    assert class_balanced(doubles(0.0, 0.0), 0.9).tolist() == [0, 0]
    assert class_balanced(doubles(0.0, 5.0), 0.0).tolist() == [0, 1]


def test_class_balanced_is_pytorchs_weighted_cross_entropy():
    logits, batch = batch_of(20)
    weight = class_balanced(COUNTS, 0.999)
    expected = float(F.cross_entropy(logits, batch.y, weight))
    found = loss(ClassBalanced(), logits, batch, facts(class_totals=COUNTS))
    own = ClassBalanced(counts="own")
    assert found == pytest.approx(expected, abs=1e-12)
    assert loss(own, logits, batch, facts(class_counts=COUNTS)) == found


# --------------------------------------------------------------------------------- LDAM


def test_ldam_has_its_golden_margins():
    found = margins(COUNTS, 0.5).tolist()
    assert found == pytest.approx([0.15811388, 0.28117066, 0.5], abs=1e-8)
    assert margins(doubles(16.0, 0.0), 0.5).tolist() == [0.5, 0]
    assert margins(doubles(0.0, 0.0), 0.5).tolist() == [0, 0]


def test_ldam_takes_the_margin_from_the_scaled_cosine_of_the_own_class():
    rng = np.random.default_rng(1)
    cosines, y = rng.uniform(-1, 1, (5, 3)), rng.integers(0, 3, 5)
    taken = cosines.copy()
    taken[np.arange(5), y] -= margins(COUNTS, 0.5).numpy()[y]
    expected = float(F.cross_entropy(torch.from_numpy(30 * taken), torch.tensor(y)))
    batch = Batch(torch.zeros(5, 1), torch.from_numpy(y))
    logits = torch.from_numpy(30 * cosines)
    found = loss(LDAM(), logits, batch, facts(class_totals=COUNTS))
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("round", "weighed"), [(15, False), (16, True), (20, True)])
def test_ldam_weighs_classes_from_a_round_on(round, weighed):
    logits, batch = batch_of(20)
    goal = LDAM(reweight_from=16, beta=0.99)
    known = facts(class_totals=COUNTS, round=doubles(round)[0])
    losses = goal.example_losses(logits, batch, known).numpy()
    weights = class_balanced(COUNTS, 0.99).numpy()[batch.y] if weighed else None
    expected = np.average(losses, weights=weights)
    assert loss(goal, logits, batch, known) == pytest.approx(expected, abs=1e-12)


def test_ldam_without_margins_is_the_cross_entropy():
    logits, batch = batch_of(20)
    found = loss(LDAM(margin=0.0), logits, batch, facts(class_totals=COUNTS))
    assert found == pytest.approx(cross_entropy(logits, batch), abs=1e-12)


# ------------------------------------------------------------------------------ dynamic


@pytest.mark.parametrize(
    ("shape", "temperature", "expected"),
    [
        ("linupper", 1.0, [0.19077248, 0.29065417, 0.51857336]),
        ("mid", 1.0, [0.25354067, 0.49291866, 0.25354067]),
        ("extremes", 1.0, [0.37645563, 0.24708874, 0.37645563]),
        ("linupper", 0.4, [0.06231432, 0.17854182, 0.75914386]),
    ],
)
def test_dynamic_weights_have_their_golden_values(shape, temperature, expected):
    found = dynamic_weights(doubles(0.1, 0.5, 2.0), shape, temperature)
    assert found.tolist() == pytest.approx(expected, abs=1e-8)


def test_the_upper_shape_is_a_softmax_of_the_place_between_the_ends():
    found = dynamic_weights(doubles(1.0, 2.0, 5.0), "upper", 0.5)
    expected = np.exp([0, 2 * 0.25, 2])
    assert found.tolist() == pytest.approx(expected / expected.sum(), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    losses=arrays.arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1e3)),
    padding=st.integers(0, 3),
    temperature=st.floats(0.05, 10),
)
def test_dynamic_weights_sum_to_1_and_do_not_see_padding(
    shape, losses, padding, temperature
):
    alone = dynamic_weights(torch.from_numpy(losses), shape, temperature)
    assert float(alone.sum()) == pytest.approx(1)
    assert bool((alone >= 0).all())
    padded = torch.from_numpy(np.append(losses, np.full(padding, 1e6)))
    mask = (torch.arange(len(padded)) < len(losses)).float()
    found = dynamic_weights(padded, shape, temperature, mask)
    np.testing.assert_allclose(found[: len(losses)], alone, atol=1e-12)
    assert float(found[len(losses) :].sum()) == 0
    equal = dynamic_weights(torch.full((5,), losses[0]), shape, temperature)
    np.testing.assert_allclose(equal, 0.2, atol=1e-7)


def test_dynamic_begins_in_its_round():
    logits, batch = batch_of(20)
    goal = Dynamic("upper", 0.2, start=3)
    found = [
        loss(goal, logits, batch, facts(round=doubles(round)[0])) for round in (2, 3)
    ]
    plain = cross_entropy(logits, batch)
    assert found[0] == pytest.approx(plain, abs=1e-12)
    assert found[1] > plain * 1.05
    assert found[1] == loss(Dynamic("upper", 0.2), logits, batch, facts())


# ------------------------------------------------------------------- fair error bounds


def test_fair_error_bounds_have_their_golden_values():
    losses, there = doubles(0.2, 0.4, 0.8), torch.ones(3) > 0
    found = bound_scales(losses, there, 1.0).tolist()
    assert found == pytest.approx([0.76159416, 0.46211716, 0.24491866], abs=1e-8)
    found = bound_scales(losses, there, 0.5).tolist()
    assert found == pytest.approx([0.76159416, 0.60885937, 0.46211716], abs=1e-8)


def test_a_group_that_is_not_in_the_batch_changes_no_scale():
    there = torch.tensor([True, False, True])
    found = bound_scales(doubles(0.2, 0.0, 0.4), there, 1.0)
    assert found[[0, 2]].tolist() == pytest.approx([math.tanh(1), math.tanh(0.5)])
    nothing = bound_scales(doubles(0.0, 0.5), torch.ones(2) > 0, 1.0)
    assert bool(nothing.isfinite().all())
    assert float(nothing[0]) == pytest.approx(math.tanh(1))


def test_the_dice_loss_of_a_perfect_prediction_is_0():
    target = torch.eye(3, dtype=torch.float64)
    assert dice_losses(target, target).tolist() == pytest.approx([0, 0, 0])
    assert dice_losses(1 - target, target).min() > 0.99
    found = dice_losses(doubles(0.8, 0.3)[:, None], doubles(1.0, 0.0)[:, None])
    assert float(found) == pytest.approx(1 - 1.6 / (0.73 + 1), abs=1e-5)


def test_a_fair_error_bound_is_as_written_out():
    groups = torch.tensor([0, 2, 0, 0, 2, 2, 2, 0])
    logits, batch = batch_of(8, groups=groups)
    known = facts(groups=doubles(4.0, 0.0, 4.0))
    likely, target = logits.softmax(1), F.one_hot(batch.y, 3).double()
    errors = {
        g: float(dice_losses(likely[groups == g], target[groups == g]).sum())
        for g in (0, 2)
    }
    scale = {g: math.tanh(min(errors.values()) / e) for g, e in errors.items()}
    scaled = likely * doubles(*(scale[int(g)] for g in groups))[:, None]
    expected = 0.3 * cross_entropy(logits, batch) + 0.7 * float(
        dice_losses(scaled, target).mean()
    )
    found = loss(FairErrorBound("site", share=0.7), logits, batch, known)
    assert found == pytest.approx(expected, abs=1e-9)
    plain = loss(FairErrorBound("site", share=0.0), logits, batch, known)
    assert plain == pytest.approx(cross_entropy(logits, batch), abs=1e-12)


# ------------------------------------------------------------------------ noisy labels


def test_label_weights_have_their_golden_values():
    likely = doubles(0.9, 0.1, 0.6, 0.4, 0.2, 0.8).view(3, 2)
    transition = doubles(0.8, 0.2, 0.2, 0.8).view(2, 2)
    found = label_weights(likely, torch.tensor([0, 1, 0]), transition)
    assert found.tolist() == pytest.approx([1.21621622, 0.90909091, 0.625], abs=1e-8)
    share = (found / found.sum()).tolist()
    assert share == pytest.approx([0.44221106, 0.3305416, 0.22724735], abs=1e-8)


def test_a_transition_matrix_is_read_off_surely_predicted_examples():
    sure = np.linspace(0.5, 0.9, 100)
    of_first = np.stack([sure, (1 - sure) * 0.75, (1 - sure) * 0.25], 1)
    likely = torch.from_numpy(np.concatenate([of_first, [[0.2, 0.3, 0.5]]]))
    labels = torch.tensor([0] * 100 + [2])
    found = transition_matrix(likely, labels)
    # Three of a hundred are surer than the one that is taken.
    np.testing.assert_allclose(found[:, 0], of_first[96], atol=1e-12)
    assert found[:, 1].tolist() == [0, 1, 0]
    assert found[:, 2].tolist() == pytest.approx([0.2, 0.3, 0.5])
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-12)


@given(
    weights=arrays.arrays(np.float64, st.integers(1, 9), elements=st.floats(0, 50)),
    seed=st.integers(0, 99),
    padding=st.integers(0, 4),
)
def test_as_many_are_drawn_as_there_are(weights, seed, padding):
    n = len(weights)
    uniforms = np.random.default_rng(seed).random(n + padding, np.float32)
    counts = resampled(torch.from_numpy(weights), torch.from_numpy(uniforms[:n]))
    assert float(counts.sum()) == n
    if weights.any():
        assert not counts[torch.from_numpy(weights == 0)].any()
        shares = np.cumsum(weights) / weights.sum()
        places = np.searchsorted(shares, uniforms[:n].astype(float), side="right")
        some = np.abs(shares[:, None] - uniforms[:n]).min() > 1e-9
        if some:
            expected = np.bincount(places, minlength=n)
            assert counts.tolist() == expected.tolist()
    padded = torch.from_numpy(np.append(weights, np.full(padding, 9.0)))
    mask = (torch.arange(n + padding) < n).float()
    found = resampled(padded, torch.from_numpy(uniforms), mask)
    assert found.tolist() == [*counts.tolist(), *[0.0] * padding]


def test_draws_follow_the_weights():
    n, weights = 50_000, doubles(5.0, 3.0, 0.0, 2.0)
    spread = weights.repeat(n // 4)
    rng = np.random.default_rng(0)
    uniforms = torch.from_numpy(rng.random(n, np.float32))
    reached = spread.cumsum(0)
    drawn = torch.searchsorted(reached, uniforms.double() * reached[-1], right=True)
    found = torch.bincount(drawn % 4, minlength=4)
    few = [
        resampled(weights, torch.from_numpy(rng.random(4, np.float32)))
        for _ in range(n // 4)
    ]
    for counts in (found, torch.stack(few).sum(0)):
        expected = n * weights / weights.sum()
        assert float(counts[2]) == 0
        some = [0, 1, 3]
        test = stats.chisquare(counts[some].numpy(), expected[some].numpy())
        assert test.pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.01, 0.3, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_numbers_follow_their_law(shape, dtype):
    n = 20_000
    uniforms = np.random.default_rng(1).random((n, GAMMA_UNIFORMS), np.float32)
    found = log_gamma(torch.full((n,), shape, dtype=dtype), torch.from_numpy(uniforms))
    assert found.dtype == dtype
    assert bool(found.isfinite().all())
    logs = found.double().numpy()
    assert stats.kstest(logs, stats.loggamma(shape).cdf).pvalue > 1e-3
    # It would notice another shape.
    assert stats.kstest(logs, stats.loggamma(1.1 * shape).cdf).pvalue < 1e-3


def test_a_gamma_number_of_shape_0_is_0():
    uniforms = torch.rand(3, GAMMA_UNIFORMS, generator=torch.Generator().manual_seed(0))
    found = log_gamma(doubles(0.0, 1.0, 0.0), uniforms)
    assert found.isinf().tolist() == [True, False, True]
    assert not found.isnan().any()


def test_random_numbers_of_a_batch_are_gammas_of_its_own_stream():
    _, batch = batch_of(6)
    shape = doubles(0.5, 1.0, 2.0, 0.0, 3.0, 4.0)
    found = batch.log_gamma(shape)
    batch.begin()
    expected = log_gamma(shape, batch.uniform(6, GAMMA_UNIFORMS))
    assert torch.equal(found, expected)


def examples_of(likely, labels):
    """A client whose received model has these probabilities."""
    part = Examples(np.zeros((len(labels), 1), np.float32), labels.numpy())
    return SimpleNamespace(
        data=ClientData(part, part),
        num_classes=likely.shape[1],
        outputs=lambda: likely.log(),
    )


def test_pooled_it_is_the_mean_of_the_clients_columns_by_their_examples():
    rng = np.random.default_rng(0)
    classes, sums, matrices, counts = 3, [], [], []
    for n in (40, 7, 1, 0):
        likely = torch.from_numpy(rng.dirichlet(np.ones(classes), n))
        labels = torch.from_numpy(rng.integers(0, classes - 1, n))  # None of class 2.
        sums.append(transition_sums(examples_of(likely, labels)))
        matrices.append(transition_matrix(likely, labels).numpy())
        counts.append(np.bincount(labels, minlength=classes))
    found = pooled_transition(doubles(*np.sum(sums, axis=0)), classes).numpy()
    for c in (0, 1):
        of_class = [n[c] for n in counts]
        expected = np.average([m[:, c] for m in matrices], axis=0, weights=of_class)
        np.testing.assert_allclose(found[:, c], expected, atol=1e-12)
    assert found[:, 2].tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.sum(0), 1)


@pytest.mark.parametrize("goal", [RENT, DWS])
def test_pooled_it_weighs_by_what_it_is_told(goal):
    own, pooled = goal(start=5), goal(start=5, estimate="pooled")
    logits, batch = batch_of(8)
    transition = torch.from_numpy(
        np.random.default_rng(1).dirichlet(np.ones(3), 3).T.copy()
    )
    counts = doubles(3.0, 5.0, 2.0)
    told = torch.cat([(transition * counts).flatten(), counts])
    name = TOLD + keys.TRANSITION_SUMS
    expected = loss(own, logits, batch, known_of(own, transition=transition))
    known = {"class-counts": counts, "round": doubles(5.0)[0], name: told}
    found = loss(pooled, logits, batch, Facts(torch.zeros(0), known, {}))
    assert found == pytest.approx(expected, abs=1e-12)
    usual = pooled.unheard(logits, Facts(torch.zeros(0), known))
    none = {**known, name: usual[keys.TRANSITION_SUMS].double()}
    found = loss(pooled, logits, batch, Facts(torch.zeros(0), none, {}))
    assert found == pytest.approx(cross_entropy(logits, batch), abs=1e-12)


def test_what_is_known_is_not_estimated():
    with pytest.raises(ConfigurationError, match="nothing is estimated"):
        RENT(flip=0.2, estimate="pooled")


def known_of(goal, round=5, transition=None):
    known = {"class_counts": doubles(4.0, 4.0, 4.0), "round": doubles(round)[0]}
    carry = dict(goal.begin(facts(**known)))
    if transition is not None:
        carry["transition"] = transition
    return facts(carry, **known)


def test_rent_is_the_cross_entropy_of_a_resample():
    logits, batch = batch_of(12)
    goal = RENT(start=5, flip=0.4)
    known = known_of(goal)
    right = label_weights(logits.softmax(1), batch.y, known.carry["transition"])
    counts = resampled(right, batch.uniform(12))
    expected = cross_entropy(logits, batch, counts.numpy())
    assert loss(goal, logits, batch, known) == pytest.approx(expected, abs=1e-12)
    before = loss(goal, logits, batch, known_of(goal, round=4))
    assert before == pytest.approx(cross_entropy(logits, batch), abs=1e-12)


def test_a_known_share_of_flips_is_a_symmetric_matrix():
    found = known_of(RENT(flip=0.3)).carry["transition"]
    expected = np.full((3, 3), 0.15) + 0.55 * np.eye(3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_matrix_is_estimated_once():
    goal = RENT(start=5)
    likely = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).double()
    labels, asked = torch.tensor([0, 1, 2]), []

    def predict():
        asked.append(1)
        return likely.log()

    before = goal.look(predict, labels, known_of(goal, round=4))
    assert not before
    assert not asked
    found = goal.look(predict, labels, known_of(goal, round=6))
    np.testing.assert_allclose(found["transition"], likely.t(), atol=1e-12)
    later = known_of(goal, round=7)
    later.carry = {**later.carry, **found}
    assert not goal.look(predict, labels, later)
    assert len(asked) == 1


def test_dirichlet_weights_have_the_means_and_the_spread_of_their_law():
    goal = DWS(concentration=5.0)
    right = doubles(1.0, 0.5, 0.0, 2.5)
    drawn = []
    for step in range(4000):
        batch = Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
        batch.stream = 7, step
        drawn.append(goal.weights(right, batch).numpy())
    found, share = np.array(drawn), (right / right.sum()).numpy()
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(found.mean(0), share, atol=0.01)
    spread = share * (1 - share) / (5 + 1)
    np.testing.assert_allclose(found.var(0), spread, atol=0.003)


def test_dirichlet_weights_of_a_large_concentration_are_their_means():
    logits, batch = batch_of(12)
    goal = DWS(start=1, flip=0.4, concentration=1e9)
    known = known_of(goal)
    right = label_weights(logits.softmax(1), batch.y, known.carry["transition"])
    expected = cross_entropy(logits, batch, right.numpy())
    assert loss(goal, logits, batch, known) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("goal", [RENT(start=1), DWS(start=1)])
def test_where_no_label_can_be_right_all_count_alike(goal):
    batch = Batch(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), stream=(1, 2))
    found = goal.weights(torch.zeros(3, dtype=torch.float64), batch)
    assert float(found.sum()) == pytest.approx(3 if type(goal) is RENT else 1)
    assert not found.isnan().any()


# ------------------------------------------------------------------------------ of all


WEIGHING: dict[str, Objective] = {
    "class-balanced": ClassBalanced(),
    "ldam": LDAM(margin=0.0, reweight_from=1),
    **{shape: Dynamic(shape) for shape in SHAPES},
    "rent": RENT(start=1, flip=0.3),
    "dws": DWS(start=1, flip=0.3),
}


@pytest.mark.parametrize("name", WEIGHING)
def test_a_loss_that_all_examples_share_is_the_batchs(name):
    """Weights of mean 1 leave it as it is: a step is as long as without them."""
    goal = WEIGHING[name]
    logits = doubles(1.0, 0.5, 0.0).expand(5, 3)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    batch = Batch(torch.zeros(5, 1), torch.full((5,), 1), mask, stream=(3, 1))
    known = known_of(goal, round=1)._known | {"class-totals": COUNTS}
    carry = known_of(goal, round=1).carry
    found = loss(goal, logits, batch, Facts(torch.zeros(0), known, carry))
    assert found == pytest.approx(cross_entropy(logits, batch), abs=1e-12)
