"""A JAX program by hand: a whole round is one compiled function.

The clients' data and orders lie on the device; local training is a scan over the steps,
of all clients at once (``vmap``), and the mean of their models is taken there. What
convolves is also tried with one client after another, and goes on with what was
quicker. Models S and M only: JAX's are written here.

Products do not round to TF32, as in the other engines. Images have their channels last,
which is JAX's own choice; the weights are turned to the others' order to be compared.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

# Before the import: memory is taken as it is needed, and can be compared.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from .job import Job, flat
from .work import BATCH, LEARNING_RATE, SAMPLES
from .worker import start

Arrays = list[Any]

# More clients than these follow in a further part, so that their models fit.
AT_ONCE = 2000


def logits_of_mlp(p: Arrays, x: Any) -> Any:
    """Return ``[n, 10]`` of images ``[n, 784]``."""
    hidden = jax.nn.relu(x @ p[0] + p[1])
    return hidden @ p[2] + p[3]


def logits_of_cnn(p: Arrays, x: Any) -> Any:
    """Return ``[n, 10]`` of images ``[n, 28, 28, 1]``."""
    for kernel, bias in (p[0:2], p[2:4]):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.reduce_window(
            jax.nn.relu(x + bias), -jnp.inf, jax.lax.max, *[(1, 2, 2, 1)] * 2, "VALID"
        )
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ p[4] + p[5])
    return hidden @ p[6] + p[7]


LOGITS: dict[str, Callable[[Arrays, Any], Any]] = {
    "S": logits_of_mlp,
    "M": logits_of_cnn,
}


def turned(tensor: npt.NDArray[np.float32], channels: int = 0) -> Any:
    """Return a weight as JAX takes it, from PyTorch's order.

    ``channels`` is how many the images have that a linear layer flattens, if any.
    """
    if channels:
        images = tensor.reshape(len(tensor), channels, -1).swapaxes(1, 2)
        tensor = images.reshape(len(tensor), -1)
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def turned_back(
    array: npt.NDArray[np.float32], channels: int = 0
) -> npt.NDArray[np.float32]:
    """Return what :func:`turned` was given."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    array = array.T
    if channels:
        images = array.reshape(len(array), -1, channels).swapaxes(1, 2)
        array = images.reshape(len(array), -1)
    return array


def round_of(model: str, at_once: int | None) -> Callable[..., Arrays]:
    """Return the function of a round: so many clients at once, or each alone."""

    def loss(p: Arrays, x: Any, y: Any) -> Any:
        found = jax.nn.log_softmax(LOGITS[model](p, x))
        return -jnp.take_along_axis(found, y[:, None], 1).mean()

    def client(p: Arrays, told: tuple[Any, Any, Any]) -> Arrays:
        x, y, order = told
        steps = (SAMPLES // BATCH, BATCH)

        def step(p: Arrays, batch: tuple[Any, Any]) -> tuple[Arrays, None]:
            gradients = jax.grad(loss)(p, *batch)
            return [
                a - LEARNING_RATE * g for a, g in zip(p, gradients, strict=True)
            ], None

        batches = (x[order].reshape(*steps, *x.shape[1:]), y[order].reshape(steps))
        return jax.lax.scan(step, p, batches)[0]

    @jax.jit
    def next_model(p: Arrays, x: Any, y: Any, orders: Any) -> Arrays:
        rows = jax.lax.map(partial(client, p), (x, y, orders), batch_size=at_once)
        return [row.mean(0) for row in rows]

    return next_model


def quicker(candidates: list[Callable[..., Any]], *arguments: Any) -> Any:
    """Return that one of some functions whose second call is the quickest."""
    if len(candidates) == 1:
        return candidates[0]

    def seconds(call: Callable[..., Any]) -> float:
        jax.block_until_ready(call(*arguments))
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        return time.perf_counter() - began

    return min(candidates, key=seconds)


def main() -> None:
    """Run rounds as told."""
    worker, job = start(f"JAX {version('jax')}")
    if job.work.model not in LOGITS:
        raise SystemExit(f"JAX by hand has no model {job.work.model}")
    jax.config.update("jax_platforms", job.device)
    jax.config.update("jax_default_matmul_precision", "highest")
    run(worker, job)


def run(worker: Any, job: Job) -> None:
    """Put everything on the device and go on from there."""
    model, cohort = job.work.model, job.cohort
    images = (784,) if model == "S" else (28, 28, 1)
    # One channel: first or last, it is the same.
    x = jnp.asarray(job.x.reshape(cohort, SAMPLES, *images))
    y = jnp.asarray(job.y.reshape(cohort, SAMPLES), jnp.int32)
    orders = jnp.asarray(np.load(job.folder / "orders.npy"), jnp.int32)
    tensors = [t.numpy() for t in job.model().state_dict().values()]
    channels = [64 if model == "M" and k == 4 else 0 for k in range(len(tensors))]
    p = [jnp.asarray(turned(t, c)) for t, c in zip(tensors, channels, strict=True)]
    ways = {f"vmap of {min(cohort, AT_ONCE)}": round_of(model, min(cohort, AT_ONCE))}
    if model == "M":
        ways["one after another"] = round_of(model, None)
    next_model = quicker(list(ways.values()), p, x, y, orders[0])
    worker.facts["plan"] = next(n for n, way in ways.items() if way is next_model)

    def weights() -> npt.NDArray[np.float32]:
        arrays = zip(map(np.asarray, p), channels, strict=True)
        return flat([turned_back(a, c) for a, c in arrays])

    round = 0
    while worker.next_round(weights):
        p = next_model(p, x, y, orders[round % len(orders)])
        jax.block_until_ready(p)
        round += 1


if __name__ == "__main__":
    main()
