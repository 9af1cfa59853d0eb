"""Names of PyTorch's own, or that it may drop: without one training goes on."""

import logging
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedweight.clients import TrainingSettings
from fedweight.clients.objectives import Plain
from fedweight.clients.steps._torch import torchscript
from fedweight.clients.steps.batched import BatchedTrainer
from fedweight.clients.steps.loop import train
from fedweight.clients.steps.task import Task
from fedweight.core import module as core_module
from fedweight.core.module import FlatModule
from fedweight.messages.arrays import FlatRecord
from fedweight.messages.dispatch import Cohort


@pytest.fixture
def results(kit):
    """Train some clients by the app, at once, and by the loop."""

    def run():
        app = kit.app(kit.dropout)
        start = FlatRecord(FlatModule(kit.dropout()).save())
        nodes = [1000, 1001, 1002]
        cohort = Cohort(kit.message(start).content, nodes, "train")
        found, expected = (
            app.answer(
                cohort, nodes, lambda node: kit.context(node - 1000), batched=way
            ).replies
            for way in (True, False)
        )
        assert [reply.error for reply in (*found, *expected)] == [None] * 6
        return [
            torch.stack([reply.model.parameters for reply in replies])
            for replies in (found, expected)
        ]

    return run


def test_with_all_of_them_clients_train_at_once(results, caplog):
    caplog.set_level(logging.DEBUG, "fedweight")
    found, expected = results()
    assert not caplog.records
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "torch._functorch.eager_transforms._create_differentiable",
        "torch._functorch.eager_transforms._undo_create_differentiable",
        "torch._functorch.eager_transforms._wrap_all_tensors",
        "torch._functorch.eager_transforms.grad_increment_nesting",
        "torch._ops.OpOverload",
        "torch._ops.OpOverload.decompose",
        "torch.func.functional_call",
    ],
)
def test_without_what_batching_needs_clients_train_one_after_another(
    name, results, caplog, monkeypatch
):
    if name == "torch.func.functional_call":
        monkeypatch.delattr(core_module, "functional_call")
    else:
        monkeypatch.delattr(name)
    found, expected = results()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("model Sequential trains one client after another: ")
    assert name.rsplit(".", 1)[-1] in warning
    assert torch.equal(found, expected)


