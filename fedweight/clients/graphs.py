"""A step as its tensor operations: fewer passes over the weights, no Python."""

from __future__ import annotations

import copy
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

T = TypeVar("T")

log = logging.getLogger("fedweight")


class _Missing:
    """Stands for a name of PyTorch's own that is not there any more.

    What needs it cannot be made then, and clients train one after another.
    """

    def __init__(self) -> None:
        raise RuntimeError("this PyTorch does not let one look at its operations")


try:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary
except ImportError:
    TorchDispatchMode = WeakIdKeyDictionary = _Missing  # type: ignore[assignment, misc]

aten = torch.ops.aten

# What gives a tensor another shape, if it is another.
RESHAPES = tuple(
    getattr(aten, name).default
    for name in ("view", "_unsafe_view", "expand")
    if hasattr(aten, name)
)

# So many operations are few.
FEW = 200

# Batched products of fewer values each than this are quicker made apart on a CPU:
# PyTorch adds to weights that lie apart from one another one client at a time.
WORTH_FUSING = 1 << 13


# What these give, or its shape, is not known before values are.
OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def grad(
    function: Callable[..., tuple[Tensor, T]], with_gradient: list[int]
) -> Callable[..., tuple[list[Tensor], T]]:
    """Return what returns the gradients by a function's first argument.

    ``torch.func.grad(function, has_aux=True)``, but for two things. That one imports
    PyTorch's compiler to tell it that there is nothing to compile: a second, at every
    start. And it does not tell a gradient of 0 from none.

    Parameters
    ----------
    function : Callable
        Takes a list of tensors, and more; returns a scalar, and something besides.
    with_gradient : list[int]
        Is told which of the tensors the scalar depends on: only these have a gradient.
    """
    from torch._functorch.eager_transforms import (
        _create_differentiable,
        _undo_create_differentiable,
        _wrap_all_tensors,
        grad_increment_nesting,
    )

    def differentiated(*given: Any) -> tuple[list[Tensor], T]:
        with grad_increment_nesting() as level, torch.enable_grad():
            by, *others = _wrap_all_tensors(given, level)
            for tensor in by:
                _create_differentiable(tensor, level)
            value, besides = function(by, *others)
            found = torch.autograd.grad(value, by, create_graph=True, allow_unused=True)
            with_gradient[:] = [k for k, g in enumerate(found) if g is not None]
            undo: Callable[..., Any] = _undo_create_differentiable
            some = [found[k] for k in with_gradient]
            gradients, besides = undo((some, besides), level)
        return gradients, besides

    return differentiated


