"""The local training of many two-layer networks as one program for a card, in Triton.

Each program of the grid trains one client, from its first step to its last, and no
other one reads or writes what it changes: nothing depends on which runs first. The
weights of the first layer lie in the card's memory and pass through a processor in
tiles. A tile is changed by the gradient of a step, written, and used at once for the
hidden values of the next step. So a step reads and writes these weights once, where a
pass forward and one backward would read them twice. The second layer stays in
registers.

Hidden values are ``[H, B]`` and logits ``[C, B]``: a column is an example. Products
have float32's precision where ``PRECISION`` is ``"ieee"``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def train_clients(
    x_all,  # [N, INPUTS]
    y_all,  # [N]
    rows,  # [total, clients, WIDTH]: which examples, of each step
    counts,  # [total, clients]: how many of them are real, float32
    steps,  # [clients]: 1 or more
    start,  # [P]: where all begin
    models,  # [clients, stride]: what they reach
    velocities,  # [clients, stride]; not touched without momentum
    losses,  # [clients]: sums over the examples that training met
    correct,  # [clients]: how many of them were right
    clients,
    stride,
    rate,
    momentum,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    CLASSES: tl.constexpr,
    PADDED: tl.constexpr,  # CLASSES, rounded up
    WIDTH: tl.constexpr,
    BATCH: tl.constexpr,  # WIDTH, rounded up
    TILE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Train one client by SGD with the cross-entropy."""
    client = tl.program_id(0).to(tl.int64)  # Rows begin beyond 2 ** 31 bytes.
    model, velocity = models + client * stride, velocities + client * stride
    unit, klass = tl.arange(0, HIDDEN), tl.arange(0, PADDED)
    # A place without an example shows one of the client's own, which does not count.
    place = tl.minimum(tl.arange(0, BATCH), WIDTH - 1)
    bias_at = HIDDEN * INPUTS + unit
    weight_2_at = HIDDEN * (INPUTS + 1) + klass[:, None] * HIDDEN + unit[None, :]
    bias_2_at = HIDDEN * (INPUTS + 1 + CLASSES) + klass
    is_class = klass < CLASSES
    bias = tl.load(start + bias_at)
    weight_2 = tl.load(start + weight_2_at, mask=is_class[:, None], other=0.0)
    bias_2 = tl.load(start + bias_2_at, mask=is_class, other=0.0)
    bias_moved, bias_2_moved = tl.zeros_like(bias), tl.zeros_like(bias_2)
    weight_2_moved = tl.zeros_like(weight_2)
    loss, hits = 0.0, 0.0
    own_steps = tl.load(steps + client).to(tl.int32)

    this = client  # Of a step and a client.
    example = tl.load(rows + this * WIDTH + place)
    hidden = tl.zeros([HIDDEN, BATCH], tl.float32)
    for first in range(0, INPUTS, TILE):
        inputs = first + tl.arange(0, TILE)
        weight = tile(start, unit, inputs, INPUTS)
        x = tile(x_all, example, inputs, INPUTS)
        hidden = tl.dot(weight, tl.trans(x), hidden, input_precision=PRECISION)

    for step in range(own_steps):
        count = tl.load(counts + this)
        y = tl.load(y_all + example)
        hidden = tl.maximum(hidden + bias[:, None], 0.0)
        logits = tl.dot(weight_2, hidden, input_precision=PRECISION) + bias_2[:, None]
        by_logits, step_loss, step_hits = of_logits(logits, y, count, CLASSES)
        loss += step_loss
        hits += step_hits
        by_hidden = tl.dot(tl.trans(weight_2), by_logits, input_precision=PRECISION)
        by_hidden = tl.where(hidden > 0.0, by_hidden, 0.0)
        by_weight_2 = tl.dot(by_logits, tl.trans(hidden), input_precision=PRECISION)
        by_bias, by_bias_2 = tl.sum(by_hidden, 1), tl.sum(by_logits, 1)
        if MOMENTUM:
            bias_moved = momentum * bias_moved + by_bias
            weight_2_moved = momentum * weight_2_moved + by_weight_2
            bias_2_moved = momentum * bias_2_moved + by_bias_2
            by_bias, by_weight_2 = bias_moved, weight_2_moved
            by_bias_2 = bias_2_moved
        bias -= rate * by_bias
        weight_2 -= rate * by_weight_2
        bias_2 -= rate * by_bias_2

        source = tl.where(step == 0, start, model)
        this += clients
        if step + 1 < own_steps:
            following = tl.load(rows + this * WIDTH + place)
            hidden = tl.zeros([HIDDEN, BATCH], tl.float32)
            for first in range(0, INPUTS, TILE):
                inputs = first + tl.arange(0, TILE)
                weight = changed_tile(
                    source, model, velocity, unit, inputs, x_all, example, by_hidden,
                    rate, momentum, step > 0, INPUTS, MOMENTUM, PRECISION,
                )  # fmt: skip
                x = tile(x_all, following, inputs, INPUTS)
                hidden = tl.dot(weight, tl.trans(x), hidden, input_precision=PRECISION)
            example = following
            tl.debug_barrier()  # From here on threads read what others have written.
        else:
            for first in range(0, INPUTS, TILE):
                inputs = first + tl.arange(0, TILE)
                changed_tile(
                    source, model, velocity, unit, inputs, x_all, example, by_hidden,
                    rate, momentum, step > 0, INPUTS, MOMENTUM, PRECISION,
                )  # fmt: skip

    tl.store(model + bias_at, bias)
    tl.store(model + weight_2_at, weight_2, mask=is_class[:, None])
    tl.store(model + bias_2_at, bias_2, mask=is_class)
    tl.store(losses + client, loss)
    tl.store(correct + client, hits)


