"""Models of texts."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from ..core.errors import ConfigurationError
from ..core.options import validated


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
        if len(input_shape) != 1:
            raise ConfigurationError(
                f"model 'char-gru' takes texts of shape (T,), but the data have shape "
                f"{tuple(input_shape)}. Take another model or text data."
            )
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
