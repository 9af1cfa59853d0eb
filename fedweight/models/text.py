"""Models of texts."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.options import validated
from .checks import MOST_LAYERS


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

    @validated
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        vocabulary: Annotated[int, Ge(1)] | None = None,
        embedding: Annotated[int, Ge(1)] = 16,
        hidden: Annotated[int, Ge(1)] = 128,
    ) -> None:
        super().__init__()
        _check_text("char-gru", input_shape)
        vocabulary = num_classes if vocabulary is None else vocabulary
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


class CharTransformer(nn.Module):
    """Next-token transformer for texts; options width, heads, depth, vocabulary.

    Blocks normalise first. Attention is written out, and looks at all tokens: they all
    come before the one that is predicted.

    Parameters
    ----------
    input_shape : tuple of int
        ``(T,)``: the input is int64 token numbers, ``[n, T]``.
    num_classes : int
        C.
    vocabulary : int, optional
        How many tokens there are; by default C.
    width : int
        The width of a token's embedding; ``heads`` must divide it.
    heads : int
        How many heads attend.
    depth : int
        How many blocks there are.

    References
    ----------
    A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, L. Kaiser,
    I. Polosukhin, "Attention Is All You Need", NeurIPS, 2017.

    R. Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML,
    2020 (why to normalise first).
    """

    @validated
    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        vocabulary: Annotated[int, Ge(1)] | None = None,
        width: Annotated[int, Ge(1)] = 64,
        heads: Annotated[int, Ge(1)] = 4,
        depth: Annotated[int, Ge(1), Le(MOST_LAYERS)] = 2,
    ) -> None:
        super().__init__()
        _check_text("char-transformer", input_shape)
        if width % heads:
            raise ConfigurationError(
                f"heads must divide width, got heads = {heads} and width = {width}."
            )
        vocabulary = num_classes if vocabulary is None else vocabulary
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(input_shape[0], width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        for parameter in (self.embedding.weight, self.places):
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[n, C]`` of the token that follows ``[n, T]`` tokens."""
        states = self.blocks(self.embedding(x) + self.places)
        logits: Tensor = self.classifier(self.norm(states[:, -1]))
        return logits


class _Block(nn.Module):
    """Attention, then two layers on each token, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm_layers = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.output(self._attended(self.norm_attention(states)))
        hidden = nn.functional.gelu(self.widen(self.norm_layers(states)))
        added: Tensor = self.narrow(hidden)
        return states + added

    def _attended(self, states: Tensor) -> Tensor:
        """Return the values that each token attends to, ``[n, T, width]``."""
        parts = (self.query(states), self.key(states), self.value(states))
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts
        )
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        found: Tensor = torch.softmax(scores, -1) @ value
        return found.transpose(1, 2).flatten(2)


def _check_text(model: str, input_shape: tuple[int, ...]) -> None:
    """Raise if an example is no text."""
    if len(input_shape) != 1:
        raise ConfigurationError(
            f"model '{model}' takes texts of shape (T,), but the data have shape "
            f"{tuple(input_shape)}. Take another model or text data."
        )
