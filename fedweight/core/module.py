"""A module whose tensors are views of vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from .errors import ClientError, ConfigurationError
from .layout import Base, FlatModel, Layout
from .precision import Precision


class FlatModule:
    """A module whose parameters and buffers are views of vectors.

    One optimiser step is then a few operations on one vector, and loading a model is
    one copy. The module stays usable as it is.

    Parameters
    ----------
    module : nn.Module
        Its floating tensors become views.
    device : torch.device or str
        Where the vectors live.
    precision : {"fp32", "tf32", "bf16"}
        With ``"bf16"`` it computes as ``torch.autocast`` does: products and
        convolutions of values rounded to bfloat16, sums that need it and all weights
        and gradients in float32. The others are about a GPU's products; see
        :func:`~fedweight.core.precision.gpu_arithmetic`.

    Raises
    ------
    ConfigurationError
        If tensors have different dtypes, or float64 with ``"bf16"``, which would
        change nothing.

    Attributes
    ----------
    parameters, gradients : Tensor
        Shape ``[P]``; ``gradients`` is filled by ``backward``.
    frozen : Tensor
        Shape ``[F]``; parameters that ask for no gradient.
    buffers : Tensor
        Shape ``[B]``.

    Notes
    -----
    A convolutional module that has the attribute ``channels_last``, and it is true, is
    given images whose values of a pixel are beside each other, on a CPU: PyTorch
    computes convolutions and pooling faster on them. The same values come out, to
    rounding. Its code must not ask tensors of images for a ``view``, which PyTorch
    refuses then; ``flatten`` and ``reshape`` are fine.

    A module of bfloat16 trains in that; its models are carried as float32, which holds
    its values exactly, and rounded to the nearest when they are loaded. Its inputs are
    cast, and it gives its outputs as float32.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.module = module.to(device)
        self._parts = list(module.modules())
        self._kind = torch.device(device).type
        self._rounds = precision == "bf16"
        on_cpu = self._kind == "cpu"
        self._channels_last = on_cpu and getattr(module, "channels_last", False) is True
        self._modes: dict[bool, list[bool]] = {}
        self.layout = Layout.of_module(module)
        dtype = self.layout.dtype
        if self._rounds and dtype == torch.float64:
            raise ConfigurationError(
                "precision: 'bf16' leaves a model alone whose weights are float64, as "
                "this one's are; choose 'fp32' or another model."
            )
        if _is_coarse(module):
            dtype = torch.bfloat16
            module.register_forward_pre_hook(_cast_inputs)
            module.register_forward_hook(_cast_outputs)
        sizes = (
            self.layout.num_parameters,
            self.layout.num_frozen,
            self.layout.num_buffers,
        )
        self.parameters, self.frozen, self.buffers = (
            torch.empty(size, dtype=dtype, device=device) for size in sizes
        )
        self.gradients = torch.zeros_like(self.parameters)
        self._integers: dict[str, Tensor] = {}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        vectors = {
            "parameter": self.parameters,
            "frozen": self.frozen,
            "buffer": self.buffers,
        }
        for e in self.layout.entries:
            if e.kind == "tied":
                continue
            tensor = tensors[e.name]
            if e.kind == "integer":
                self._integers[e.name] = tensor
                continue
            if tensor.dtype != dtype:
                raise ConfigurationError(
                    f"model: '{e.name}' is {tensor.dtype}, others are {dtype}. "
                    "All floating tensors must share one dtype."
                )
            place = slice(e.start, e.stop)
            values = vectors[e.kind][place]
            values.copy_(tensor.detach().reshape(-1))
            tensor.data = values.view(e.shape)
            if e.kind == "parameter":
                tensor.grad = self.gradients[place].view(e.shape)
        self._built = _Built(module, [e.name for e in self.layout.parameters])

    def fresh_gradients(self) -> list[bool]:
        """Tell which of the layout's parameters ``backward`` gave a gradient.

        Since this was asked last. One that has none is left alone by ``torch.optim``,
        though a gradient of 0 would make its momentum and weight decay move it.
        """
        return self._built.fresh_gradients()

    def train(self, mode: bool = True) -> None:
        """Let all layers train, or evaluate.

        PyTorch walks through all of them; here it does so only if one of them is not
        as it left it then.
        """
        if self._modes.get(mode) != [part.training for part in self._parts]:
            self.module.train(mode)
            self._modes[mode] = [part.training for part in self._parts]

    def __call__(self, x: Tensor) -> Any:
        """Return what the module makes of some inputs, as its values are."""
        return self._computed(self.module, self.laid_out(x))

    def with_values(self, values: dict[str, Tensor], x: Tensor) -> Any:
        """Return what it makes of inputs with other values of tensors, by name.

        Tensors that are not among them have its own; the inputs are taken as they lie.
        What the module's code assigns to a name is in ``values`` afterwards.
        """
        return self._computed(functional_call, self.module, values, (x,))

    def _computed(self, function: Callable[..., Any], *given: Any) -> Any:
        """Return a function's outputs, which it computes in the module's precision."""
        if not self._rounds:
            return function(*given)
        with torch.autocast(self._kind, torch.bfloat16):
            try:
                outputs = function(*given)
            finally:  # It keeps rounded weights while there is another one around it.
                torch.clear_autocast_cache()
        return _as_losses_need(outputs)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return inputs in the order in memory that the module computes on fastest."""
        if not self._channels_last or x.ndim != 4:
            return x
        if x.shape[1] > 1:
            return x.contiguous(memory_format=torch.channels_last)
        # Nothing is to be moved, but PyTorch goes by the strides.
        n, c, h, w = x.shape
        return x.contiguous().as_strided((n, c, h, w), (h * w, 1, w, 1))

    def load(self, model: FlatModel) -> None:
        """Copy a model's values in."""
        self._built.reset()
        self.parameters.copy_(model.parameters)
        self.frozen.copy_(model.frozen)
        self.buffers.copy_(model.buffers)
        for name, tensor in self._integers.items():
            tensor.copy_(torch.from_numpy(np.asarray(model.integers[name])))

    def save(self, loaded: FlatModel | None = None) -> FlatModel:
        """Copy the values out, to the CPU.

        Parameters
        ----------
        loaded : FlatModel, optional
            The model that was loaded; the result shares its frozen values.

        Raises
        ------
        ClientError
            If the module's code has put another tensor in the place of a parameter,
            or one of another kind in the place of a buffer, or has changed what is
            frozen.
        """
        self._built.collect()
        if loaded is None:
            frozen = self._out(self.frozen)
        else:
            frozen = loaded.frozen
            self._check_frozen(frozen)
        return FlatModel(
            self.layout,
            self._out(self.parameters),
            self._out(self.buffers),
            {n: t.detach().cpu().numpy().copy() for n, t in self._integers.items()},
            frozen,
        )

    def copy_base(self) -> Base:
        """Copy out what no round changes, to the CPU."""
        return Base(self.layout, self._out(self.frozen))

    def _out(self, values: Tensor) -> Tensor:
        """Copy a vector out, as models carry it."""
        return values.detach().to("cpu", self.layout.dtype, copy=True)

    def _check_frozen(self, loaded: Tensor) -> None:
        """Raise ``ClientError`` if a frozen value is not the one that was loaded."""
        own = self.frozen.cpu()
        loaded = loaded.to(own.dtype)
        if torch.equal(own, loaded):
            return
        for e in self.layout.entries:
            place = slice(e.start, e.stop)
            if e.kind == "frozen" and not torch.equal(own[place], loaded[place]):
                raise ClientError(
                    f"model: its code changes '{e.name}', which asks for no gradient, "
                    "and nobody but the client would have that. Make it a buffer, with "
                    "'register_buffer'."
                )


