"""Adapters: what is trained, what they compute, and the files of peft."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from safetensors.torch import load_file, save_file
from torch import nn

from fedweight import models
from fedweight.clients import TrainingApp, TrainingSettings
from fedweight.core.errors import ConfigurationError, DataError
from fedweight.core.module import FlatModule
from fedweight.data import ClientData, Examples
from fedweight.messages._flower import task_identity
from fedweight.messages.arrays import FlatRecord, complete
from fedweight.models.adapters import LoRALinear, load_peft, lora, save_peft
from fedweight.simulations import Plan
from fedweight.simulations.local import LocalGrid
from fedweight.strategies import STRATEGIES, strategy_class


@pytest.fixture(autouse=True)
def _identity():
    with task_identity(run_id=0):
        yield


def two(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        return lora(model, **options)


def layer_of(a, b, rank, alpha):
    layer = LoRALinear(nn.Linear(len(a[0]), len(b), bias=False), rank, alpha)
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor(a))
        layer.lora_b.copy_(torch.tensor(b))
    return layer


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


# methods.md C16.


def test_golden_change():
    layer = layer_of([[1.0, 2.0]], [[3.0], [4.0]], rank=1, alpha=2.0)
    assert layer.change().tolist() == [[6, 12], [8, 16]]
    x = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    expected = x @ (layer.weight + layer.change()).T
    torch.testing.assert_close(layer(x), expected)


def test_golden_means():
    """The product of the means is not the mean of the products."""
    one = layer_of([[1.0, 0.0]], [[1.0], [0.0]], rank=1, alpha=1.0)
    other = layer_of([[0.0, 1.0]], [[0.0], [1.0]], rank=1, alpha=1.0)
    mean = layer_of([[0.5, 0.5]], [[0.5], [0.5]], rank=1, alpha=1.0)
    assert mean.change().tolist() == [[0.25, 0.25], [0.25, 0.25]]
    of_products = (one.change() + other.change()) / 2
    assert of_products.tolist() == [[0.5, 0], [0, 0.5]]


def test_with_a_fixed_a_the_mean_is_exact():
    stream = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, generator=stream).tolist()
    several = [torch.randn(3, 2, generator=stream) for _ in range(4)]
    changes = [layer_of(a, b.tolist(), 2, 3.0).change() for b in several]
    mean = layer_of(a, torch.stack(several).mean(0).tolist(), 2, 3.0)
    torch.testing.assert_close(mean.change(), torch.stack(changes).mean(0))


# What is trained.


def test_a_model_gives_at_first_what_it_gave_without():
    name, shape, classes = "char-transformer", (6,), 20
    plain = models.build(name, shape, classes, seed=3, width=8, heads=2)
    adapted = models.build(
        name, shape, classes, seed=3, width=8, heads=2, adapters="lora", rank=2
    )
    x = torch.arange(12).reshape(2, 6)
    assert torch.equal(plain(x), adapted(x))
    state = adapted.state_dict()
    for key, tensor in plain.state_dict().items():
        assert torch.equal(state[key], tensor), key
    kept = {n for n, p in adapted.named_parameters() if not p.requires_grad}
    assert kept == set(plain.state_dict())
    assert all(key.endswith((".lora_a", ".lora_b")) for key in trained(adapted))
    again = models.build(
        name, shape, classes, seed=3, width=8, heads=2, adapters="lora", rank=2
    )
    assert torch.equal(state["classifier.lora_a"], again.classifier.lora_a)
    assert state["classifier.lora_a"].std() > 0
    assert not state["classifier.lora_b"].any()


def test_how_many_numbers_are_trained():
    layout = FlatModule(two(rank=2)).layout
    assert layout.num_parameters == 2 * (4 + 6) + 2 * (6 + 3)
    assert layout.travelling.num_bytes == 4 * layout.num_parameters
    layout = FlatModule(two(rank=2, averaged="b")).layout
    assert layout.num_parameters == 2 * 6 + 2 * 3


def test_layers_and_heads_are_chosen_by_the_ends_of_their_names():
    model = two(layers=["0"], trained=["2"])
    assert trained(model) == ["0.lora_a", "0.lora_b", "2.weight", "2.bias"]
    assert trained(two(layers=["2"])) == ["2.lora_a", "2.lora_b"]
    assert "2.lora_a" not in trained(two(trained=["2"]))
    nested = nn.ModuleDict({"a": two(), "b": nn.Linear(2, 2)})
    lora(nested, layers=["b"])
    assert trained(nested) == ["b.lora_a", "b.lora_b"]


def test_a_layer_in_two_places_gets_one_adapter():
    shared = nn.Linear(3, 3)
    model = lora(nn.Sequential(shared, nn.ReLU(), shared), rank=1)
    assert model[0] is model[2]
    assert trained(model) == ["0.lora_a", "0.lora_b"]
    assert isinstance(lora(nn.Linear(2, 2)), LoRALinear)


def test_a_layer_that_nobody_calls_is_left_alone():
    """Attention takes the weights of its layers, and does not call them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    assert trained(lora(model)) == ["0.lora_a", "0.lora_b"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, ["rank", "0"]),
        ({"alpha": 0.0}, ["alpha", "(0, inf)"]),
        ({"layers": ["3"]}, ["model.layers", "'3'", "0 and 2"]),
        ({"trained": ["head"]}, ["model.trained", "'head'"]),
        ({"layers": ["2"], "trained": ["2"]}, ["model.trained", "'2'"]),
        ({"averaged": "a"}, ["averaged", "both"]),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(ConfigurationError) as caught:
        two(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigurationError, match="linear layers"):
        lora(nn.Conv2d(1, 1, 3))
    with pytest.raises(ConfigurationError, match="Did you mean 'lora'"):
        models.build("mlp", (4,), 2, adapters="lola")
    with pytest.raises(ConfigurationError, match="rank"):
        models.build("mlp", (4,), 2, rank=3)


