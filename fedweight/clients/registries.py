"""What clients measure and answer by name; nothing is imported until it is used."""

from __future__ import annotations

from ..core.registry import Registry
from ..messages import keys

_PROBES = "fedweight.clients.probes"

PROBES = Registry(
    "probe",
    {
        keys.LABEL_COUNTS: f"{_PROBES}:label_counts",
        keys.LOSS_BEFORE: f"{_PROBES}:loss_before",
        keys.LOSS_AFTER: f"{_PROBES}:loss_after",
        keys.ACCURACY_BEFORE: f"{_PROBES}:accuracy_before",
        keys.ACCURACY_AFTER: f"{_PROBES}:accuracy_after",
        keys.HELD_OUT_LOSS_BEFORE: f"{_PROBES}:held_out_loss_before",
        keys.HELD_OUT_LOSS_AFTER: f"{_PROBES}:held_out_loss_after",
        keys.HELD_OUT_ACCURACY_BEFORE: f"{_PROBES}:held_out_accuracy_before",
        keys.HELD_OUT_ACCURACY_AFTER: f"{_PROBES}:held_out_accuracy_after",
        keys.MINUS_ERROR: "fedweight.strategies.fedce:minus_error",
        keys.NORMALISER: "fedweight.strategies.fednova:normaliser",
    },
)

QUERIES = Registry(
    "query",
    {
        keys.LABEL_COUNTS: "fedweight.clients.queries:label_counts",
        "discriminate": "fedweight.strategies.fedcollab:discriminate",
    },
)