def _is_coarse(module: nn.Module) -> bool:
    """Tell whether a module's weights are bfloat16; those of a mixed one are not."""
    tensors = (*module.parameters(), *module.buffers())
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return dtypes == {torch.bfloat16}


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a module its inputs in the dtype that its weights have now."""
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )


def _cast_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Give outputs as losses are computed."""
    return _as_losses_need(outputs)


def _as_losses_need(outputs: Any) -> Any:
    """Return what is bfloat16 as float32, and all else as it is."""
    coarse = isinstance(outputs, Tensor) and outputs.dtype == torch.bfloat16
    return outputs.float() if coarse else outputs


class _Built:
    """A module as it was built, which it is again for every model.

    Its own code may put other tensors in the place of its own. A parameter that is a
    view of a vector has to stay that one; a buffer may be assigned (``self.mean = 0.9 *
    self.mean + ...``), but nobody else's model must find it there. Nor what the code
    keeps in attributes.

    Parameters
    ----------
    module : nn.Module
        Its parameters, gradients and buffers are in their places.
    ordered : Sequence[str]
        The parameters whose gradients are asked for.
    """

    def __init__(self, module: nn.Module, ordered: Sequence[str]) -> None:
        self._module = module
        self._parameters = {name: _Place.of(p) for name, p in module.named_parameters()}
        # Buffers that no model has begin anew with each; and so do attributes.
        self._kept = set(module.state_dict())
        self._others = [
            (buffer, buffer.clone(), buffer._version)
            for name, buffer in module.named_buffers()
            if name not in self._kept
        ]
        # What each module has by name, now and when it was built.
        self._attributes: list[_Names] = []
        self._registered: list[_Names] = []
        for path, part in module.named_modules():
            for kind in ("_parameters", "_modules", "_buffers", ""):
                now = getattr(part, kind) if kind else vars(part)
                if isinstance(now, dict):  # TorchScript has them elsewhere.
                    names = _Names(path, kind, now, dict(now))
                    (self._registered if kind else self._attributes).append(names)
        # Most have no layers or no tensors of their own; they seldom get any.
        self._empty = [names.now for names in self._registered if not names.now]
        self._filled = [names for names in self._registered if names.now]
        self._gradients = [self._parameters[name].grad for name in ordered]
        self._versions = [0] * len(ordered)

    def fresh_gradients(self) -> list[bool]:
        """Tell which parameters' gradients have changed since this was asked last."""
        before = self._versions
        self._versions = [0 if g is None else g._version for g in self._gradients]
        pairs = zip(self._versions, before, strict=True)
        return [now != then for now, then in pairs]

    def reset(self) -> None:
        """Put everything back in its place, for another model."""
        for names in (*self._attributes, *self._changed()):
            if not names.same():
                names.now.clear()
                names.now.update(names.then)
        for place in self._parameters.values():
            place.restore()
        for k, (buffer, values, version) in enumerate(self._others):
            if buffer._version != version:
                buffer.copy_(values)
                self._others[k] = buffer, values, buffer._version

    def collect(self) -> None:
        """Take assigned buffers over into the vectors."""
        for names in self._changed():
            if names.kind == "_buffers":
                self._take(names)
            else:
                every = names.now.keys() | names.then.keys()
                self._refuse(names.named(n) for n in every if names.replaced(n))
        for name, place in self._parameters.items():
            if not place.is_held():
                raise ClientError(
                    f"model: its code gave '{name}' other memory, as '.data = ...' "
                    "does, and training does not reach that. Change a parameter in "
                    "place, as '.data.copy_(...)' does."
                )

    def _changed(self) -> list[_Names]:
        """Return whose layers or tensors are not those that were there."""
        looked_at = self._registered if any(self._empty) else self._filled
        return [names for names in looked_at if not names.same()]

    def _take(self, names: _Names) -> None:
        """Copy the values of a module's buffers to where they belong."""
        new = names.now.keys() - names.then.keys()
        if new:  # A cache, or something that the server's model does not have?
            kept = set(self._module.state_dict())
            self._refuse(kept.intersection(map(names.named, new)))
        for name, own in names.then.items():
            if names.named(name) not in self._kept or not names.replaced(name):
                continue
            found = names.now.get(name)
            kind = own.shape, own.dtype
            if not isinstance(found, Tensor) or (found.shape, found.dtype) != kind:
                raise ClientError(
                    f"model: its code assigned {_describe(found)} to the buffer "
                    f"'{names.named(name)}', which is {_describe(own)}. Assign one of "
                    "the same shape and dtype."
                )
            own.copy_(found.detach())
            names.now[name] = own

    @staticmethod
    def _refuse(names: Iterable[str]) -> None:
        """Refuse what the server's model would not have, or training not reach."""
        for name in sorted(names):
            raise ClientError(
                f"model: its code makes, replaces or removes '{name}' while it runs, "
                "and training does not reach that. Make it once, in '__init__'."
            )


