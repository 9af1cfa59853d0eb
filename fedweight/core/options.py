"""The options of whatever a user picks by name: which there are, and what fits.

They are the annotated fields of a dataclass or the annotated parameters of a function,
read by pydantic, so that nothing states them twice::

    def dirichlet(labels, num_clients, rng, *, alpha: Annotated[float, Gt(0)] = 0.3):

Numbers are taken strictly: a text is no number, and neither is ``True``. Scalars and
arrays of NumPy, and lists where tuples are asked for, are taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from .annotations import (
    bare,
    choices,
    described,
    metadata,
    out_of_range,
    plain_value,
    strict,
)
from .errors import ConfigurationError, FedweightError, closest
from .registry import Registry, check_callable, make, signature_of
from .settings import kebab, toml_value
from .texts import shown

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# The name under which a function that takes any option (**options) says so.
ANY = "**"

# Marks, in ``Annotated``, what the library fills in and a file cannot.
GIVEN = "given by the library"


# What annotations say: to read them takes a millisecond, and a run asks often.
_KNOWN: WeakKeyDictionary[Callable[..., Any], dict[str, Option]] = WeakKeyDictionary()


@dataclass(frozen=True)
class InFile:
    """Marks, in ``Annotated``, that a simulation file has another default."""

    default: Any


@dataclass(frozen=True)
class ByName:
    """Marks, in ``Annotated``, an object that a file picks by its name.

    A file has the name, or a table of ``name`` and options, such as ``inner = {name =
    "focal", gamma = 1.0}``.

    Parameters
    ----------
    registry : Registry
        The names, beside ``"module:attribute"``.
    """

    registry: Registry

    @property
    def allowed(self) -> str:
        """What fits, in words."""
        return f"the name of one ({self.registry.kind}), or a table with 'name' in it"

    def table(self, where: str, value: Any) -> dict[str, Any]:
        """Return what a file says of an object, with all defaults.

        Raises
        ------
        ConfigurationError
            If there is no such name, or an option is unknown, missing or does not fit.
        """
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise ConfigurationError(
                f"{where} must be {self.allowed}, got {shown(value)}."
            )
        try:
            chosen = self.registry.resolve(table["name"])
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from None
        what = f"{where} '{table['name']}'"
        check_callable(what, chosen, "Class(**options)", 0)
        options = {k: o.in_file for k, o in options_of(chosen).items() if not o.given}
        given = {key: v for key, v in table.items() if key != "name"}
        own = resolve_options(where, options, given, {"name"})
        return {"name": table["name"], **own}

    def made(self, where: str, value: str | Mapping[str, Any]) -> Any:
        """Return the object that a name, or a table, stands for."""
        name, *options = self.table(where, value).items()
        arguments = {key.replace("-", "_"): v for key, v in options}
        chosen = self.registry.resolve(name[1])
        return make(f"{where} '{name[1]}'", lambda: chosen(**arguments))

    def written(self, made: Any) -> dict[str, Any]:
        """Return what a file says of an object that was made of its options."""
        options = options_of(type(made))
        values = {
            n: o.written(getattr(made, n)) for n, o in options.items() if not o.given
        }
        own = {kebab(n): value for n, value in values.items() if value is not None}
        return {"name": self.registry.name_of(type(made)), **own}


# A count that no run reaches in a lifetime can only be a mistake.
MOST = 2**31 - 1

# What pydantic calls a value of another kind than is asked for ends so.
_KINDS = (
    *("_type", "_error", "_required", "is_instance_of", "_parsing", "missing"),
    "sequence_str",
)

# What pydantic calls a number beyond the bounds.
_BEYOND = frozenset(
    {
        *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
        "finite_number",
    }
)


@dataclass(frozen=True)
class Option:
    """A parameter of something picked by name.

    Attributes
    ----------
    default : Any
        ``inspect.Parameter.empty`` where there is none.
    annotation : Any
        What fits: a type, perhaps ``Annotated`` with bounds.
    """

    default: Any
    annotation: Any

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @cached_property
    def given(self) -> bool:
        """Whether the library fills it in, and a file cannot."""
        return GIVEN in metadata(self.annotation)

    @cached_property
    def in_file(self) -> Option:
        """The same with the default that a simulation file has."""
        for mark in metadata(self.annotation):
            if isinstance(mark, InFile):
                return dataclasses.replace(self, default=mark.default)
        if self.by_name is not None and not self.required:
            return dataclasses.replace(self, default=self.written(self.default))
        return self

    @cached_property
    def by_name(self) -> ByName | None:
        """How a file picks it, where it is an object."""
        marks = metadata(self.annotation)
        return next((mark for mark in marks if isinstance(mark, ByName)), None)

    def written(self, value: Any) -> Any:
        """Return a value as a simulation file has it."""
        named = self.by_name is not None and not isinstance(value, str | Mapping)
        return self.by_name.written(value) if self.by_name and named else value

    @property
    def meaning(self) -> str:
        """What the annotation says that it means; empty where it says nothing."""
        infos = (m for m in metadata(self.annotation) if isinstance(m, FieldInfo))
        return next((info.description for info in infos if info.description), "")

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values to choose from, where they are listed."""
        return tuple(choices(self.annotation))

    @cached_property
    def allowed(self) -> str:
        """What fits, in words, such as "a number in [0, 1)"."""
        return self.by_name.allowed if self.by_name else described(self.annotation)

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """What pydantic makes of the annotation."""
        taken = ConfigDict(arbitrary_types_allowed=True)
        try:
            return TypeAdapter(strict(self.annotation), config=taken)
        except (
            PydanticUserError
        ):  # A type that has a configuration of its own, or none.
            return TypeAdapter(Any)

    def json_schema(self) -> dict[str, Any]:
        """Return what fits as JSON schema; anything where it cannot say that."""
        if self.by_name:
            named = {"type": "object", "required": ["name"]}
            return {"anyOf": [{"type": "string"}, named]}
        try:
            return self.adapter.json_schema()
        except PydanticUserError:
            return {}

    def checked(
        self,
        where: str,
        value: Any,
        error: type[FedweightError] = ConfigurationError,
    ) -> Any:
        """Return a value as the annotation wants it, or raise if it does not fit.

        Parameters
        ----------
        where : str
            How the message calls it, such as ``"partition.alpha"``.
        value : Any
            What the user gave.
        error : type[FedweightError]
            What is raised.

        Examples
        --------
        >>> from typing import Annotated
        >>> from annotated_types import Gt
        >>> alpha = Option(0.3, Annotated[float, Gt(0)])
        >>> alpha.checked("alpha", 0.5)
        0.5
        >>> alpha.checked("alpha", -1.0)
        Traceback (most recent call last):
        fedweight.core.errors.ConfigurationError: alpha must be in (0, inf), got -1.0.
        """
        if bare(self.annotation) is Any:
            return value
        if self.by_name and isinstance(value, str | Mapping):
            value = self.by_name.made(where, value)
        given = value.item() if isinstance(value, np.generic) else value
        with contextlib.suppress(ValidationError, TypeError):
            return self.adapter.validate_python(given)
        try:
            return self.adapter.validate_python(plain_value(value))
        except ValidationError as problem:
            raise error(self._worded(where, value, problem)) from None
        except TypeError:  # A protocol that says nothing of values, or the like.
            return value

    def _worded(self, where: str, value: Any, error: ValidationError) -> str:
        problems = error.errors(include_url=False, include_input=False)
        beyond = any(p["type"] in _BEYOND for p in problems)
        if beyond and isinstance(value, int | float | np.number):
            said = out_of_range(where, value, self.annotation)
            if said:
                return said
        near = closest(str(value), map(str, self.choices)) if self.choices else ""
        wanted = self.allowed if beyond else described(bare(self.annotation))
        why = [p["msg"] for p in problems if not p["type"].endswith(_KINDS)]
        because = (
            f" ({why[0]})" if len(problems) == len(why) == 1 and not beyond else ""
        )
        return f"{where} must be {wanted}{because}, got {shown(value)}.{near}"


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the fields of a dataclass, or the parameters of a function or class.

    Keyword arguments typed by a ``TypedDict`` (``**arguments: Unpack[...]``) count
    as parameters without a default of their own. Untyped ones stand for those of the
    next base class; where there is none, :data:`ANY` is among the names.

    Raises
    ------
    ConfigurationError
        If it does not tell its parameters, as much that is written in C does not.
    """
    if not isinstance(function, type | types.FunctionType):
        return _parameters(function)
    if function not in _KNOWN:
        _KNOWN[function] = _options(function)
    return dict(_KNOWN[function])


def _options(function: Callable[..., Any]) -> dict[str, Option]:
    if not isinstance(function, type):
        return _parameters(function)
    if dataclasses.is_dataclass(function) and _is_generated(function.__init__):
        return _fields(function)
    makers = [
        vars(base)["__init__"]
        for base in function.__mro__[:-1]
        if "__init__" in vars(base)
    ]
    options: dict[str, Option] = {}
    for init in makers:
        options.pop(ANY, None)
        _, *inherited = _parameters(init).items()  # the first is self
        options |= {name: o for name, o in inherited if name not in options}
        if ANY not in options:
            break
    return options


def _is_generated(init: Any) -> bool:
    """Tell whether a dataclass wrote an ``__init__``, and not its author."""
    code = getattr(inspect.unwrap(init), "__code__", None)
    return code is not None and code.co_filename == "<string>"


def _fields(cls: type) -> dict[str, Option]:
    hints = _hints(cls)
    options = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        if field.init:
            options[field.name] = Option(default, hints[field.name])
    return options


def _hints(annotated: Any) -> dict[str, Any]:
    """Return what annotations stand for, but for those with names that are unknown.

    Such are names that a module imports for types only.
    """
    with contextlib.suppress(NameError, TypeError, AttributeError):
        return typing.get_type_hints(annotated, include_extras=True)
    hints: dict[str, Any] = {}
    for one in reversed(getattr(annotated, "__mro__", (annotated,))):
        for name, hint in getattr(one, "__annotations__", {}).items():
            hints[name] = Any
            alone = types.SimpleNamespace(__annotations__={name: hint})
            names = vars(sys.modules[one.__module__])
            with contextlib.suppress(NameError, TypeError, AttributeError):
                hints |= typing.get_type_hints(alone, names, include_extras=True)
    return hints


def _parameters(function: Callable[..., Any]) -> dict[str, Option]:
    hints = _hints(function)
    options: dict[str, Option] = {}
    for name, parameter in signature_of(function).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_KEYWORD:
            kinds = typing.get_args(hint)
            for arguments in kinds:
                own = typing.get_type_hints(arguments, include_extras=True)
                for key, kind in own.items():
                    options.setdefault(key, Option(None, kind))
            if not kinds:
                options[ANY] = Option(None, Any)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            if hint is Any and isinstance(parameter.default, int | float):
                hint = type(parameter.default)
            options[name] = Option(parameter.default, hint)
    return options


def check_options(
    what: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    given: Collection[str],
    error: type[FedweightError] = ConfigurationError,
) -> dict[str, Any]:
    """Return options as ``function`` wants them, or raise where it takes them not.

    Parameters
    ----------
    what : str
        How the message calls it, such as ``"model 'mlp'"``.
    function : callable
        Its parameters, but for those in ``given``, are the options. Each must be what
        the annotations say, or else the type of its default where that is a flag or a
        number.
    options : Mapping[str, Any]
        What the user gave.
    given : Collection[str]
        Parameters that the library fills in itself.
    error : type[FedweightError]
        What is raised.

    Examples
    --------
    >>> def mlp(num_classes, *, hidden=64): ...
    >>> check_options("model 'mlp'", mlp, {"hiden": 8}, ["num_classes"])
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: model 'mlp' has no option 'hiden'. \
Did you mean 'hidden'? It takes hidden.
    """
    named = {k: o for k, o in options_of(function).items() if k not in given}
    any_other = named.pop(ANY, None) is not None
    for option in options:
        if not any_other and option not in named:
            takes = ", ".join(named) or "none"
            near = closest(option, named)
            raise error(f"{what} has no option '{option}'.{near} It takes {takes}.")
    for name, taken in named.items():
        if taken.required and name not in options:
            raise error(f"{what} needs the option '{name}'.")
    return {
        name: named[name].checked(f"{what}: {name}", value, error)
        if name in named
        else value
        for name, value in options.items()
    }


def validated(function: F) -> F:
    """Have the keyword-only parameters of a function checked by their annotations.

    Raises :class:`ConfigurationError` for what does not fit. Defaults are not checked.

    Examples
    --------
    >>> from typing import Annotated
    >>> from annotated_types import Gt
    >>> @validated
    ... def scale(x, *, factor: Annotated[float, Gt(0)] = 1.0):
    ...     return factor * x
    >>> scale(3, factor=2)
    6.0
    >>> scale(3, factor=0)
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: factor must be in (0, inf), got 0.
    """
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    options: dict[str, Option] = {}

    @functools.wraps(function)
    def checking(*arguments: Any, **keywords: Any) -> Any:
        if not options:
            known = options_of(function)
            options.update({name: known[name] for name in names})
        for name in keywords.keys() & options.keys():
            keywords[name] = options[name].checked(name, keywords[name])
        return function(*arguments, **keywords)

    return typing.cast(F, checking)


def checked_fields(cls: type[T]) -> type[T]:
    """Have the fields of a dataclass checked by their annotations, as a decorator.

    Examples
    --------
    >>> @checked_fields
    ... @dataclass(frozen=True)
    ... class Step:
    ...     size: float = 1.0
    >>> Step(size=2).size
    2.0
    >>> Step(size="2")
    Traceback (most recent call last):
    fedweight.core.errors.ConfigurationError: size must be a number, got '2'.
    """
    init: Callable[..., None] = cls.__init__
    generated = _is_generated(init)
    options: dict[str, Option] = {}

    @functools.wraps(init)
    def checking(self: Any, *arguments: Any, **keywords: Any) -> None:
        if not options:
            options.update(_fields(cls))
        for name in keywords if generated else ():
            if name not in options:
                raise TypeError(
                    f"{cls.__name__} has no option '{name}'.{closest(name, options)} "
                    f"It takes {', '.join(options)}."
                )
        if generated:
            arguments = _by_place(cls, options, arguments)
        keywords = {
            name: options[name].checked(name, value) if name in options else value
            for name, value in keywords.items()
        }
        init(self, *arguments, **keywords)

    cls.__init__ = checking  # type: ignore[method-assign]
    return cls


def _by_place(
    cls: type, options: Mapping[str, Option], arguments: Sequence[Any]
) -> tuple[Any, ...]:
    """Check what a dataclass is given by position."""
    places = [f.name for f in dataclasses.fields(cls) if f.init and not f.kw_only]
    if len(arguments) > len(places):
        own = [name for name in vars(cls).get("__annotations__", {}) if name in options]
        some = [*own, *options][0]
        raise TypeError(
            f"{cls.__name__} takes {len(places)} options by position, got "
            f"{len(arguments)}. Name them, as in {cls.__name__}({some}=...)."
        )
    pairs = zip(places, arguments, strict=False)
    return tuple(options[name].checked(name, value) for name, value in pairs)


def resolve_options(
    where: str,
    options: Mapping[str, Option],
    given: Mapping[str, Any],
    fixed: Collection[str] = (),
) -> dict[str, Any]:
    """Check the keys that a file gives beside its fixed ones, and fill in defaults.

    Parameters
    ----------
    where : str
        How a message calls the table, such as ``"data"``.
    options : Mapping[str, Option]
        What there is, by its name in Python; see :func:`options_of`.
    given : Mapping[str, Any]
        What the file says, by keys in which a hyphen may stand for an underscore.
    fixed : Collection[str]
        Keys of the table that are no options.

    Returns
    -------
    dict
        Keys in kebab-case; without those whose default no file can hold.

    Raises
    ------
    ConfigurationError
        If a key is unknown, missing, or does not fit.

    Examples
    --------
    >>> def split(dataset, *, alpha: float = 0.5, min_size: int = 0): ...
    >>> taken = {k: o for k, o in options_of(split).items() if k != "dataset"}
    >>> resolve_options("partition", taken, {"min-size": 3})
    {'alpha': 0.5, 'min-size': 3}
    """
    options = dict(options)
    any_key = options.pop(ANY, None) is not None
    for key in given:
        if not any_key and key not in fixed and key.replace("-", "_") not in options:
            allowed = [*fixed, *map(kebab, options)]
            raise ConfigurationError(
                f"{where} has no key {shown(key)}.{closest(key, allowed)} "
                f"It takes {', '.join(allowed)}."
            )
    resolved = {}
    for name, option in options.items():
        key = kebab(name)
        if key in fixed:
            continue
        written = next((k for k in (key, name) if given.get(k) is not None), None)
        value = option.default if written is None else given[written]
        if value is inspect.Parameter.empty:
            raise ConfigurationError(f"{where} needs the key '{key}'.")
        if written is not None:
            if option.by_name:
                value = option.by_name.table(f"{where}.{key}", value)
            else:
                value = option.checked(f"{where}.{key}", value)
            resolved[key] = toml_value(f"{where}.{key}", value)
        elif _is_toml(value):
            resolved[key] = toml_value(f"{where}.{key}", value)
    known = {*fixed, *options}
    others = {
        key: value
        for key, value in given.items()
        if value is not None and not known & {key, key.replace("-", "_")}
    }
    return resolved | others


def _is_toml(value: Any) -> bool:
    """Tell whether a default can be written down; others stay the function's own."""
    if isinstance(value, list | tuple):
        return all(_is_toml(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_toml(v) for k, v in value.items())
    return isinstance(value, bool | int | float | str)
