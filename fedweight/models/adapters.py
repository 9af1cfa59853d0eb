"""Adapters: few numbers that are trained beside a model that stays as it is.

Any model with linear layers takes them: ``[model] adapters = "lora"`` beside its name.
Parameters that are not trained are frozen: they do not travel, and no strategy sees
them.

References
----------
E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, "LoRA:
Low-Rank Adaptation of Large Language Models", ICLR, 2022.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import ConfigurationError, DataError, closest
from ..core.options import validated
from ..core.registry import Registry
from ..core.texts import listed, shown

ADAPTERS = Registry(
    "kind of adapters",
    {
        "lora": f"{__name__}:lora",
        "none": f"{__name__}:none",
    },
)

# The files of peft, and how it begins the names of tensors.
PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# What, where peft's configuration has it, changes what adapters add.
PEFT_OTHERWISE = (
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank addition: ``W = W_0 + (alpha / r) B A``.

    At first B is 0, and the layer gives what it gave without.

    Parameters
    ----------
    linear : nn.Linear
        ``W_0`` and the bias, which keep their names.
    rank : int
        r, 1 or more.
    alpha : float
        Above 0.
    averaged : str
        What a server averages; see :func:`lora`.

    Attributes
    ----------
    lora_a, lora_b : nn.Parameter
        A, ``[r, in]``, which begins Kaiming-uniform, and B, ``[out, r]``.

    Examples
    --------
    >>> layer = LoRALinear(nn.Linear(2, 2), rank=1, alpha=2.0)
    >>> with torch.no_grad():
    ...     _ = layer.lora_a.copy_(torch.tensor([[1.0, 2.0]]))
    ...     _ = layer.lora_b.copy_(torch.tensor([[3.0], [4.0]]))
    >>> layer.change().tolist()
    [[6.0, 12.0], [8.0, 16.0]]
    """

    def __init__(
        self, linear: nn.Linear, rank: int, alpha: float, averaged: str = "both"
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.averaged = rank, alpha, averaged
        weight = linear.weight.detach()
        self.lora_a = nn.Parameter(weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        # In evaluation PyTorch's transformer layers read the weight themselves, and
        # would miss what is added, unless a layer in them has a hook.
        self.register_forward_pre_hook(_called)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b``, ``[..., out]``."""
        low = nn.functional.linear(x, self.lora_a)
        added = nn.functional.linear(low, self.lora_b)
        return super().forward(x) + self.alpha / self.rank * added

    def change(self) -> Tensor:
        """Return what is added to the weight, ``(alpha / r) B A``, ``[out, in]``."""
        return self.alpha / self.rank * (self.lora_b @ self.lora_a).detach()


def _called(layer: nn.Module, inputs: Any) -> None:
    """Do nothing: a layer with a hook is called."""


def none(model: nn.Module) -> nn.Module:
    """Train the model itself."""
    return model


@validated
def lora(
    model: nn.Module,
    *,
    rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[float, Gt(0)] = 8.0,
    layers: Sequence[str] = (),
    trained: Sequence[str] = (),
    averaged: Literal["both", "b", "product"] = "both",
) -> nn.Module:
    """Train a product of two thin matrices beside each linear layer, and nothing else.

    Parameters
    ----------
    model : nn.Module
        Is changed: its linear layers become :class:`LoRALinear`, and all parameters
        that it had are frozen; buffers, such as running statistics, go on as they did.
        A layer of another class, even one derived from ``nn.Linear``, is none.
    rank : int
        r, the rank of what is added to a weight matrix.
    alpha : float
        What is added is multiplied by ``alpha / r``.
    layers : sequence of str
        The linear layers that get adapters, by name or by the last parts of it; by
        default all.
    trained : sequence of str
        Layers that are trained whole besides, such as the head, named likewise.
    averaged : {"both", "b", "product"}
        What clients train, and the server averages. The mean of ``B A`` is not the
        product of the means of B and of A, which is what ``both`` makes, as is usual;
        with ``b`` A stays as it began, the same for all, and the mean is exact. With
        ``product`` clients train both, and the server averages the products and takes
        factors of the nearest matrix of rank r, by a singular value decomposition.

    Notes
    -----
    Strategies see A and B as they see any parameters: distances and cosines are those
    of A and B, not of the weights that they make, and FedLAW's shrinking factor shrinks
    the adapters and not the model.
    """
    linear = {n: part for n, part in model.named_modules() if type(part) is nn.Linear}
    if not linear:
        raise ConfigurationError(
            "model.adapters: 'lora' needs a model with linear layers (nn.Linear), and "
            "this one has none. Choose another model, or 'none'."
        )
    parts = [n for n, part in model.named_modules() if n and [*part.parameters()]]
    whole = _named("trained", parts, trained)
    inside = {n for n in linear if any(f"{n}.".startswith(f"{w}.") for w in whole)}
    chosen = set(_named("layers", linear, layers) if layers else linear)
    if layers and chosen & inside:
        raise ConfigurationError(
            f"model.trained: '{min(chosen & inside)}' gets adapters, as model.layers "
            "says. Leave it out of one of the two."
        )
    for name in sorted(chosen - inside):
        part = linear[name]
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            raise ConfigurationError(
                f"model.layers: '{name}' has hooks, as torch.nn.utils.weight_norm "
                "makes some, which a layer with adapters would not have. Leave the "
                "layer out, or take the hooks away."
            )
    model.requires_grad_(False)
    made = {
        id(part): LoRALinear(part, rank, alpha, averaged)
        for name, part in linear.items()
        if name in chosen - inside
    }
    for layer in made.values():
        layer.lora_a.requires_grad_(averaged != "b")
    for name, part in [*model.named_modules(remove_duplicate=False)]:
        if name and id(part) in made:  # Perhaps in several places.
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, made[id(part)])
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    return made.get(id(model), model)


def factors_of(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of B and A of adapters whose products a server averages."""
    return [
        (f"{name}.lora_b".lstrip("."), f"{name}.lora_a".lstrip("."))
        for name, layer in _adapted(model)
        if layer.averaged == "product"
    ]


def _named(option: str, names: Collection[str], wanted: Sequence[str]) -> list[str]:
    """Return the names that end in what is wanted, whole parts of a name."""
    found: list[str] = []
    for end in wanted:
        some = [name for name in names if name == end or name.endswith(f".{end}")]
        if not some:
            raise ConfigurationError(
                f"model.{option}: there is no layer {shown(end)}."
                f"{closest(str(end), names)} There are {listed(names)}."
            )
        found += some
    return found


def save_peft(model: nn.Module, folder: str | Path, base: str = "") -> None:
    """Write the adapters of a model as peft does, for whoever uses that library.

    Parameters
    ----------
    model : nn.Module
        With adapters of :func:`lora`.
    folder : str or Path
        Is made. ``adapter_config.json`` and ``adapter_model.safetensors`` in it are
        replaced.
    base : str
        What the configuration calls the base model, such as a folder.

    Raises
    ------
    ConfigurationError
        If the model has no adapters, or they differ in rank or alpha.
    """
    layers = dict(_adapted(model))
    kinds = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(kinds) != 1:
        raise ConfigurationError(
            f"save_peft takes a model of one rank and alpha, got {shown(kinds)}. "
            "Make it with fedweight.models.build(..., adapters='lora')."
        )
    [(rank, alpha)] = kinds
    whole = _trained_whole(model)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(layers),
        "modules_to_save": list(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (place / PEFT_CONFIG).write_text(text, "utf-8")
    tensors = {name: t.detach().cpu().clone() for name, t in _in_peft(model).items()}
    save_file(tensors, place / PEFT_TENSORS, {"format": "pt"})


def load_peft(model: nn.Module, folder: str | Path) -> None:
    """Read adapters that peft or :func:`save_peft` wrote into a model.

    Parameters
    ----------
    model : nn.Module
        With adapters of the same rank and alpha on the same layers.
    folder : str or Path
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises
    ------
    DataError
        If a file is missing or spoilt, or is of other adapters; the message says which
        tensor.
    """
    place = Path(folder)
    try:
        config: Any = json.loads((place / PEFT_CONFIG).read_text("utf-8"))
        given = load_file(place / PEFT_TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{place} holds no adapters: {error}.") from None
    if not isinstance(config, dict):
        raise DataError(
            f"{place / PEFT_CONFIG} must hold an object, got {shown(config)}."
        )
    other = [name for name in PEFT_OTHERWISE if config.get(name)]
    if other:
        raise DataError(
            f"{place / PEFT_CONFIG} has '{other[0]}' as {shown(config[other[0]])}, by "
            "which adapters add something else than here. They cannot be read."
        )
    mine = _in_peft(model)
    if {n: t.shape for n, t in given.items()} != {n: t.shape for n, t in mine.items()}:
        odd = sorted(
            name
            for name in {*given, *mine}
            if name not in given
            or name not in mine
            or given[name].shape != mine[name].shape
        )
        raise DataError(
            f"{place / PEFT_TENSORS} is of other adapters: '{odd[0]}' is not the same "
            "here. Build the model with its rank and layers."
        )
    for _, layer in _adapted(model):
        if (layer.rank, layer.alpha) != (config.get("r"), config.get("lora_alpha")):
            raise DataError(
                f"{place / PEFT_CONFIG} says rank {shown(config.get('r'))} and alpha "
                f"{shown(config.get('lora_alpha'))}, the model has {layer.rank} and "
                f"{layer.alpha:g}. Build it with those."
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(given[name])


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, part in model.named_modules():
        if isinstance(part, LoRALinear):
            yield name, part


def _trained_whole(model: nn.Module) -> dict[str, nn.Module]:
    """Return the innermost modules that are trained and have no adapters, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if not isinstance(part, LoRALinear)
        and any(p.requires_grad for p in part.parameters(recurse=False))
    }


def _in_peft(model: nn.Module) -> Mapping[str, Tensor]:
    """Return what adapters are made of, under the names that peft gives it."""
    found: dict[str, Tensor] = {}
    for name, layer in _adapted(model):
        found[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_a
        found[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_b
    for name, part in _trained_whole(model).items():
        for own, parameter in part.named_parameters(recurse=False):
            found[f"{PEFT_PREFIX}{name}.{own}"] = parameter
    return found
