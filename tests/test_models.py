"""The models: shapes, initialisation under a seed, batching over clients, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedweight import models
from fedweight.core.errors import ConfigurationError
from fedweight.models.heads import simplex_etf

CASES = [
    ("softmax", (1, 8, 8), 10, {}),
    ("softmax", (108,), 2, {}),
    ("mlp", (9,), 4, {"hidden": 6, "head": "etf"}),
    ("cnn", (1, 8, 8), 10, {"head": "etf", "projection": 12, "scale": 10.0}),
    ("mlp", (108,), 2, {"hidden": 32}),
    ("mlp", (1, 8, 8), 10, {"hidden": (32, 16)}),
    ("cnn", (1, 8, 8), 10, {}),
    ("cnn", (1, 28, 28), 10, {}),
    ("cnn", (3, 32, 32), 10, {"channels": [4, 8], "hidden": 16}),
    ("resnet18-gn", (1, 8, 8), 10, {"width": 4}),
    ("resnet18-gn", (5, 16, 16), 3, {"width": 8, "groups": 4}),
    ("char-gru", (6,), 20, {"hidden": 8}),
    ("char-gru", (6,), 20, {"vocabulary": 30, "embedding": 4, "hidden": 8}),
    ("char-transformer", (6,), 20, {"width": 8, "heads": 2, "depth": 1}),
    ("char-transformer", (6,), 20, {"vocabulary": 30, "width": 6, "heads": 3}),
]


def inputs(name, shape, seed=0):
    stream = torch.Generator().manual_seed(seed)
    if name.startswith("char-"):
        return torch.randint(0, 20, (4, *shape), generator=stream)
    return torch.randn(4, *shape, generator=stream)


@pytest.mark.parametrize(("name", "shape", "num_classes", "options"), CASES)
def test_gives_a_logit_for_each_class(name, shape, num_classes, options):
    model = models.build(name, shape, num_classes, seed=0, **options)
    assert model(inputs(name, shape)).shape == (4, num_classes)


@pytest.mark.parametrize(("name", "shape", "num_classes", "options"), CASES)
def test_gradients_batched_over_clients_are_those_of_each(
    name, shape, num_classes, options
):
    # In double precision, so that the order of sums does not matter.
    clients = [
        models.build(name, shape, num_classes, seed=k, **options).double()
        for k in range(3)
    ]
    skeleton = copy.deepcopy(clients[0])
    x = torch.stack([inputs(name, shape, seed=k) for k in range(3)])
    x = x.double() if x.is_floating_point() else x
    y = (torch.arange(12) % num_classes).reshape(3, 4)
    parameters, _ = stack_module_state(clients)

    def loss(parameters, x, y):
        logits = functional_call(skeleton, parameters, (x,))
        return nn.functional.cross_entropy(logits, y)

    batched = vmap(grad(loss))(parameters, x, y)
    for k, client in enumerate(clients):
        nn.functional.cross_entropy(client(x[k]), y[k]).backward()
        for key, parameter in client.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(batched[key][k], parameter.grad)


def test_the_vertices_of_a_simplex_are_where_the_method_says():
    # P = I and three classes: methods' golden case, up to a rotation.
    with torch.random.fork_rng():
        torch.manual_seed(5)
        vertices = simplex_etf(3, 3)
    expected = torch.full((3, 3), -0.40824829).fill_diagonal_(0.81649658)
    # Of P (I - 11'/C) the projection onto P's own columns is what P = I gives.
    u, _, v = torch.linalg.svd(vertices.double() @ expected.double().T)
    torch.testing.assert_close(u @ v @ expected.double(), vertices.double())
    products = torch.full((3, 3), -0.5).fill_diagonal_(1.0)
    torch.testing.assert_close(vertices.T @ vertices, products)


@given(classes=st.integers(2, 12), more=st.integers(0, 5), seed=st.integers(0, 99))
def test_any_two_classes_of_a_simplex_are_equally_far_apart(classes, more, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vertices = simplex_etf(classes, classes + more).double()
    expected = torch.full((classes, classes), -1 / (classes - 1)).fill_diagonal_(1.0)
    torch.testing.assert_close(
        vertices.T @ vertices, expected.double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(vertices.sum(1), torch.zeros(classes + more).double())


def test_a_fixed_classifier_gives_scaled_cosines_and_is_not_trained():
    model = models.build("mlp", (5,), 3, head="etf", projection=4, hidden=6, seed=0)
    head = model.layers[-1]
    x = torch.randn(7, 5)
    features = model.layers[:-1](x)
    projected = features @ head.projection.weight.T + head.projection.bias
    cosines = projected / projected.norm(dim=1, keepdim=True) @ head.etf
    assert head.scale.item() == 1.0
    torch.testing.assert_close(model(x), cosines)
    assert not head.etf.requires_grad
    again = models.build("mlp", (5,), 3, head="etf", projection=4, hidden=6, seed=0)
    assert torch.equal(again.layers[-1].etf, head.etf)
    model(x).sum().backward()
    assert head.scale.grad is not None


def test_a_fixed_classifier_that_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match=r"projection must be .* 10, or more"):
        models.build("mlp", (5,), 10, head="etf", projection=9)
    with pytest.raises(ConfigurationError, match="a head that is 'linear' has none"):
        models.build("cnn", (1, 8, 8), 10, projection=12)
    with pytest.raises(ConfigurationError, match="num_classes of head 'etf'"):
        models.build("mlp", (5,), 1, head="etf")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_seed_decides_the_weights_and_leaves_the_global_stream_alone(name):
    state = torch.get_rng_state()
    a = models.build(name, (1, 8, 8), 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    b = models.build(name, (1, 8, 8), 10, seed=3)
    c = models.build(name, (1, 8, 8), 10, seed=4)
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in (a, b, c)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_without_a_seed_the_callers_stream_decides():
    vectors = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = models.build("mlp", (4,), 3)
        vectors.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*vectors)


def test_char_gru_computes_what_the_gru_of_torch_computes():
    model = models.build("char-gru", (6,), 20, seed=0, hidden=8, embedding=5)
    reference = nn.GRU(5, 8, batch_first=True)
    reference.load_state_dict(
        {
            "weight_ih_l0": model.from_input.weight,
            "bias_ih_l0": model.from_input.bias,
            "weight_hh_l0": model.from_state.weight,
            "bias_hh_l0": model.from_state.bias,
        }
    )
    x = inputs("char-gru", (6,))
    states, _ = reference(model.embedding(x))
    torch.testing.assert_close(model(x), model.classifier(states[:, -1]))


def test_char_transformer_computes_what_the_encoder_of_torch_computes():
    model = models.build("char-transformer", (6,), 20, seed=0, width=8, heads=2)
    reference = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True
    )
    x = inputs("char-transformer", (6,))
    states = model.embedding(x) + model.places
    for block in model.blocks:
        parts = (block.query, block.key, block.value)
        layers = {
            "self_attn.out_proj": block.output,
            "linear1": block.widen,
            "linear2": block.narrow,
            "norm1": block.norm_attention,
            "norm2": block.norm_layers,
        }
        state = {
            f"{theirs}.{name}": tensor
            for theirs, ours in layers.items()
            for name, tensor in ours.state_dict().items()
        }
        state["self_attn.in_proj_weight"] = torch.cat([p.weight for p in parts])
        state["self_attn.in_proj_bias"] = torch.cat([p.bias for p in parts])
        reference.load_state_dict(state)
        states = reference(states)
    expected = model.classifier(model.norm(states[:, -1]))
    torch.testing.assert_close(model(x), expected)


def test_an_mlp_without_hidden_layers_is_softmax_regression():
    model = models.build("mlp", (4,), 3, hidden=[])
    assert sum(p.numel() for p in model.parameters()) == 4 * 3 + 3


def test_no_model_has_buffers():
    for name, shape, num_classes, options in CASES:
        assert not list(models.build(name, shape, num_classes, **options).buffers())


def test_catalogue_describes_every_model():
    lines = models.catalogue()
    assert set(lines) == {
        "char-gru",
        "char-transformer",
        "cnn",
        "mlp",
        "resnet18-gn",
        "softmax",
        "unet",
    }
    assert all(len(line) > 20 for line in lines.values())


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    code = (
        "from torch import nn\n"
        "def make(input_shape, num_classes, *, bias=True):\n"
        "    return nn.Linear(input_shape[0], num_classes, bias)\n"
        "def wrong(input_shape, num_classes):\n"
        "    return 3\n"
    )
    (tmp_path / "own_model_for_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = models.build("own_model_for_test:make", (4,), 3, bias=False)
    assert model.weight.shape == (3, 4)
    assert model.bias is None
    with pytest.raises(ConfigurationError, match=r"gave int.*torch\.nn\.Module"):
        models.build("own_model_for_test:wrong", (4,), 3)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("mlpp", (4,), {}, "Did you mean 'mlp'"),
        ("mlp", (4,), {"hiden": 3}, "no option 'hiden'. Did you mean 'hidden'"),
        ("mlp", (4,), {"hidden": 0}, "hidden must be whole numbers from 1"),
        ("mlp", (4,), {"hidden": ["a"]}, "hidden must be a whole number or a list"),
        ("cnn", (4,), {}, r"images of shape \(c, h, w\).*4 or more"),
        ("cnn", (1, 3, 8), {}, "4 or more"),
        ("cnn", (1, 8, 8), {"channels": [8]}, "channels must be two"),
        ("cnn", (1, 8, 8), {"hidden": 1.5}, "hidden must be a whole number"),
        ("resnet18-gn", (1, 4, 4), {}, "8 or more"),
        ("resnet18-gn", (1, 8, 8), {"width": 6, "groups": 4}, "groups must divide"),
        ("char-gru", (1, 8, 8), {}, r"texts of shape \(T,\)"),
        ("char-transformer", (1, 8, 8), {}, r"texts of shape \(T,\)"),
        ("char-transformer", (6,), {"width": 9}, "heads must divide width"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_allowed(name, shape, options, message):
    with pytest.raises(ConfigurationError, match=message):
        models.build(name, shape, 10, **options)


def test_a_model_without_outputs_is_refused():
    with pytest.raises(ConfigurationError, match="num_classes must be in"):
        models.build("mlp", (4,), 0)
    assert models.build("mlp", (4,), 1)(torch.zeros(3, 4)).shape == (3, 1)


def test_a_numpy_shape_is_taken():
    assert models.build("mlp", np.zeros((2, 3)).shape, 2)(torch.zeros(1, 2, 3)).numel()


@pytest.mark.parametrize(("name", "shape", "num_classes", "options"), CASES)
def test_a_forward_pass_draws_nothing_and_changes_nothing(
    name, shape, num_classes, options
):
    model = models.build(name, shape, num_classes, seed=0, **options).train()
    x = inputs(name, shape)
    tensors = [x, *model.parameters()]
    versions = [tensor._version for tensor in tensors]
    state = torch.get_rng_state()
    first = model(x)
    assert torch.equal(first, model(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert [tensor._version for tensor in tensors] == versions


@pytest.mark.parametrize(("name", "least"), [("cnn", 4), ("resnet18-gn", 8)])
def test_the_smallest_images(name, least):
    options = {"width": 4} if name == "resnet18-gn" else {}
    for channels in (1, 7):
        shape = (channels, least, least)
        assert models.build(name, shape, 3, **options)(torch.zeros(2, *shape)).shape
        for smaller in ((channels, least - 1, least), (channels, least, least - 1)):
            with pytest.raises(ConfigurationError, match=f"{least} or more"):
                models.build(name, smaller, 3, **options)


def test_stages_of_a_resnet_are_twice_as_wide_each():
    model = models.build("resnet18-gn", (3, 8, 8), 10, width=6, groups=3)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    widths = sorted({m.out_channels for m in convolutions})
    assert widths == [6, 12, 24, 48]
    groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {3}


def test_a_vocabulary_is_as_many_tokens_as_classes_by_default():
    assert models.build("char-gru", (6,), 20).embedding.num_embeddings == 20
    more = models.build("char-gru", (6,), 20, vocabulary=30)
    assert more.embedding.num_embeddings == 30
