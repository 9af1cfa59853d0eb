"""Clients that segment images or name labels: alone and at once, and what they say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedweight.clients import Objective, TrainingApp, TrainingSettings
from fedweight.clients.evaluation import evaluate
from fedweight.clients.objectives import (
    SAM,
    Batch,
    Dice,
    Facts,
    FairErrorBound,
    Focal,
    Plain,
    Proximal,
)
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Known, Task
from fedweight.clients.task_objectives import TaskLoss, for_task
from fedweight.core.errors import ClientError, ConfigurationError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.data.tasks import TASKS, task_named
from fedweight.messages import keys
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort
from fedweight.metrics import Statistics
from fedweight.models import build

SEGMENTATION, LABELS = task_named("segmentation"), task_named("multi-label")

OPTIMIZERS = {
    "sgd": {"learning_rate": 0.05},
    "adam": {"optimizer": "adam", "learning_rate": 0.01},
}


def images(n, seed=0, dtype=np.float64):
    """Noise, in which bright pixels are of class 1 and the brightest of class 2."""
    x = np.random.default_rng(seed).normal(size=(n, 1, 8, 8))
    groups = {"scanner": np.arange(n) % 2}
    return Examples(x.astype(dtype), (x[:, 0] > 0.5) * 1 + (x[:, 0] > 1.5), groups)


def rows(n, seed=0, dtype=np.float64):
    """Numbers, and for each of three sums of them whether it is positive."""
    x = np.random.default_rng(seed).normal(size=(n, 4))
    y = x @ np.random.default_rng(9).normal(size=(4, 3)) > 0
    return Examples(x.astype(dtype), y.astype(dtype))


def unet():
    return build("unet", (1, 8, 8), 3, seed=0, width=4).double()


def linear():
    return build("mlp", (4,), 3, seed=0, hidden=8).double()


GOALS = [
    (images, unet, SEGMENTATION, Plain()),
    (images, unet, SEGMENTATION, Dice(0.7)),
    (images, unet, SEGMENTATION, FairErrorBound("scanner", share=0.6)),
    (images, unet, SEGMENTATION, Proximal(0.5, SAM(0.1, Dice()))),
    (rows, linear, LABELS, Plain()),
    (rows, linear, LABELS, SAM(0.1)),
]
NAMES = ["masks", "dice", "fair", "around-dice", "labels", "sam-labels"]


@pytest.mark.parametrize("sizes", [[8, 8, 8], [3, 9, 1]], ids=["same", "ragged"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("draw", "net", "task", "goal"), GOALS, ids=NAMES)
def test_at_once_is_alone(draw, net, task, goal, optimizer, sizes):
    goal = for_task(goal, task)
    settings = TrainingSettings(batch_size=4, **OPTIMIZERS[optimizer])
    module = FlatModule(net())
    start, whole = module.save(), draw(sum(sizes))
    ends = np.cumsum(sizes)
    tasks = []
    for key, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        part = whole.take(slice(end - size, end))
        known = Known()
        if "groups" in goal.wants:
            groups = part.attributes["scanner"]
            counts = torch.from_numpy(np.bincount(groups, minlength=2))
            known = Known({"groups": counts.float()}, groups=groups)
        tasks.append(Task(part, 2, key, known=known))
    rate = settings.learning_rate
    # As TorchScript, which takes a second to make, once for each goal.
    once = optimizer == "sgd" and len(set(sizes)) > 1
    trainer = BatchedTrainer(FlatModule(net()), goal, settings, compiled=once)
    at_once = trainer.train(start, tasks, learning_rate=rate)
    for own, found in zip(tasks, at_once, strict=True):
        alone = train(module, start, own, goal, settings, learning_rate=rate)
        np.testing.assert_allclose(
            found.model.parameters, alone.model.parameters, rtol=0, atol=1e-9
        )
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)  # Counted in float32.
        assert found.accuracy == pytest.approx(alone.accuracy, abs=1e-6)
        assert not torch.equal(found.model.parameters, start.parameters)


@pytest.mark.parametrize(
    ("draw", "net", "task", "loss_of"),
    [
        (images, unet, SEGMENTATION, F.cross_entropy),
        (rows, linear, LABELS, F.binary_cross_entropy_with_logits),
    ],
    ids=["masks", "labels"],
)
def test_a_step_is_what_pytorch_makes_of_the_loss(draw, net, task, loss_of):
    module, data = FlatModule(net()), draw(6)
    start, model = module.save(), net()
    settings = TrainingSettings(batch_size=6)
    goal = for_task(Plain(), task)
    found = train(module, start, Task(data, 1, 0), goal, settings, learning_rate=0.05)
    outputs = model(torch.from_numpy(data.x))
    loss = loss_of(outputs, torch.from_numpy(data.y))
    loss.backward()
    with torch.no_grad():
        wanted = torch.cat([(p - 0.05 * p.grad).flatten() for p in model.parameters()])
    np.testing.assert_allclose(found.model.parameters, wanted, rtol=0, atol=1e-12)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    decided = outputs.argmax(1) if task is SEGMENTATION else outputs > 0
    hits = decided == torch.from_numpy(data.y)
    assert found.accuracy == pytest.approx(hits.double().mean().item(), abs=1e-7)


# ------------------------------------------------------------------------ objectives


def loss_of(goal, logits, batch, **known):
    return goal.batch_loss(logits, batch, Facts(torch.zeros(1), known, {}))


def test_dice_of_a_batch_is_as_written_out():
    data = images(5)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 3, 8, 8)))
    y = torch.from_numpy(data.y)
    p = logits.softmax(1)
    losses = []
    for c in (1, 2):
        true = (y == c).double()
        both, sizes = (p[:, c] * true).sum(), (p[:, c] ** 2).sum() + true.sum()
        losses.append(1 - (2 * both + 1e-5) / (sizes + 1e-5))
    expected = 0.4 * F.cross_entropy(logits, y) + 0.6 * torch.stack(losses).mean()
    batch = Batch(torch.from_numpy(data.x), y)
    assert loss_of(Dice(0.6), logits, batch).item() == pytest.approx(expected.item())
    assert loss_of(Dice(0.0), logits, batch).item() == pytest.approx(
        F.cross_entropy(logits, y).item()
    )
    sure = 50 * F.one_hot(y, 3).movedim(-1, 1).double()
    assert loss_of(Dice(), sure, batch).item() == pytest.approx(0, abs=1e-6)


def test_dice_by_hand():
    """Two pixels: p of the shape is 0.8 where it is and 0.4 where it is not."""
    logits = torch.tensor([[[[0.2, 0.6]], [[0.8, 0.4]]]], dtype=torch.float64).log()
    batch = Batch(torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 0]]]))
    # 1 - 2 * 0.8 / (0.64 + 0.16 + 1), and -(log 0.8 + log 0.6) / 2.
    dice, cross = 1 / 9, 0.3669845875401002
    assert loss_of(Dice(), logits, batch).item() == pytest.approx(dice, abs=1e-5)
    found = loss_of(Dice(0.25), logits, batch).item()
    assert found == pytest.approx(0.75 * cross + 0.25 * dice, abs=1e-5)


def test_padding_is_no_part_of_a_dice_loss():
    data = images(5)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 3, 8, 8)))
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    few = Batch(x[:3], y[:3])
    mask = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    for goal in (Dice(0.5), FairErrorBound("scanner")):
        groups = torch.from_numpy(data.attributes["scanner"])
        counts = {"groups": torch.ones(2, dtype=torch.float64)}
        padded = Batch(x, y, mask, groups)
        few.groups = groups[:3]
        alone = loss_of(goal, logits[:3], few, **counts).item()
        assert loss_of(goal, logits, padded, **counts).item() == pytest.approx(alone)


def test_a_fair_error_bound_of_masks_is_that_of_their_pixels():
    data, goal = images(6), FairErrorBound("scanner", share=0.7)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3, 8, 8)))
    groups = torch.from_numpy(data.attributes["scanner"])
    y, x = torch.from_numpy(data.y), torch.from_numpy(data.x)
    counts = {"groups": torch.ones(2, dtype=torch.float64)}
    found = loss_of(goal, logits, Batch(x, y, groups=groups), **counts)
    # Each pixel as an example of its own.
    apart = logits.movedim(1, -1).flatten(0, 2)
    pixels = Batch(x.flatten()[:, None], y.flatten())
    pixels.groups = groups.repeat_interleave(64)
    wanted = loss_of(goal, apart, pixels, **counts)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_which_objectives_go_with_which_task():
    assert isinstance(for_task(Plain(), SEGMENTATION), TaskLoss)
    dice = Dice()
    assert for_task(dice, SEGMENTATION) is dice
    outer = SAM(0.1, FairErrorBound("scanner"))
    assert for_task(outer, SEGMENTATION) is outer
    for goal, task, message in (
        (
            dice,
            LABELS,
            "objective 'dice' is for segmentation, and the data are for mul",
        ),
        (SAM(0.1, dice), TASKS["classification"], "'dice' is for segmentation"),
        (FairErrorBound("a"), LABELS, "is for classification and segmentation, and"),
        (Focal(), SEGMENTATION, "'focal' is for examples that have a class"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            for_task(goal, task)

    class Own(Objective):
        tasks = ("regression",)

    with pytest.raises(ConfigurationError, match="Own' is for regression"):
        for_task(Own(), LABELS)


# ------------------------------------------------------------------------------- apps


def app_of(draw, net, task, **options):
    def client_of(context):
        k = int(context.node_config["partition-id"])
        return ClientData(draw(12 + k, k, np.float32), draw(4 + k, 50 + k, np.float32))

    options.setdefault("settings", TrainingSettings(epochs=2, batch_size=5))
    return TrainingApp(
        lambda: net().float(), client_of, task=task, num_classes=3, **options
    )


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("draw", "net", "task"),
    [(images, unet, "segmentation"), (rows, linear, "multi-label")],
    ids=["masks", "labels"],
)
def test_clients_train_and_say_what_is_measured(kit, draw, net, task, batched):
    start = kit.start(lambda: net().float())
    replies = {}
    for kind in ("train", "evaluate"):
        messages = [kit.message(start, kind=kind, client=k) for k in range(3)]
        nodes = [1000 + k for k in range(3)]
        cohort = Cohort(messages[0].content, nodes, kind, config_key="config")
        answers = app_of(draw, net, task).answer(
            cohort, nodes, lambda node: kit.context(node - 1000), batched=batched
        )
        replies[kind] = answers.replies
    for k, reply in enumerate(replies["train"]):
        assert reply.error is None, reply.error
        assert reply.metrics.keys() == {
            *("num-examples", "train-loss", "train-accuracy", "num-steps")
        }
        assert reply.metrics["num-examples"] == 12 + k
        assert 0 < reply.metrics["train-accuracy"] < 1
    statistics = Statistics(task_named(task), 3)
    sums, odd = statistics.read(
        [reply.metrics[keys.STATISTICS] for reply in replies["evaluate"]]
    )
    assert not odd
    found, module = statistics.result(sums), FlatModule(net().float())
    for k in range(3):
        part = draw(4 + k, 50 + k, np.float32)
        alone = evaluate(module, module.save(), part, statistics)
        for name, value in alone.items():
            assert found[name][k] == pytest.approx(value, rel=1e-5, nan_ok=True)


def test_an_app_says_early_what_it_cannot_train():
    with pytest.raises(ConfigurationError, match="num_classes must be 2 or more"):
        TrainingApp(unet, lambda context: None, task="segmentation")
    with pytest.raises(ConfigurationError, match="num_classes must be 1 or more"):
        TrainingApp(linear, lambda context: None, task="multi-label")
    with pytest.raises(ConfigurationError, match="Did you mean 'segmentation'"):
        TrainingApp(unet, lambda context: None, task="segmentations", num_classes=3)
    with pytest.raises(ConfigurationError, match="'focal' is for examples that have"):
        TrainingApp(
            unet,
            lambda context: None,
            task="segmentation",
            num_classes=3,
            objective=Focal(),
        )


def test_masks_with_a_class_below_0_are_refused(kit):
    part = images(4, dtype=np.float32)
    bad = Examples(part.x, part.y - 1)
    app = TrainingApp(
        lambda: unet().float(),
        lambda context: ClientData(bad, bad),
        task="segmentation",
        num_classes=3,
    )
    with pytest.raises(ClientError, match="client 0 has an example with label -1"):
        app(kit.message(kit.start(lambda: unet().float())), kit.context())


def test_labels_are_not_counted_as_classes(kit):
    message = kit.message(
        kit.start(lambda: linear().float()), request=[keys.LABEL_COUNTS]
    )
    with pytest.raises(ClientError, match="no class each to count"):
        app_of(rows, linear, "multi-label")(message, kit.context())


# ---------------------------------------------------------------------- FedCE's probe


class Shift(nn.Module):
    """Decides on class 1 where a pixel is above what it has learnt."""

    def __init__(self):
        super().__init__()
        self.above = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.cat([self.above - x, x - self.above], 1)


@pytest.mark.parametrize("empty", [False, True])
def test_fedce_asks_for_dice(kit, empty):
    x = np.random.default_rng(0).normal(size=(6, 1, 4, 4)).astype(np.float32)
    y = np.zeros((6, 4, 4), int) if empty else (x[:, 0] > 0.3) * 1
    app = TrainingApp(
        Shift,
        lambda context: ClientData(Examples(x, y), Examples(x, y)),
        task="segmentation",
        num_classes=2,
        settings=TrainingSettings(learning_rate=1e-9),
    )
    context = kit.context()
    first = kit.message(kit.start(Shift), request=[keys.MINUS_ERROR])
    assert app(first, context).content["metrics"]["minus-error"] == 1
    start = Shift()
    # The minus model (w - c w_own) / (1 - c) is at 3 where all is background.
    start.above.data += 0.75 * 3 if empty else 0.75 * 0.6
    second = kit.message(
        FlatRecord(FlatModule(start).save()),
        request=[keys.MINUS_ERROR],
        coefficient=0.25,
    )
    found = app(second, context).content["metrics"]["minus-error"]
    if empty:
        assert x.max() < 3
        score = 1.0  # Nothing is there, and nothing was found.
    else:
        guess, true = x[:, 0] > 0.6, y == 1
        score = 2 * (guess & true).sum() / (guess.sum() + true.sum())
    assert found == pytest.approx(1 - (0 + score) / 2, abs=1e-6)
    assert not math.isnan(found)
