"""Runs whose server averages the products of LoRA's adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedweight
from fedweight.core.errors import ConfigurationError

SETTINGS: dict[str, Any] = {
    "partition.clients": 5,
    "run.rounds": 1,
    "training.epochs": 1,
    "training.learning-rate": 0.02,
    "model.name": "mlp",
    "model.hidden": [16],
    "model.adapters": "lora",
    "model.rank": 3,
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(averaged: str, **more: Any) -> fedweight.Run:
    keys = {key.replace("__", ".").replace("_", "-"): v for key, v in more.items()}
    settings = {**SETTINGS, "model.averaged": averaged, **keys}
    return fedweight.run(settings=settings, report=False, progress=False)


def products(result: fedweight.Run) -> list[Tensor]:
    found = load_file(result.folder / "model.safetensors")
    names = [n.removesuffix("lora_b") for n in found if n.endswith("lora_b")]
    return [found[f"{n}lora_b"] @ found[f"{n}lora_a"] for n in names]


def test_of_one_client_the_product_is_its_own():
    one = {"strategy__fraction_train": 0.2}
    both, product = products(run("both", **one)), products(run("product", **one))
    assert len(both) == 2
    for mine, expected in zip(product, both, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)


def test_weights_per_tensor_are_those_of_the_pair_on_average():
    two = {"strategy__name": "ida", "strategy__fraction_train": 0.4}
    one = products(run("product", **two))  # Two clients count alike.
    found = products(run("product", strategy__per_tensor=True, **two))
    for mine, expected in zip(found, one, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("strategy", ["fedavg", "ida"])
def test_of_several_it_is_another_model(strategy):
    more = {"strategy__name": strategy, "run__rounds": 3}
    both, product = products(run("both", **more)), products(run("product", **more))
    for mine, other in zip(product, both, strict=True):
        far = (mine - other).norm() / other.norm()
        assert 1e-4 < far < 2
        assert torch.linalg.matrix_rank(mine) <= 3


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
def test_bits_are_the_same_on_ray():
    more = {"engine__plan": "batched-2", "run__rounds": 2}
    here = run("product", **more)
    for workers in (1, 2):
        there = run("product", engine__name="ray", engine__workers=workers, **more)
        for name in ("model.safetensors", "rounds.csv", "clients.csv"):
            mine, theirs = here.folder / name, there.folder / name
            assert mine.read_bytes() == theirs.read_bytes(), name


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(ConfigurationError, match="has a server optimiser"):
        run("product", server__name="momentum")
    with pytest.raises(ConfigurationError, match=r"an aggregate\(round\) of its own"):
        run("product", strategy__name="fedlaw")
    with pytest.raises(ConfigurationError, match="have other factors"):
        run("product", schedule__name="buffered", schedule__buffer_size=2)


def test_clients_at_once_end_where_each_alone_does():
    more = {"run__rounds": 3, "model__rank": 16, "strategy__fraction_train": 0.4}
    loop = run("product", engine__plan="loop", **more)
    batched = run("product", engine__plan="batched-2", **more)
    mine = load_file(loop.folder / "model.safetensors")
    other = load_file(batched.folder / "model.safetensors")
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-3)
