"""A model that begins with the weights of a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedweight import models
from fedweight.core.errors import DataError
from fedweight.models.weights import digest, has_tensors_of, load_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def saved(module: nn.Module, path, without: tuple[str, ...] = ()) -> None:
    state = {n: t.clone() for n, t in module.state_dict().items() if n not in without}
    save_file(state, path)


@pytest.mark.parametrize("without", [(), ("second.weight",)])
def test_all_tensors_are_those_of_the_file(path, without):
    one, other = Tied(), Tied()
    one.norm.running_mean += 1
    one.norm.num_batches_tracked += 7
    saved(one, path, without)
    assert has_tensors_of(path, other)
    load_weights(other, path)
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert other.second.weight is other.first.weight


def test_what_is_not_the_models_is_named(path):
    module = Tied()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    good = {n: t.clone() for n, t in before.items()}
    cases = {
        "missing 'norm.bias', unexpected none": {"norm.bias": None},
        "missing none, unexpected 'more'": {"more": torch.ones(1)},
        r"'norm.bias' has shape \[4\]": {"norm.bias": torch.ones(4)},
        "'norm.bias' is float64": {"norm.bias": torch.ones(3, dtype=torch.float64)},
        "'norm.bias' has NaN": {"norm.bias": torch.full((3,), np.nan)},
    }
    for message, change in cases.items():
        state = {**good, **change}
        save_file({n: t for n, t in state.items() if t is not None}, path)
        with pytest.raises(DataError, match=message):
            load_weights(module, path)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])


def test_a_file_that_is_none(path):
    with pytest.raises(DataError, match="it does not exist"):
        load_weights(Tied(), path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(DataError, match="is no safetensors file"):
        load_weights(Tied(), path)


def test_bfloat16_may_be_carried_as_float32(path):
    one, other = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16()
    save_file({n: t.float() for n, t in one.state_dict().items()}, path)
    load_weights(other, path)
    assert torch.equal(other.weight, one.weight)
    save_file({n: t.clone() for n, t in one.state_dict().items()}, path)
    with pytest.raises(DataError, match="is bfloat16 in"):
        load_weights(nn.Linear(2, 2), path)


def test_a_base_gets_adapters_and_adapters_are_taken_whole(path):
    base = models.build("mlp", (4,), 3, seed=5, hidden=[6])
    saved(base, path)
    lora = {"adapters": "lora", "rank": 2, "hidden": [6]}
    adapted = models.build("mlp", (4,), 3, seed=0, weights=path, **lora)
    for name, tensor in base.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], tensor)
    # A is drawn as without the file.
    fresh = models.build("mlp", (4,), 3, seed=0, **lora)
    drawn = {n: t for n, t in fresh.state_dict().items() if "lora" in n}
    assert all(torch.equal(adapted.state_dict()[n], t) for n, t in drawn.items())
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_b" in n).fill_(2.0)
    saved(adapted, path)
    again = models.build("mlp", (4,), 3, seed=0, weights=path, **lora)
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    with pytest.raises(DataError, match="is of another model"):
        models.build("mlp", (4,), 3, seed=0, weights=path, hidden=[6])


def test_the_digest_is_that_of_the_bytes(path):
    path.write_bytes(b"abc")
    assert digest(path).startswith("ba7816bf8f01cfea")
