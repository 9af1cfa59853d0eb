"""The models that ship with the library, each built by name.

None of them changes a tensor in place or draws numbers in its forward pass, so each
can be trained for many clients at once (``torch.func``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .data.examples import channels_last
from .errors import ConfigurationError, check_range
from .memory import check_memory
from .options import check_callable, check_options, make, options_of
from .registry import Registry
from .rng import Purpose, torch_seed
from .texts import shown

__all__ = ["build", "catalogue"]

# A matrix of so many values or more is looked at before it is made.
LARGE = 10**8

# A run holds a model at least so often: the global one, a client's, and its gradient.
COPIES = 3

# More layers one after another are refused.
MOST_LAYERS = 1000

MODELS = Registry(
    "model",
    {
        "char-gru": "fedweight.models:CharGRU",
        "cnn": "fedweight.models:CNN",
        "mlp": "fedweight.models:MLP",
        "resnet18-gn": "fedweight.models:ResNet18GN",
        "softmax": "fedweight.models:Softmax",
    },
)


def build(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model with fresh weights.

    Parameters
    ----------
    name : str
        One of :func:`catalogue`, or ``"module:function"`` for one of your own: it is
        called as ``function(input_shape, num_classes, **options)``.
    input_shape : sequence of int
        The shape of one example, such as ``(1, 28, 28)``.
    num_classes : int
        C, how many logits the model gives; 2 or more.
    seed : int, optional
        The same seed gives the same weights, and the global random numbers of PyTorch
        are left as they were. Without it the weights come from the global ones.
    **options
        The model's options, such as ``hidden``.

    Examples
    --------
    >>> model = build("mlp", (1, 8, 8), 10, hidden=32, seed=0)
    >>> model(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    model, what = MODELS.resolve(name), f"model '{name}'"
    check_callable(what, model, "function(input_shape, num_classes, **options)", 2)
    check_options(what, model, options, list(options_of(model))[:2])
    check_range("num_classes", num_classes, 2)
    if name in MODELS.entries:
        _check_size(what, model, tuple(input_shape), num_classes, options)
    with contextlib.nullcontext() if seed is None else _seeded(seed):
        module = make(what, lambda: model(tuple(input_shape), num_classes, **options))
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"model '{name}' gave {type(module).__name__}. Return a torch.nn.Module."
        )
    return module


def catalogue() -> dict[str, str]:
    """Return each model's name with a line that describes it."""
    return MODELS.descriptions()


def _check_size(
    what: str,
    model: Callable[..., nn.Module],
    input_shape: tuple[int, ...],
    num_classes: int,
    options: Mapping[str, Any],
) -> None:
    """Refuse a model that this machine cannot hold, before it tries to."""
    widths = [math.prod(input_shape), num_classes]
    for value in options.values():
        several = value if isinstance(value, list | tuple) else [value]
        widths += [width for width in several if isinstance(width, int)]
    if math.prod(sorted(widths)[-2:]) < LARGE:
        return
    try:
        with torch.device("meta"):  # Shapes only: nothing is allocated.
            module = model(input_shape, num_classes, **options)
        size = sum(p.numel() * p.element_size() for p in module.parameters())
    except (RuntimeError, OverflowError, TypeError):  # Beyond what a number can say.
        size = 2**63
    check_memory(
        f"{what} with options {shown(options)}",
        COPIES * size,
        "Make it smaller.",
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch_seed(seed, Purpose.MODEL))
        yield


class Softmax(nn.Module):
    """Softmax (multinomial logistic) regression on the flattened input.

    Parameters
    ----------
    input_shape : tuple of int
        Any shape.
    num_classes : int
        C.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(input_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class MLP(nn.Module):
    """Multilayer perceptron with ReLU on the flattened input; option hidden.

    Parameters
    ----------
    input_shape : tuple of int
        Any shape.
    num_classes : int
        C.
    hidden : int or sequence of int
        The width of each hidden layer; an empty sequence is softmax regression.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: int | Sequence[int] = (128,),
    ) -> None:
        super().__init__()
        widths = [hidden] if isinstance(hidden, int) else list(hidden)
        _check_widths("hidden", widths)
        layers: list[nn.Module] = []
        size = math.prod(input_shape)
        for width in widths:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.layers(x.flatten(1))
        return logits


