"""Modules of every sort that a user may bring, and what becomes of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEATURES, TOKENS, CLASSES, WIDTH = 6, 10, 4, 8


@dataclass(frozen=True)
class Sort:
    """A module, and what is expected of it.

    Attributes
    ----------
    make : Callable
        Builds it.
    takes : {"table", "image", "tokens"}
        ``[n, 6]``, ``[n, 1, 6, 6]``, or numbers of tokens ``[n, 5]``.
    at_once : str, optional
        How many clients train: "" for at once, else what the warning says that makes
        them train one after another. ``None`` where that is for PyTorch's version to
        say.
    draws : bool
        Whether it draws from a stream of the process.
    least : int
        How many examples it needs in a batch.
    double : bool
        Whether its weights are in double precision.
    """

    make: Callable[[], nn.Module]
    takes: str = "table"
    at_once: str | None = ""
    draws: bool = False
    least: int = 1
    double: bool = False


def _head(*layers: nn.Module, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


Layers = Callable[[], "nn.Module | list[nn.Module]"]


def _table(layers: Layers) -> Callable[[], nn.Module]:
    """Return what makes a net with other layers each time."""
    return lambda: _head(nn.Linear(FEATURES, WIDTH), *_listed(layers()))


def _image(layers: Layers) -> Callable[[], nn.Module]:
    return lambda: _head(nn.Conv2d(1, 2, 3), *_listed(layers()), nn.Flatten(), width=32)


def _listed(layers: nn.Module | list[nn.Module]) -> list[nn.Module]:
    return layers if isinstance(layers, list) else [layers]


class Net(nn.Module):
    """A layer, something in between that a test says, and another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.prepare()

    def prepare(self) -> None:
        """Make what is needed in between."""

    def between(self, z: Tensor) -> Tensor:
        """Do it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.between(torch.tanh(self.first(x))))
        return z


def net(between: Callable[[Net, Tensor], Tensor], **made: Any) -> Callable[[], Net]:
    """Return what makes a net; ``made`` are tensors to be buffers, or attributes."""

    class Made(Net):
        def prepare(self) -> None:
            for name, value in made.items():
                own = value() if callable(value) else value
                if isinstance(own, Tensor):
                    self.register_buffer(name, own.clone())
                else:
                    setattr(self, name, own)

        def between(self, z: Tensor) -> Tensor:
            return between(self, z)

    return Made


class Recurrent(nn.Module):
    """Tokens through one of PyTorch's recurrent layers."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 5, padding_idx=0)
        self.recurrent = kind(5, WIDTH, batch_first=True, **options)  # type: ignore[arg-type]
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(self.recurrent(self.embedding(x))[0][:, -1])
        return z


