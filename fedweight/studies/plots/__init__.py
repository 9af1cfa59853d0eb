"""Figures of a run or a comparison, for a notebook, a paper or the report.

Each is a chart of `Vega-Altair <https://altair-viz.github.io>`_: it shows itself in a
notebook, can be zoomed and asked for numbers there, and ``chart.save("weights.png")``
or ``.svg`` writes it without a browser.
"""

from typing import TYPE_CHECKING

from . import groups
from .clients import labels, own_models, ranked
from .over_rounds import (
    called,
    client_measure,
    clients_by_round,
    measures,
    over_rounds,
    own_numbers,
    personal,
    recorded,
)
from .weights import against_data, heatmap, reach

if TYPE_CHECKING:
    from .style import Chart as Chart

__all__ = [
    "against_data",
    "called",
    "client_measure",
    "clients_by_round",
    "groups",
    "heatmap",
    "labels",
    "measures",
    "over_rounds",
    "own_models",
    "own_numbers",
    "personal",
    "ranked",
    "reach",
    "recorded",
]