class _Names(NamedTuple):
    """What a module has by name: tensors, layers, or attributes.

    Attributes
    ----------
    path : str
        The module's place in the whole model.
    kind : str
        What PyTorch calls them; empty for attributes.
    now, then : dict[str, Any]
        The module's own dictionary, and what was in it.
    """

    path: str
    kind: str
    now: dict[str, Any]
    then: dict[str, Any]

    def named(self, name: str) -> str:
        """Return a name in the whole model."""
        return f"{self.path}.{name}" if self.path else name

    def replaced(self, name: str) -> bool:
        """Tell whether there is something else under a name."""
        return self.now.get(name) is not self.then.get(name)

    def same(self) -> bool:
        """Tell whether they are the same objects under the same names."""
        now, then = self.now, self.then
        if self.kind in ("_parameters", "_buffers"):
            same = now.keys() == then.keys()
            return same and all(map(is_, now.values(), then.values()))
        try:
            return now == then  # Which looks first whether they are the same objects.
        except Exception:  # Such as two tensors, which are not just equal or not.
            return False


@dataclass
class _Place:
    """A parameter, and the memory and the gradient that it has in our vectors."""

    parameter: Tensor
    values: Tensor
    pointer: int
    grad: Tensor | None

    @classmethod
    def of(cls, parameter: Tensor) -> Self:
        """Take note of where a parameter is."""
        if parameter.grad is not None:
            # By `data` it has a version of its own, which tells when it changes.
            parameter.grad = parameter.grad.data
        values = parameter.data
        return cls(parameter, values, values.data_ptr(), parameter.grad)

    def is_held(self) -> bool:
        """Tell whether the parameter still has them."""
        there = self.parameter.data_ptr() == self.pointer
        return there and self.parameter.grad is self.grad

    def restore(self) -> None:
        """Let the parameter have them again."""
        if not self.is_held():
            self.parameter.data = self.values
            self.parameter.grad = self.grad


def _describe(value: Any) -> str:
    """Return what a message calls the content of a buffer."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {list(value.shape)}"
