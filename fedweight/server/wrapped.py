"""Strategies inside others, such as those that Flower's wrappers hold."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy


def inner_strategies(strategy: Strategy) -> dict[str, Strategy]:
    """Return the strategies that a strategy holds as attributes, by their names."""
    held = vars(strategy).items()
    return {name: value for name, value in held if isinstance(value, Strategy)}


def with_inner(strategy: Strategy) -> list[Strategy]:
    """Return a strategy and all that are inside it, each once, the outer ones first."""
    found = [strategy]
    for one in found:  # It grows meanwhile.
        new = inner_strategies(one).values()
        found += [inner for inner in new if not any(inner is o for o in found)]
    return found