@triton.jit
def tile(matrix, row, inputs, INPUTS: tl.constexpr):
    """Return some columns of some rows of a matrix with ``INPUTS`` columns."""
    at = matrix + row[:, None] * INPUTS + inputs[None, :]
    return tl.load(at, mask=(inputs < INPUTS)[None, :], other=0.0)


@triton.jit
def changed_tile(
    source,
    model,
    velocity,
    unit,
    inputs,
    x_all,
    example,
    by_hidden,
    rate,
    momentum,
    has_velocity,
    INPUTS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Change the first layer's weights of some inputs; return them ``[H, TILE]``."""
    x = tile(x_all, example, inputs, INPUTS)
    change = tl.dot(by_hidden, x, input_precision=PRECISION)
    at = unit[:, None] * INPUTS + inputs[None, :]
    is_input = (inputs < INPUTS)[None, :]
    if MOMENTUM:
        seen = is_input & has_velocity
        change += momentum * tl.load(velocity + at, mask=seen, other=0.0)
        tl.store(velocity + at, change, mask=is_input)
    weight = tile(source, unit, inputs, INPUTS) - rate * change
    tl.store(model + at, weight, mask=is_input)
    return weight


@triton.jit
def of_logits(logits, y, count, CLASSES: tl.constexpr):
    """Return the gradient by the logits ``[C, B]``, the loss's sum, and the hits.

    The gradient is that of the mean cross-entropy of the first ``count`` examples.
    """
    klass = tl.arange(0, logits.shape[0])[:, None]
    real = tl.arange(0, logits.shape[1]) < count
    logits = tl.where(klass < CLASSES, logits, float("-inf"))
    above = logits - tl.max(logits, 0)[None, :]
    total = tl.sum(tl.exp(above), 0)
    is_label = klass == y[None, :]
    losses = tl.log(total) - tl.sum(tl.where(is_label, above, 0.0), 0)
    hits = tl.argmax(logits, 0) == y
    gradient = tl.exp(above) / total[None, :] - tl.where(is_label, 1.0, 0.0)
    gradient = tl.where(real[None, :], gradient / count, 0.0)
    loss = tl.sum(tl.where(real, losses, 0.0), 0)
    return gradient, loss, tl.sum(tl.where(real & hits, 1.0, 0.0), 0)