def trace(function: Callable[..., Any], given: Sequence[Tensor]) -> fx.GraphModule:
    """Call a function, and return the tensor operations that it consisted of.

    As :meth:`Recorder.trace` does.
    """
    return Recorder().trace(function, given)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that are done while it is on.

    What vmap and autograd did is in them as operations on plain tensors. PyTorch has
    ``make_fx`` for this, which imports its compiler: a second, at every start.

    A node's ``meta`` has its tensor's ``shape``, ``stride``, ``dtype`` and ``device``,
    and whether it ``varies`` with the inputs. Of a tensor from outside, which becomes
    a constant, it has only that.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: Any = WeakIdKeyDictionary()
        # Memory that values which vary were written to, and that of constants, by
        # address; kept, so that no other gets the address.
        self._changed: dict[int, torch.UntypedStorage] = {}
        self._constant: dict[int, torch.UntypedStorage] = {}

    def trace(
        self, function: Callable[..., Any], given: Sequence[Tensor]
    ) -> fx.GraphModule:
        """Call a function, and return the operations that it consisted of.

        Parameters
        ----------
        function : Callable
            Takes tensors, and returns some in a list.
        given : Sequence[Tensor]
            What it is called with. The result can be called with tensors of these
            shapes.

        Raises
        ------
        RuntimeError
            If an operation depends on the tensors' values, as ``Tensor.item`` does:
            what was traced would not see others. And if one changes a tensor that is
            not given, which would be changed again by every call.
        """
        for k, tensor in enumerate(given):
            node = self.graph.placeholder(f"input_{k}")
            node.meta["varies"] = True
            self.keep(node, tensor)
        with self:
            results = function(*given)
        self.graph.output([self.node_of(tensor) for tensor in results])
        return fx.GraphModule(self.constants, self.graph)

    def has_changed(self, tensor: Tensor) -> bool:
        """Tell whether values that vary were written to a tensor's memory."""
        return tensor.untyped_storage().data_ptr() in self._changed

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch that nothing here is compiled: it would import the compiler."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do an operation, and record it."""
        kwargs = kwargs or {}
        if func is aten.lift_fresh.default:
            # A constant written in the function: what changes it changes a copy.
            func = aten.lift_fresh_copy.default
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        inputs: Any = fx.node.map_aggregate((args, kwargs), self.node_of)
        varies = any(map(self._varies, _tensors((args, kwargs))))
        if self._depends_on_values(func, args, varies):
            raise RuntimeError(f"{func} depends on values and cannot be traced")
        written = []
        if func._schema.is_mutable:
            tensors = _tensors(_written(func, args, kwargs))
            written = [tensor.untyped_storage() for tensor in tensors]
        if any(memory.data_ptr() in self._constant for memory in written):
            raise RuntimeError(
                f"{func} changes a tensor that is no buffer, which would be changed "
                "for everybody"
            )
        result = func(*args, **kwargs)
        node = self.graph.call_function(func, *inputs)
        node.meta["varies"] = varies
        if varies:
            self._changed |= {memory.data_ptr(): memory for memory in written}
        if isinstance(result, Tensor):
            self.keep(node, result)
        elif isinstance(result, Iterable):
            for k, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, k))
                    item.meta["varies"] = node.meta["varies"]
                    self.keep(item, part)
        return result

    def keep(self, node: fx.Node, tensor: Tensor) -> None:
        """Take note of what a node stands for."""
        node.meta["shape"] = tensor.shape
        node.meta["stride"] = None if tensor.is_sparse else tensor.stride()
        node.meta["dtype"] = tensor.dtype
        node.meta["device"] = tensor.device
        self._nodes[tensor] = node

    def node_of(self, value: Any) -> Any:
        """Return a tensor's node; what is no tensor is returned as it is."""
        if not isinstance(value, Tensor):
            return value
        if value not in self._nodes:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            node = self._nodes[value] = self.graph.get_attr(name)
            node.meta["varies"] = False
            if value.numel():
                memory = value.untyped_storage()
                self._constant[memory.data_ptr()] = memory
        return self._nodes[value]

    def _varies(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's values depend on the inputs."""
        varies: bool = self.node_of(tensor).meta["varies"]
        return varies or self.has_changed(tensor)

    def _depends_on_values(self, func: Any, args: Sequence[Any], varies: bool) -> bool:
        """Tell whether what an operation gives, or its shape, is another for others.

        What is chosen by places has their shape; what is chosen by a mask has not.
        """
        if func is aten.index.Tensor:
            masks = [
                index
                for index in args[1]
                if index is not None and index.dtype in (torch.bool, torch.uint8)
            ]
            return any(map(self._varies, masks))
        if func is aten.masked_select.default:
            return self._varies(args[1])
        return varies and bool(OF_VALUES.intersection(func.tags))


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which of the operations that are done while it is on are special.

    Attributes
    ----------
    draws : set[str]
        Those that draw random numbers.
    coarse : str
        The first that computes in half precision; empty if none does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: set[str] = set()
        self.coarse = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch that nothing here is compiled: it would import the compiler."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do an operation, and look at it."""
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.draws.add(str(func))
        half = (torch.float16, torch.bfloat16)
        if not self.coarse and any(t.dtype in half for t in _tensors(result)):
            self.coarse = str(func)
        return result


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors in arguments, also those in lists."""
    found: list[Tensor] = []
    fx.node.map_aggregate(
        values, lambda value: found.append(value) if isinstance(value, Tensor) else None
    )
    return found


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation changes."""
    by_name = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    by_name |= kwargs
    return [
        by_name[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name in by_name
    ]


def drop_unused(graph: fx.Graph) -> None:
    """Leave out operations whose results nobody uses, if they change nothing.

    PyTorch's own way to do so has not always known which ones do.

    Parameters
    ----------
    graph : Graph
        As :func:`trace` gives it; changed in place.
    """
    for node in reversed(graph.nodes):
        mutable = _is_operation(node) and node.target._schema.is_mutable
        if node.op not in ("placeholder", "output") and not (node.users or mutable):
            graph.erase_node(node)


def _is_operation(node: fx.Node) -> bool:
    """Tell whether a node is one of PyTorch's operations, not one of its results."""
    return isinstance(node.target, torch._ops.OpOverload)


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


def without_python(
    traced: fx.GraphModule, examples: Sequence[Tensor]
) -> Callable[..., Any]:
    """Return a traced function that runs without the interpreter.

    So threads do not wait for each other between operations. The operations and their
    bits are the same. TorchScript does it; where it cannot, as with a convolution's
    gradient, Python goes on.
    """
    step = _scripted(traced, examples)
    return traced.forward if step is None else step


def _scripted(
    module: nn.Module, examples: Sequence[Any], read: Sequence[Tensor] = ()
) -> Callable[..., Any] | None:
    """Return a module as TorchScript, or ``None`` where that cannot be.

    PyTorch has announced to drop it. Whatever is not there any more, or does not do
    what the module does, leads to ``None``, and training is slower. The examples are
    changed as the module changes them; those in ``read`` it only reads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated; nothing else does this.
        try:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                scripted: Callable[..., Any] = torch.jit.trace(  # type: ignore[no-untyped-call]
                    module, tuple(examples), check_trace=False, _store_inputs=False
                )
                others = copy.deepcopy(examples, {id(t): t for t in read})
                found, wanted = scripted(*examples), module(*others)
        except Exception as error:
            log.debug("a training step or a loop of some runs in Python: %s", error)
            return None
    pairs = zip(_tensors((examples, found)), _tensors((others, wanted)), strict=True)
    if all(map(_identical, *zip(*pairs, strict=True))):
        return scripted
    log.warning("a training step as TorchScript gave other values: not used.")
    return None


def _identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors have the same values, of which some may be NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def gather(
    data: Sequence[Tensor], rows: Tensor, batch: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Fill ``batch``, ``[C, B, ...]`` each, with rows ``[C, B]`` of the data."""
    for whole, part in zip(data, batch, strict=True):
        torch.index_select(whole, 0, rows.view(-1), out=part.flatten(0, 1))
    return batch


def has_few_operations(step: Callable[..., Any]) -> bool:
    """Tell whether a step is without Python, and no longer than a small net's."""
    graph: Any = getattr(step, "inlined_graph", None)
    if graph is None:
        return False
    kinds: list[str] = [node.kind() for node in graph.nodes()]
    return sum(kind.startswith("aten::") for kind in kinds) <= FEW


def several(
    step: Callable[..., Any], examples: Sequence[Any]
) -> Callable[..., Any] | None:
    """Return some steps in one call, with batches that are rows of common arrays.

    What the interpreter does for each call is a tenth of a small step, and the other
    threads wait for it. ``None`` is returned where it cannot be.

    Parameters
    ----------
    step : Callable
        A step that :func:`without_python` made, and that changes its state in place.
    examples : Sequence
        What the result will be called with, in these shapes: the step's state; the
        data and the batch as for :func:`gather`; the batches' rows, ``[steps, C, B]``;
        what all steps take, and a tuple of what each takes, ``[steps, ...]``.
    """
    _, data, *_ = examples
    return _scripted(_Several(step), examples, data)


class _Several(nn.Module):
    """TorchScript wants a module around what it calls."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        state: Sequence[Tensor],
        data: Sequence[Tensor],
        batch: Sequence[Tensor],
        rows: Tensor,
        shared: Tensor,
        of_steps: Sequence[Tensor],
    ) -> Tensor:
        for k in range(len(rows)):
            gather(data, rows[k], batch)
            self.step(*state, *batch, shared, *(values[k] for values in of_steps))
        return rows  # A trace must return something.


class Replayed:
    """A step that runs as a CUDA graph: one launch, however many kernels it has.

    A step of a small net is some fifty kernels of a few microseconds; to launch them
    one by one takes longer than to run them. A graph belongs to the memory that it was
    recorded with, which is that of the first call: state that is changed in place, and
    a batch that is filled anew. A call with other tensors runs the step as it is.

    Before it is recorded the step may not wait for the device, as when it copies from
    the host; before it is used the graph is compared with the step. If there is
    anything amiss a warning says so, and the step runs as it is. After a recording that
    broke off nothing is recorded any more in this process, as PyTorch's allocator does
    not recover from it altogether.

    Parameters
    ----------
    step : Callable
        Takes tensors and returns some; changes some of the given in place.
    """

    broken = False

    def __init__(self, step: Callable[..., list[Tensor]]) -> None:
        self._step = step
        self._places: list[int] = []
        self._replay: Callable[[], None] | None = None
        self._given: Sequence[Tensor] = ()
        self._results: list[Tensor] = []

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Run the step; a graph's results are overwritten by its next run."""
        places = [tensor.data_ptr() for tensor in given]
        if not self._places:
            self._places = places
            if not Replayed.broken:
                self._record(given)
        if self._replay is None or places != self._places:
            return self._step(*given)
        self._replay()
        return self._results

    def _record(self, given: Sequence[Tensor]) -> None:
        """Make the graph, which leaves the tensors as they are."""
        try:
            _warm_up(self._step, copy.deepcopy(given))
        except RuntimeError as error:
            log.warning("a training step cannot be a CUDA graph: %s", error)
            return
        try:
            replay, results = _recorded(lambda: self._step(*given))
        except RuntimeError as error:
            Replayed.broken = True
            log.warning("training steps are no CUDA graphs from now on: %s", error)
            return
        if self._does_the_same(given, replay, results):
            # The tensors are kept: the graph reads and writes their memory.
            self._replay, self._given, self._results = replay, given, results

    def _does_the_same(
        self,
        given: Sequence[Tensor],
        replay: Callable[[], None],
        results: Sequence[Tensor],
    ) -> bool:
        """Compare one run of the graph with one of the step; undo both."""
        try:
            before, expected = copy.deepcopy(given), copy.deepcopy(given)
            wanted = self._step(*expected)
            try:
                replay()
                pairs = zip((*given, *results), (*expected, *wanted), strict=True)
                same = all(_alike(found, right) for found, right in pairs)
            finally:
                for tensor, value in zip(given, before, strict=True):
                    tensor.copy_(value)
        except RuntimeError as error:
            log.warning("a CUDA graph cannot be compared with its step: %s", error)
            return False
        if not same:
            log.warning("a step as a CUDA graph gave other values: not used.")
        return same


def _warm_up(step: Callable[..., object], given: Sequence[Tensor]) -> None:
    """Run a step as often as libraries need to prepare themselves for its stream.

    Raises
    ------
    RuntimeError
        If it waits for the device: a graph cannot.
    """
    stream, mode = _stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls what finds waiting a prototype.
        try:
            with torch.cuda.stream(stream):
                step(*given)
                torch.cuda.set_sync_debug_mode("error")
                step(*given)
                step(*given)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream().wait_stream(stream)


def _recorded(
    run: Callable[[], list[Tensor]],
) -> tuple[Callable[[], None], list[Tensor]]:
    """Return what repeats a run, and the tensors that hold its results."""
    graph, stream = torch.cuda.CUDAGraph(), _stream()
    # Outside, too: the inner context does not leave the stream where it breaks off.
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        results = run()
    return graph.replay, results


def _stream() -> torch.cuda.Stream:
    """Return the stream on which this device's graphs are recorded."""
    return _stream_of(torch.cuda.current_device())


@cache
def _stream_of(device: int) -> torch.cuda.Stream:
    # Libraries keep workspaces for each stream.
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _alike(found: Tensor, right: Tensor) -> bool:
    """Tell whether values are equal but for the order of sums on a GPU."""
    if not found.is_floating_point():
        return torch.equal(found, right)
    return torch.allclose(found, right, rtol=1e-4, atol=1e-5, equal_nan=True)


def plain_execution() -> AbstractContextManager[None]:
    """Return a context in which TorchScript runs what was traced, as it was traced.

    It would measure the first calls and change later ones, and perhaps their bits.
    """
    execution: Any = getattr(torch.jit, "optimized_execution", None)
    return execution(False) if _can_be_entered(execution) else nullcontext()


@cache
def _can_be_entered(execution: Any) -> bool:
    """Tell whether that works; if not, nothing has been made TorchScript either."""
    try:
        with execution(False):
            return True
    except Exception:
        return False


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let attention be made of operations that can be batched, in all threads.

    PyTorch's fused one on a CPU goes from client to client. So it does where PyTorch
    does not let one choose any more.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