class CNN(nn.Module):
    """Small LeNet-like convolutional network; options channels, hidden.

    Parameters
    ----------
    input_shape : tuple of int
        ``(c, h, w)`` with h and w of 4 or more: digits, MNIST, CIFAR.
    num_classes : int
        C.
    channels : sequence of two int
        How many filters (5 by 5) each convolution has; 2 by 2 pooling follows each.
    hidden : int
        The width of the hidden layer.

    References
    ----------
    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to
    Document Recognition", Proceedings of the IEEE, 1998.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        channels: Sequence[int] = (8, 16),
        hidden: int = 64,
    ) -> None:
        super().__init__()
        inputs, height, width = _image_shape("cnn", input_shape, least=4)
        _check_widths("channels", channels)
        if len(channels) != 2:
            raise ConfigurationError(
                f"channels must be two numbers, got {shown(list(channels))}."
            )
        first, second = channels
        check_range("hidden", hidden, 1)
        self.features = nn.Sequential(
            nn.Conv2d(inputs, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(second * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class ResNet18GN(nn.Module):
    """ResNet-18 for small images, with group instead of batch normalisation.

    The first convolution is 3 by 3 without pooling, as is usual on CIFAR. Group
    normalisation keeps no running statistics, so nothing but parameters is averaged.

    Parameters
    ----------
    input_shape : tuple of int
        ``(c, h, w)``, any number of channels, h and w of 8 or more.
    num_classes : int
        C.
    groups : int
        Into how many groups channels are normalised; must divide ``width``.
    width : int
        Channels of the first stage, 64 in the paper; later stages have 2, 4, 8 times
        as many.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition",
    CVPR, 2016.

    Y. Wu, K. He, "Group Normalization", ECCV, 2018.

    K. Hsieh, A. Phanishayee, O. Mutlu, P. Gibbons, "The Non-IID Data Quagmire of
    Decentralized Machine Learning", ICML, 2020 (why not batch normalisation).
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        groups: int = 2,
        width: int = 64,
    ) -> None:
        super().__init__()
        inputs, _, _ = _image_shape("resnet18-gn", input_shape, least=8)
        check_range("groups", groups, 1)
        check_range("width", width, 1)
        if width % groups:
            raise ConfigurationError(
                f"groups must divide width, got groups = {groups} and width = {width}."
            )
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
        )
        blocks = []
        size = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                outputs = width * 2**stage
                blocks.append(_ResidualBlock(size, outputs, stride, groups))
                size = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]``."""
        features = self.blocks(self.stem(x)).mean(dim=(2, 3))
        logits: Tensor = self.classifier(features)
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.GroupNorm(groups, outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class CharGRU(nn.Module):
    """Next-token GRU for texts; options hidden, embedding, vocabulary.

    The recurrence is written out, since the fused one of PyTorch cannot be batched
    over clients (``torch.func.vmap``) on every device.

    Parameters
    ----------
    input_shape : tuple of int
        ``(T,)``: the input is int64 token numbers, ``[n, T]``.
    num_classes : int
        C.
    vocabulary : int, optional
        How many tokens there are; by default C.
    embedding : int
        The width of a token's embedding.
    hidden : int
        The width of the GRU's state.

    References
    ----------
    K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation", EMNLP, 2014.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        vocabulary: int | None = None,
        embedding: int = 16,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise ConfigurationError(
                f"model 'char-gru' takes texts of shape (T,), but the data have shape "
                f"{tuple(input_shape)}. Take another model or text data."
            )
        vocabulary = num_classes if vocabulary is None else vocabulary
        check_range("vocabulary", vocabulary, 1)
        check_range("embedding", embedding, 1)
        check_range("hidden", hidden, 1)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.from_input = nn.Linear(embedding, 3 * hidden)
        self.from_state = nn.Linear(hidden, 3 * hidden)
        self.classifier = nn.Linear(hidden, num_classes)
        # As PyTorch initialises its own GRU: by the width of the state, for all.
        bound = hidden**-0.5
        for parameter in (*self.from_input.parameters(), *self.from_state.parameters()):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]`` of the token that follows ``[n, T]`` tokens."""
        inputs = self.from_input(self.embedding(x))
        state = inputs.new_zeros(len(x), self.from_state.in_features)
        for step in inputs.unbind(1):
            from_reset, from_update, from_new = step.chunk(3, 1)
            of_reset, of_update, of_new = self.from_state(state).chunk(3, 1)
            reset = torch.sigmoid(from_reset + of_reset)
            update = torch.sigmoid(from_update + of_update)
            new = torch.tanh(from_new + reset * of_new)
            state = new + update * (state - new)
        logits: Tensor = self.classifier(state)
        return logits


def _check_widths(name: str, widths: Sequence[Any]) -> None:
    if not all(isinstance(width, int) and width >= 1 for width in widths):
        raise ConfigurationError(
            f"{name} must be whole numbers from 1, got {shown(list(widths))}."
        )
    if len(widths) > MOST_LAYERS:
        raise ConfigurationError(
            f"{name} must be at most {MOST_LAYERS} numbers, got {len(widths)}."
        )


def _image_shape(
    model: str, input_shape: tuple[int, ...], least: int
) -> tuple[int, int, int]:
    if channels_last(input_shape):
        raise ConfigurationError(
            f"model '{model}' takes images of shape (c, h, w), but the data have shape "
            f"{tuple(input_shape)}, which looks like (h, w, c). Transpose them first: "
            "x.transpose(0, 3, 1, 2)."
        )
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise ConfigurationError(
            f"model '{model}' takes images of shape (c, h, w) with h and w of {least} "
            f"or more, but the data have shape {tuple(input_shape)}. Take another "
            "model, such as 'mlp'."
        )
    channels, height, width = input_shape
    return channels, height, width
