"""A step as its tensor operations, recorded while it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx


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

# What these give, or its shape, is not known before values are.
OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


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
        # Memory that may have been changed without a word.
        self._doubted: dict[int, torch.UntypedStorage] = {}
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

    def may_have_changed(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's memory was changed, or may have been in silence."""
        doubted = tensor.untyped_storage().data_ptr() in self._doubted
        return doubted or self.has_changed(tensor)

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
        varies = any(map(self._varies, tensors_in((args, kwargs))))
        if self._depends_on_values(func, args, varies):
            raise RuntimeError(f"{func} depends on values and cannot be traced")
        written = []
        if func._schema.is_mutable:
            told = {a.name for a in func._schema.arguments if _is_written(a)}
            written = _memory(func, told, args, kwargs)
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
            doubted = _memory(func, in_silence(func), args, kwargs)
            self._doubted |= {memory.data_ptr(): memory for memory in doubted}
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
        if not self.coarse and any(t.dtype in half for t in tensors_in(result)):
            self.coarse = str(func)
        return result


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in arguments, also those in lists."""
    found: list[Tensor] = []
    fx.node.map_aggregate(
        values, lambda value: found.append(value) if isinstance(value, Tensor) else None
    )
    return found


@cache
def in_silence(func: Any) -> frozenset[str]:
    """Return the arguments that an operation may change, though it does not say so.

    Of PyTorch's own these are running statistics: BatchNorm by cuDNN or MIOpen writes
    them in place, and its schema promises that it changes nothing. Of somebody else's
    that says to change nothing it is not known.
    """
    schema = func._schema
    if not schema.name.startswith(("aten::", "prims::")):
        changes = () if schema.is_mutable else schema.arguments
        return frozenset(a.name for a in changes)
    if schema.name.endswith(_READ_ONLY):
        return frozenset()
    running = (a for a in schema.arguments if a.name.startswith("running_"))
    return frozenset(a.name for a in running if a.alias_info is None)


# Operations that are named so only read running statistics.
_READ_ONLY = ("_backward", "_functional", "_no_training", "_no_update")


def _is_written(argument: Any) -> bool:
    """Tell whether an argument is one that its operation says to change."""
    return argument.alias_info is not None and argument.alias_info.is_write


def _memory(
    func: Any, names: Iterable[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> list[torch.UntypedStorage]:
    """Return the memory of some of an operation's arguments."""
    by_name = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    by_name |= kwargs
    given = [by_name[name] for name in names if name in by_name]
    return [tensor.untyped_storage() for tensor in tensors_in(given)]