def test_without_the_schemas_of_operations_clients_train_one_after_another(
    results, caplog, monkeypatch
):
    def gone(self):
        raise AttributeError("_schema")

    made = property(gone, lambda self, value: None)
    monkeypatch.setattr(torch._ops.OpOverload, "_schema", made, raising=False)
    found, expected = results()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("model Sequential trains one client after another: ")
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name", ["_python_dispatch.TorchDispatchMode", "weak.WeakIdKeyDictionary"]
)
def test_without_a_look_at_operations_clients_train_one_after_another(name):
    code = """
    import logging, sys
    import numpy as np
    import torch
    from torch import nn
    from torch.utils import _python_dispatch, weak
    del NAME
    from flwr.app import Context, RecordDict
    from fedweight.clients import TrainingApp, TrainingSettings
    from fedweight.messages.dispatch import Cohort
    from fedweight.data import ClientData, Examples
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    part = Examples(np.eye(4, dtype=np.float32), np.arange(4) % 2)
    app = TrainingApp(
        lambda: nn.Sequential(nn.Linear(4, 2), nn.AlphaDropout(0.5)),
        lambda context: ClientData(part, part),
        num_classes=2,
    )
    context = Context(
        run_id=0,
        node_id=0,
        node_config={"partition-id": 0, "num-partitions": 1},
        state=RecordDict(),
        run_config={},
    )
    print(app.thread_safe, app.trains_batched(context))
    app = TrainingApp(lambda: nn.Linear(4, 2), app.data, num_classes=2)
    print(app.thread_safe, app.trains_batched(context))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code).replace("NAME", name)],
        capture_output=True,
        text=True,
        check=True,
    )
    warned, draws, again, plain = [
        line for line in done.stdout.splitlines() if not line.startswith("INFO")
    ]
    assert "it draws random numbers from a stream of the process" in warned
    assert "PyTorch's stream" in warned
    assert draws == "False False"
    assert "does not let one look at its operations" in again
    assert plain == "True False"


# TorchScript.


def breaks(*_, **__):
    raise RuntimeError("not today")


@contextmanager
def breaks_inside(*_, **__):
    raise RuntimeError("not today")
    yield


def keeps_inputs(module, examples, check_trace=True):
    """It takes no other option, as ``_store_inputs``."""


def wrong(module, examples, **_):
    """A trace that does something else, as a broken TorchScript might."""

    def run(*given):
        results = module(*given)
        given[0].add_(1)
        return results

    return run


@pytest.mark.parametrize(
    ("name", "stand_in", "said"),
    [
        ("trace", None, "runs in Python"),
        ("trace", breaks, "runs in Python: not today"),
        ("trace", keeps_inputs, "runs in Python: keeps_inputs() got an unexpected"),
        ("trace", wrong, "a training step as TorchScript gave other values"),
        ("optimized_execution", None, "runs in Python"),
        ("optimized_execution", breaks, "runs in Python: not today"),
        ("optimized_execution", breaks_inside, "runs in Python: not today"),
    ],
)
def test_without_torchscript_steps_are_slower_and_the_same(
    name, stand_in, said, results, caplog, monkeypatch
):
    expected, _ = results()
    caplog.set_level(logging.DEBUG, "fedweight")
    if stand_in is None:
        monkeypatch.delattr(torch.jit, name)
    else:
        monkeypatch.setattr(torch.jit, name, stand_in)
    found, _ = results()
    assert torch.equal(found, expected)
    assert said in caplog.text


def test_torchscript_that_fails_is_used_for_nothing(monkeypatch):
    monkeypatch.delattr(torch.jit, "optimized_execution")
    with torchscript.plain_execution():
        pass
    assert not torchscript.has_few_operations(lambda: None)


# Attention.


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        z = x[:, None, :, None]
        return self.linear(F.scaled_dot_product_attention(z, z, z)[:, 0, :, 0])


def attends():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlatModule(Attends())


def test_attention_is_batched_and_keeps_its_kernel_elsewhere(kit):
    module = attends()
    start, settings = module.save(), TrainingSettings(batch_size=4)
    tasks = [Task(kit.examples(n, seed=n), 2, 1, 2) for n in (6, 9)]

    def alone():
        rate = {"learning_rate": 0.1}
        return [train(module, start, t, Plain(), settings, **rate) for t in tasks]

    before = alone()
    trainer = BatchedTrainer(attends(), Plain(), settings)
    found = trainer.train(start, tasks, learning_rate=0.1)
    for one, other, again in zip(before, found, alone(), strict=True):
        assert torch.equal(one.model.parameters, again.model.parameters)
        torch.testing.assert_close(
            other.model.parameters, one.model.parameters, atol=1e-6, rtol=0
        )
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_whose_kernel_cannot_be_chosen_is_as_pytorch_has_it(kit, monkeypatch):
    monkeypatch.delattr("torch.nn.attention.sdpa_kernel")
    module = attends()
    start, settings = module.save(), TrainingSettings(batch_size=4)
    tasks = [Task(kit.examples(n, seed=n), 2, 1, 2) for n in (6, 9)]
    trainer = BatchedTrainer(attends(), Plain(), settings)
    at_once = trainer.train(start, tasks, learning_rate=0.1)
    for task, found in zip(tasks, at_once, strict=True):
        one = train(module, start, task, Plain(), settings, learning_rate=0.1)
        torch.testing.assert_close(
            found.model.parameters, one.model.parameters, atol=1e-6, rtol=0
        )