class Attention(nn.Module):
    """Tokens through attention, in one of the forms that PyTorch has."""

    def __init__(self, form: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.form, self.dropout = form, dropout
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layer: nn.Module = nn.Identity()
        if form == "module":
            self.layer = nn.MultiheadAttention(
                WIDTH, 2, dropout=dropout, batch_first=True
            )
        if form == "encoder":
            self.layer = nn.TransformerEncoderLayer(
                WIDTH, 2, 12, dropout=dropout, batch_first=True
            )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(x)
        if self.form == "module":
            z = self.layer(z, z, z, need_weights=False)[0]
        elif self.form == "encoder":
            z = self.layer(z)
        else:
            heads = z.unflatten(2, (2, WIDTH // 2)).transpose(1, 2)
            z = F.scaled_dot_product_attention(
                heads,
                heads,
                heads,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.form == "causal",
            )
            z = z.transpose(1, 2).flatten(2)
        out: Tensor = self.last(z.mean(1))
        return out


class TimeFirst(nn.Module):
    """Drops values of ``[T, n, d]``: noise by place is another for another n."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(self.embedding(x.t()), 0.3, self.training)
        out: Tensor = self.last(z.mean(0))
        return out


class Unused(Net):
    """Has layers that it never uses, or only now and then."""

    def __init__(self, sometimes: bool = False) -> None:
        self.sometimes = sometimes
        super().__init__()

    def prepare(self) -> None:
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.more = nn.Linear(WIDTH, WIDTH)

    def between(self, z: Tensor) -> Tensor:
        if self.sometimes and len(z) > 5:
            z = z + self.extra(z)
        return z


def tied() -> nn.Module:
    module = nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )
    module[2].weight = module[1].weight
    return module


def frozen() -> nn.Module:
    module = _table(lambda: nn.ReLU())()
    module[0].requires_grad_(False)
    return module


def twice() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return net(
        lambda self, z: self.layer(torch.tanh(self.layer(z))), layer=lambda: layer
    )()


def _centred(self: Net, z: Tensor) -> Tensor:
    return z - z.mean(0)


def _deviations(self: Net, z: Tensor) -> Tensor:
    return (z - z.mean(0)) / z.std(0)


def _mixed(self: Net, z: Tensor) -> Tensor:
    return z + torch.softmax(z @ z.t(), 1) @ z


def _assigned(self: Any, z: Tensor) -> Tensor:
    if self.training:
        self.centre = 0.5 * self.centre + 0.5 * z.detach().square().mean()
    return z * self.centre


def _of_weights(self: Any, z: Tensor) -> Tensor:
    if self.training:
        self.centre = 0.5 * self.centre + self.last.weight.detach().square().mean()
    return z * self.centre


def _frozen_and_assigned() -> nn.Module:
    module = net(_of_weights, centre=torch.ones(()))()
    module.first.requires_grad_(False)
    return module


def _counted(self: Any, z: Tensor) -> Tensor:
    if self.training:
        self.steps = self.steps + 1
    return z / self.steps


def _in_place(self: Any, z: Tensor) -> Tensor:
    if self.training:
        self.steps += 1
    return z / self.steps


def _grows(self: Any, z: Tensor) -> Tensor:
    self.calls += 1
    return z * self.calls


def _first_batch(self: Any, z: Tensor) -> Tensor:
    if not hasattr(self, "scale"):
        self.scale = z.detach().abs().max()
    return z / self.scale


def _lists(self: Any, z: Tensor) -> Tensor:
    self.met.append(len(z))
    return z * len(self.met)


def _other_memory(self: Net, z: Tensor) -> Tensor:
    self.last.weight.data = F.normalize(self.last.weight.data)
    return z


def _teacher() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def _followed(self: Any, z: Tensor) -> Tensor:
    with torch.no_grad():
        self.teacher.weight.mul_(0.9).add_(z.mean(), alpha=0.1)
    return z + 0.1 * self.teacher(z)


def _noise(self: Net, z: Tensor) -> Tensor:
    return z + 0.1 * torch.randn_like(z)


def _later(self: Any, z: Tensor) -> Tensor:
    self.steps += 1
    if int(self.steps) > self.after:
        z = z + 0.1 * torch.rand(z.shape, dtype=z.dtype)
    return z


def _later_dropout(self: Any, z: Tensor) -> Tensor:
    self.steps += 1
    return F.dropout(z, 0.3, self.training and int(self.steps) > 1)


def _numpy(self: Net, z: Tensor) -> Tensor:
    return z * float(np.random.uniform(0.5, 1.5))  # noqa: NPY002


def _python(self: Net, z: Tensor) -> Tensor:
    return z * random.uniform(0.5, 1.5)


def _own_generator(self: Any, z: Tensor) -> Tensor:
    return z + 0.1 * torch.randn(z.shape, generator=self.generator, dtype=z.dtype)


def _own_numpy(self: Any, z: Tensor) -> Tensor:
    return z * float(self.generator.uniform(0.5, 1.5))


def _by_value(self: Net, z: Tensor) -> Tensor:
    return z if z.sum() > 0 else -z


def _chosen(self: Net, z: Tensor) -> Tensor:
    kept = z[z[:, 0] > -2]  # of every example, but PyTorch cannot know
    return kept[: len(z)]


def _half(self: Net, z: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (z @ z.new_ones(WIDTH, WIDTH)).to(z.dtype)


def _long_batches(self: Net, z: Tensor) -> Tensor:
    return 2 * z if len(z) > 2 else z


def _recomputed(self: Net, z: Tensor) -> Tensor:
    result: Tensor = checkpoint(lambda z: z.square().sin(), z, use_reentrant=False)
    return result


def _reentrant(self: Net, z: Tensor) -> Tensor:
    result: Tensor = checkpoint(lambda z: z.square().sin(), z, use_reentrant=True)
    return result


def _hooked(self: Net, z: Tensor) -> Tensor:
    z = z * 1
    z.register_hook(lambda gradient: 2 * gradient)
    return z


def normed(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(FEATURES, WIDTH)
        if kind == "spectral":
            layer = nn.utils.parametrizations.spectral_norm(layer)
        else:
            layer = nn.utils.parametrizations.weight_norm(layer)
        return _head(layer, nn.Tanh())

    return make


LOOKS = "looks across the batch"
DRAWS = "draws random numbers"
NOT_BATCHED = "cannot be batched"

SORTS = {
    "linear": Sort(lambda: nn.Linear(FEATURES, CLASSES)),
    "tanh": Sort(_table(lambda: nn.Tanh())),
    "activations": Sort(
        _table(lambda: [nn.PReLU(), nn.GELU(), nn.Softplus(), nn.ELU()])
    ),
    "in place": Sort(_table(lambda: nn.ReLU(inplace=True))),
    "gated": Sort(lambda: _head(nn.Linear(FEATURES, 2 * WIDTH), nn.GLU())),
    "convolution": Sort(_image(lambda: nn.ReLU()), "image"),
    "pooled": Sort(
        lambda: _head(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten()), "image"
    ),
    "layer twice": Sort(twice),
    # Normalisation.
    "batch norm": Sort(_table(lambda: nn.BatchNorm1d(WIDTH)), least=2),
    "batch norm of images": Sort(_image(lambda: nn.BatchNorm2d(2)), "image"),
    "batch norm without weights": Sort(
        _table(lambda: nn.BatchNorm1d(WIDTH, affine=False, track_running_stats=False)),
        least=2,
    ),
    "cumulative batch norm": Sort(
        _table(lambda: nn.BatchNorm1d(WIDTH, momentum=None)),
        at_once=NOT_BATCHED,
        least=2,
    ),
    "instance norm": Sort(_image(lambda: nn.InstanceNorm2d(2, affine=True)), "image"),
    "instance norm with statistics": Sort(
        _image(lambda: nn.InstanceNorm2d(2, track_running_stats=True)),
        "image",
        at_once=LOOKS,
    ),
    "group norm": Sort(_image(lambda: nn.GroupNorm(1, 2)), "image"),
    "layer norm": Sort(_table(lambda: nn.LayerNorm(WIDTH))),
    "local response norm": Sort(_image(lambda: nn.LocalResponseNorm(2)), "image"),
    "weight norm": Sort(normed("weight")),
    "spectral norm": Sort(normed("spectral"), at_once=NOT_BATCHED),
    # Across the batch.
    "centred": Sort(net(_centred), at_once=LOOKS),
    "deviations": Sort(net(_deviations), at_once=LOOKS, least=2),
    "attention to other examples": Sort(net(_mixed), at_once=LOOKS),
    "by the length of the batch": Sort(net(_long_batches), at_once=LOOKS),
    # Sequences.
    "gru": Sort(lambda: Recurrent(nn.GRU), "tokens"),
    "lstm": Sort(lambda: Recurrent(nn.LSTM, num_layers=2), "tokens"),
    "rnn": Sort(lambda: Recurrent(nn.RNN), "tokens"),
    "gru with dropout": Sort(
        lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.3),
        "tokens",
        at_once=DRAWS,
        draws=True,
    ),
    "attention": Sort(lambda: Attention("function"), "tokens"),
    "causal attention": Sort(lambda: Attention("causal"), "tokens"),
    "attention with dropout": Sort(
        lambda: Attention("function", 0.3), "tokens", at_once=DRAWS, draws=True
    ),
    "multi-head attention": Sort(lambda: Attention("module"), "tokens"),
    "multi-head attention with dropout": Sort(
        lambda: Attention("module", 0.3), "tokens", at_once=DRAWS, draws=True
    ),
    "transformer": Sort(lambda: Attention("encoder"), "tokens"),
    "embedding bag": Sort(lambda: _head(nn.EmbeddingBag(TOKENS, WIDTH)), "tokens"),
    "embedding of limited norm": Sort(
        lambda: _head(
            nn.Embedding(TOKENS, WIDTH, max_norm=1.0), nn.Flatten(), width=5 * WIDTH
        ),
        "tokens",
        at_once="changes its parameters itself",
    ),
    "sparse embedding": Sort(
        lambda: _head(
            nn.Embedding(TOKENS, WIDTH, sparse=True), nn.Flatten(), width=5 * WIDTH
        ),
        "tokens",
        at_once=NOT_BATCHED,
    ),
    # Parameters.
    "frozen layer": Sort(frozen),
    "tied weights": Sort(tied),
    "unused layer": Sort(Unused),
    "layer used now and then": Sort(lambda: Unused(sometimes=True), at_once=LOOKS),
    "double": Sort(lambda: _table(lambda: nn.Tanh())().double(), double=True),
    # Buffers.
    "assigned buffer": Sort(net(_assigned, centre=torch.ones(())), at_once=LOOKS),
    "assigned buffer of weights": Sort(net(_of_weights, centre=torch.ones(()))),
    "assigned buffer beside a frozen layer": Sort(_frozen_and_assigned),
    "assigned integer": Sort(net(_counted, steps=torch.zeros((), dtype=torch.int64))),
    "integer in place": Sort(net(_in_place, steps=torch.zeros((), dtype=torch.int64))),
    # Attributes.
    "counter": Sort(net(_grows, calls=0), at_once="another"),
    "set up by the first batch": Sort(net(_first_batch), at_once="another"),
    # Noise.
    "dropout": Sort(_table(lambda: nn.Dropout(0.3))),
    "dropout of channels": Sort(_image(lambda: nn.Dropout2d(0.3)), "image"),
    "dropout, time first": Sort(TimeFirst, "tokens", at_once=LOOKS),
    "alpha dropout": Sort(
        _table(lambda: nn.AlphaDropout(0.3)), at_once=DRAWS, draws=True
    ),
    "alpha dropout of features": Sort(
        _image(lambda: nn.FeatureAlphaDropout(0.3)), "image", at_once=DRAWS, draws=True
    ),
    "random slopes": Sort(_table(lambda: nn.RReLU()), at_once=DRAWS, draws=True),
    "noise": Sort(net(_noise), at_once=DRAWS, draws=True),
    "gumbel": Sort(net(lambda self, z: F.gumbel_softmax(z)), at_once=DRAWS, draws=True),
    "noise from the second step on": Sort(
        net(_later, steps=torch.zeros((), dtype=torch.int64), after=1),
        at_once=DRAWS,
        draws=True,
    ),
    "noise from the fifth step on": Sort(
        net(_later, steps=torch.zeros((), dtype=torch.int64), after=4),
        at_once=NOT_BATCHED,
    ),
    "dropout from the second step on": Sort(
        net(_later_dropout, steps=torch.zeros((), dtype=torch.int64)),
        at_once=NOT_BATCHED,
    ),
    "numpy": Sort(net(_numpy), at_once=DRAWS, draws=True),
    "python": Sort(net(_python), at_once=DRAWS, draws=True),
    # What PyTorch cannot batch.
    "by value": Sort(net(_by_value), at_once=NOT_BATCHED),
    "chosen by value": Sort(net(_chosen), at_once=NOT_BATCHED),
    "computed again": Sort(net(_recomputed), at_once=None),
    "computed again, reentrant": Sort(net(_reentrant), at_once=NOT_BATCHED),
    "hooked": Sort(net(_hooked)),
    "half precision inside": Sort(net(_half), at_once="half precision"),
}


class Nested(Net):
    """Returns its logits and something besides."""

    def between(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def _wider(self: Any, z: Tensor) -> Tensor:
    self.steps = self.steps + z.detach().mean()
    return z


# What is refused, and what the reason says.
KEEPS = "must be a parameter or a buffer"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "half": (lambda: nn.Linear(6, 4).half(), "'weight' is float16"),
    "complex": (
        lambda: nn.Linear(6, 4, dtype=torch.complex64),
        "'weight' is complex64",
    ),
    "nested outputs": (Nested, "the model returned tuple, not one tensor of logits"),
    "own generator": (
        net(_own_generator, generator=torch.Generator),
        "not from a generator of the model's (aten.randn.generator)",
    ),
    "own generator of numpy": (
        net(_own_numpy, generator=lambda: np.random.default_rng(0)),
        "not from a generator of the model's",
    ),
    "list that grows": (net(_lists, met=list), KEEPS),
    "parameter in other memory": (
        net(_other_memory),
        "gave 'last.weight' other memory",
    ),
    "frozen layer that follows": (
        net(_followed, teacher=_teacher),
        "changes 'teacher.weight', which asks for no gradient",
    ),
    "buffer of another dtype": (
        net(_wider, steps=torch.zeros((), dtype=torch.int64)),
        "assigned torch.float32 of shape [] to the buffer 'steps', which is "
        "torch.int64",
    ),
}
