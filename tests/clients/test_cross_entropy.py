"""The cross-entropy of labels, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedweight.clients.steps.cross_entropy import OfLabels, cross_entropy


def example(n, classes, seed):
    stream = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(n, classes, generator=stream)
    labels = torch.randint(classes, (n,), generator=stream)
    return logits.requires_grad_(), labels, torch.rand(classes, generator=stream)


@given(
    n=st.integers(1, 20),
    classes=st.integers(1, 12),
    seed=st.integers(0, 2**32),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_values_and_gradients_are_pytorchs(
    n, classes, seed, weighted, reduction, smoothing
):
    logits, labels, weight = example(n, classes, seed)
    weight = weight if weighted else None
    more = {"reduction": reduction, "label_smoothing": smoothing}
    mine = cross_entropy(logits, labels, weight, **more)
    theirs = F.cross_entropy(logits, labels, weight, **more)
    torch.testing.assert_close(mine, theirs)
    own, its = (torch.autograd.grad(v.sum(), logits)[0] for v in (mine, theirs))
    torch.testing.assert_close(own, its)


def graph_of(loss):
    """Return the name of the operation that a loss ends with."""
    return type(loss.grad_fn).__name__


def test_labels_are_taken_for_classes_and_nothing_else_is():
    logits, labels, _ = example(6, 4, 0)
    images = logits[:, :, None].expand(6, 4, 3)
    ignoring = torch.where(labels < 2, -100, labels)
    others = {
        "other labels": lambda: F.cross_entropy(logits, labels.clone()),
        "labels to be ignored": lambda: F.cross_entropy(logits, ignoring),
        "another label ignored": lambda: F.cross_entropy(
            logits, labels, ignore_index=1
        ),
        "probabilities": lambda: F.cross_entropy(logits, logits.detach().softmax(1)),
        "a class for each pixel": lambda: F.cross_entropy(
            images, labels[:, None].expand(6, 3)
        ),
        "another loss": lambda: F.nll_loss(logits, labels),
    }
    outside = {name: (graph_of(f()), f().item()) for name, f in others.items()}
    with OfLabels(labels):
        loss = F.cross_entropy(logits, labels)
        module = torch.nn.CrossEntropyLoss()(logits, labels)
        for name, f in others.items():
            assert (graph_of(f()), f().item()) == outside[name], name
    assert graph_of(loss) == graph_of(module) == "MeanBackward0"
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item())


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_smoothing": 2.0},
        {"reduction": "avg"},
        {"weight": torch.ones(20)},
        {"weight": torch.ones(4, dtype=torch.float64)},
        {"repeat": 2},
    ],
)
def test_what_pytorch_refuses_is_refused(wrong):
    logits, labels, _ = example(6, 4, 0)
    logits = logits.repeat(wrong.pop("repeat", 1), 1)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        F.cross_entropy(logits, labels, **wrong)
    with OfLabels(labels), pytest.raises(theirs.type) as mine:
        F.cross_entropy(logits, labels, **wrong)
    assert str(mine.value) == str(theirs.value)


def test_labels_that_change_are_no_longer_known():
    logits, labels, _ = example(6, 4, 0)
    with OfLabels(labels):
        labels.masked_fill_(labels < 2, -100)
        found = F.cross_entropy(logits, labels)
    assert found.item() == F.cross_entropy(logits, labels).item()


def test_old_names_of_the_reduction_are_pytorchs():
    logits, labels, _ = example(6, 4, 0)
    with OfLabels(labels), pytest.warns(UserWarning, match="reduction='sum'"):
        found = F.cross_entropy(logits, labels, size_average=False)
    assert found.item() == pytest.approx(
        F.cross_entropy(logits, labels, reduction="sum").item()
    )
