"""How a GPU multiplies: set for a while, and put back."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from fedweight.core import precision
from fedweight.core.errors import ConfigurationError
from fedweight.core.precision import check_precision, gpu_arithmetic


def words():
    """Return all that PyTorch says of how it multiplies."""
    return precision._state()


@pytest.fixture(autouse=True)
def _as_it_was():
    before, every = words(), torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = every
    precision._put_back(before)


def older(matmul, cudnn):
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = cudnn


def newer(**switches):
    for name, value in switches.items():
        precision._switches()[name.replace("_", " ")].fp32_precision = value


USERS = {
    "nothing": lambda: None,
    "older words": lambda: older(True, False),
    "newer words": lambda: newer(cudnn_conv="ieee", cuda_matmul="tf32"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "any order": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("wanted", ["fp32", "tf32", "bf16"])
def test_a_gpu_multiplies_as_told_and_then_as_before(user, wanted):
    USERS[user]()
    before = words()
    with gpu_arithmetic(wanted, "cuda"):
        now = "tf32" if wanted == "tf32" else "ieee"
        assert {s.fp32_precision for s in precision._switches().values()} == {now}
        # Who asks in older words gets the same answer.
        assert torch.backends.cuda.matmul.allow_tf32 == (wanted == "tf32")
        assert torch.backends.cudnn.allow_tf32 == (wanted == "tf32")
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        with gpu_arithmetic(wanted, torch.device("cuda:1")):
            pass
        assert {s.fp32_precision for s in precision._switches().values()} == {now}
    # An older word that could not be read before may be readable now.
    assert words() | before == words()


def test_it_is_put_back_after_an_error():
    before = words()
    with pytest.raises(ZeroDivisionError), gpu_arithmetic("fp32", "cuda"):
        1 / 0  # noqa: B018
    assert words() == before


def test_other_devices_are_none_of_its_business():
    before = words()
    with gpu_arithmetic("tf32", "cpu"):
        assert words() == before


def test_who_wants_another_precision_waits():
    entered, leave, seen = threading.Event(), threading.Event(), []

    def work(wanted, before=lambda: None):
        with gpu_arithmetic(wanted, "cuda"):
            before()
            seen.append((wanted, torch.backends.cudnn.conv.fp32_precision))

    def hold():
        entered.set()
        leave.wait(10)

    holder = threading.Thread(target=work, args=("fp32", hold))
    holder.start()
    assert entered.wait(10)
    others = [threading.Thread(target=work, args=(w,)) for w in ("tf32", "bf16")]
    for other in others:
        other.start()
    others[1].join(10)  # It multiplies as the first one does.
    assert seen == [("bf16", "ieee")]
    leave.set()
    holder.join(10)
    others[0].join(10)
    assert seen == [("bf16", "ieee"), ("fp32", "ieee"), ("tf32", "tf32")]


def test_two_precisions_within_each_other_are_an_error():
    with (
        gpu_arithmetic("fp32", "cuda"),
        pytest.raises(ConfigurationError, match="asks for another"),
        gpu_arithmetic("tf32", "cuda"),
    ):
        pass


def test_what_changes_nothing_is_said_once(caplog):
    precision._IDLE.clear()
    with caplog.at_level(logging.WARNING, "fedweight"):
        for _ in range(2):
            check_precision("engine.precision", "tf32", "cpu")
        check_precision("engine.precision", "tf32", "cuda:1")
        check_precision("engine.precision", "bf16", "cpu")
    (record,) = caplog.records
    said = "engine.precision = 'tf32' changes nothing on a CPU"
    assert record.getMessage().startswith(said)
