"""Fewer passes over the weights: a recorded step without what it can do without."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import fx

from .recording import aten, in_silence

# What gives a tensor another shape, if it is another.
RESHAPES = tuple(
    getattr(aten, name).default
    for name in ("view", "_unsafe_view", "expand")
    if hasattr(aten, name)
)

# Batched products of fewer values each than this are quicker made apart on a CPU:
# PyTorch adds to weights that lie apart from one another one client at a time.
WORTH_FUSING = 1 << 13


def drop_unused(graph: fx.Graph) -> None:
    """Leave out operations whose results nobody uses, if they change nothing.

    PyTorch's own way to do so has not always known which ones do.

    Parameters
    ----------
    graph : Graph
        As :func:`trace` gives it; changed in place.
    """
    for node in reversed(graph.nodes):
        changes = _is_operation(node) and _may_change(node.target)
        if node.op not in ("placeholder", "output") and not (node.users or changes):
            graph.erase_node(node)


def _is_operation(node: fx.Node) -> bool:
    """Tell whether a node is one of PyTorch's operations, not one of its results."""
    return isinstance(node.target, torch._ops.OpOverload)


def _may_change(func: Any) -> bool:
    """Tell whether an operation changes what it is given, as far as one can know."""
    return func._schema.is_mutable or bool(in_silence(func))


def drop_idle(graph: fx.Graph) -> None:
    """Leave out operations that change nothing, such as a view of the same shape.

    A third of what ``vmap`` leaves in a dense step; a call costs more than a
    microsecond.

    Parameters
    ----------
    graph : Graph
        As :func:`trace` gives it; changed in place.
    """
    for node in graph.nodes:
        idle = node.target is aten.detach.default
        idle |= node.target in RESHAPES and _same_shape(node, node.args[0])
        if node.target is aten.mul.Scalar and node.args[1] == 1:
            # A product lies closer together than what was picked out of more.
            idle = node.meta["stride"] == node.args[0].meta.get("stride")
            # It does not matter where that is only added to what lies together.
            idle |= all(_is_added(user) for user in node.users)
        if idle:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_added(node: fx.Node) -> bool:
    """Tell whether a view, as of a bias ``[C, 1, d]``, is only added to whole tensors.

    It has the tensor's dimensions and some of 1; the sums lie as their other term does.
    """
    if node.target not in RESHAPES or _long(node) != _long(cast(fx.Node, node.args[0])):
        return False
    for user in node.users:
        if user.target is not aten.add.Tensor or user.args[0] is not node:
            return False
        other = user.args[1]
        if not isinstance(other, fx.Node) or not _same_shape(user, other):
            return False
        if other.meta["stride"] != user.meta["stride"] or not _is_dense(other):
            return False
    return True


def _long(node: fx.Node) -> list[int]:
    """Return the dimensions of a tensor that are not 1."""
    return [size for size in node.meta["shape"] if size != 1]


def _is_dense(node: fx.Node) -> bool:
    """Tell whether a tensor's rows follow one another without gaps."""
    shape, stride = node.meta["shape"], node.meta["stride"]
    dense = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
    return stride == dense  # type: ignore[no-any-return]


def fuse_descent(graph: fx.Graph) -> None:
    """Let batched products be subtracted from the weights where they are made.

    ``w -= a @ b`` as one operation writes no gradient and reads none: it saves two of
    three passes over memory of the weights' size, a tenth of a step of a dense model.

    Parameters
    ----------
    graph : Graph
        After :func:`drop_idle`; changed in place.
    """
    updates = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.sub_.Tensor)
        if not node.kwargs
        and node.args[0].op == "placeholder"
        and isinstance(node.args[1], fx.Node)
    ]
    changed = {node.args[0] for node in updates}
    for node in updates:
        weights, gradient = cast("tuple[fx.Node, fx.Node]", node.args)
        product, transposed = _behind(gradient)
        if product.target is not aten.bmm.default or len(product.users) != 1:
            continue
        values = math.prod(product.meta["shape"][1:])
        if product.meta["device"].type == "cpu" and values < WORTH_FUSING:
            continue
        factors = cast("tuple[fx.Node, fx.Node]", product.args)
        # A factor that is a weight may have changed by now.
        if any(_viewed(factor) in changed for factor in factors):
            continue
        with graph.inserting_before(node):
            if transposed:
                weights = graph.call_function(aten.transpose.int, (weights, 1, 2))
            fused = graph.call_function(
                aten.baddbmm_.default, (weights, *factors), {"alpha": -1}
            )
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        while gradient is not product:
            before, gradient = gradient, cast(fx.Node, gradient.args[0])
            graph.erase_node(before)
        graph.erase_node(product)


def _behind(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return what a matrix was before it was transposed, and if it is still."""
    transposed = False
    while (
        node.target is aten.transpose.int
        and set(node.args[1:]) == {1, 2}
        and len(node.users) == 1
    ):
        node, transposed = cast(fx.Node, node.args[0]), not transposed
    return node, transposed


def _viewed(node: fx.Node) -> fx.Node:
    """Return whose memory a tensor shows."""
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        made = (
            _is_operation(node)
            and node.target not in RESHAPES
            and node.target._schema.returns[0].alias_info is None  # type: ignore[union-attr]
        )
        if made:
            break
        node = node.args[0]
    return node


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    """Tell whether two tensors have one shape; that of a constant is not known."""
    own = node.meta.get("shape")
    return own is not None and own == source.meta.get("shape")