# Aggregation.


def client_data(context):
    client = int(context.node_config["partition-id"])
    stream = np.random.default_rng(client)
    x = stream.normal(size=(6 + client, 4)).astype(np.float32)
    part = Examples(x, stream.integers(0, 3, len(x)))
    return ClientData(part, part)


# How many numbers clients are asked for in a round besides the model, where any are.
ASKED = {
    "afl": [1],
    "agnostic-fair": [121],
    "fedce": [1],
    "feddisco": [0, 3],  # The counts of its classes, once.
    "fednova": [1],
    "global-group-dro": [1],
    "qfedavg": [1],
}


def federate(name, plan, make=two, rounds=2):
    cls = strategy_class(name)
    proxy = client_data(type("C", (), {"node_config": {"partition-id": 9}})).train
    given = {"model": make(rank=2), "proxy": proxy}
    strategy = cls(**{key: given[key] for key in cls.needs}, fraction_evaluate=0.0)
    settings = TrainingSettings(batch_size=4, learning_rate=0.2)
    app = TrainingApp(
        lambda: make(rank=2), client_data, num_classes=3, settings=settings
    )
    whole = FlatModule(make(rank=2)).save()
    told = ConfigRecord({"base": whole.base.digest})
    result = strategy.start(
        LocalGrid(app, 4, plan=plan),
        FlatRecord(whole.travelling()),
        num_rounds=rounds,
        train_config=told,
    )
    assert {r.status for r in strategy.history} == {"ok"}
    size = 4 * whole.layout.num_parameters
    if name == "autoflip":
        size //= 2  # It prunes as much.
    after = [record for record in strategy.history if record.number]
    sent = {c.bytes_up - size for record in after for c in record.clients}
    assert sent == {8 * numbers for numbers in ASKED.get(name, [0])}
    return whole, complete(result.arrays, whole.base).state_dict()


@pytest.mark.parametrize("name", sorted(STRATEGIES.entries))
def test_every_strategy_averages_adapters(name):
    whole, found = federate(name, Plan(1))
    before = whole.state_dict()
    for key, tensor in found.items():
        if key.endswith(("lora_a", "lora_b")):
            assert not torch.equal(tensor, before[key]), key
        else:
            assert torch.equal(tensor, before[key]), key
    _, at_once = federate(name, Plan(4))
    for key, tensor in found.items():
        torch.testing.assert_close(at_once[key], tensor, rtol=1e-4, atol=1e-5)


def test_where_b_alone_is_averaged_a_stays():
    def make(**options):
        return two(**options, averaged="b")

    whole, found = federate("fedavg", Plan(1), make)
    before = whole.state_dict()
    assert torch.equal(found["0.lora_a"], before["0.lora_a"])
    assert not torch.equal(found["0.lora_b"], before["0.lora_b"])


# The files of peft.


def with_values(**options):
    model = two(**options)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return model


def test_the_files_are_those_of_peft(tmp_path):
    model = with_values(rank=2, alpha=3.0, layers=["0"], trained=["2"])
    save_peft(model, tmp_path / "adapter", base="runs/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "runs/base"
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert config["target_modules"] == ["0"]
    assert config["modules_to_save"] == ["2"]
    assert config["bias"] == "none"
    assert not config["use_rslora"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "base_model.model.0.lora_A.weight": [2, 4],
        "base_model.model.0.lora_B.weight": [6, 2],
        "base_model.model.2.weight": [3, 6],
        "base_model.model.2.bias": [3],
    }
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], model[0].lora_a)


def test_adapters_are_read_back(tmp_path):
    model = with_values(rank=2)
    save_peft(model, tmp_path)
    other = two(rank=2)
    load_peft(other, tmp_path)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(other(x), model(x))
    with pytest.raises(DataError, match=r"0\.lora_A"):
        load_peft(two(rank=3), tmp_path)
    with pytest.raises(DataError, match="alpha 8"):
        load_peft(two(rank=2, alpha=4.0), tmp_path)
    with pytest.raises(DataError, match="no adapters"):
        load_peft(other, tmp_path / "nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match="not the same"):
        load_peft(other, tmp_path)
    with pytest.raises(ConfigurationError, match="save_peft"):
        save_peft(nn.Linear(2, 2), tmp_path)


def test_peft_itself_reads_the_files(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_values(rank=2, alpha=3.0, trained=["2"])
    save_peft(model, tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(theirs(x), model(x))


def test_transformer_layers_evaluate_with_adapters_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    adapted = lora(nn.TransformerEncoder(layer, 2))
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if name.endswith("lora_b"):
                values.normal_()
        x = torch.randn(3, 5, 8)
        trained, evaluated = adapted.train()(x), adapted.eval()(x)
    torch.testing.assert_close(evaluated, trained)


def test_layers_with_hooks_are_refused():
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ConfigurationError, match=r"model\.layers: '0' has hooks"):
        lora(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("key", "value"), [("use_rslora", True), ("alpha_pattern", {"0": 99})]
)
def test_files_of_adapters_that_add_something_else_are_refused(tmp_path, key, value):
    model = lora(nn.Sequential(nn.Linear(2, 2)), rank=1)
    save_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=f"has '{key}' as"):
        load_peft(model, tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="must hold an object"):
        load_peft(model, tmp_path)
