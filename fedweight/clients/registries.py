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
        keys.GROUP_COUNTS: f"{_PROBES}:group_counts",
        keys.GROUP_LOSSES: f"{_PROBES}:group_losses",
        keys.MINUS_ERROR: "fedweight.strategies.fedce:minus_error",
        "agnostic-sums": "fedweight.strategies.agnostic_fair:agnostic_sums",
        keys.TRANSITION_SUMS: (
            "fedweight.clients.objectives.noisy_labels:transition_sums"
        ),
        keys.NORMALISER: "fedweight.strategies.fednova:normaliser",
    },
)

QUERIES = Registry(
    "query",
    {
        keys.LABEL_COUNTS: "fedweight.clients.queries:label_counts",
        keys.GROUP_COUNTS: "fedweight.clients.queries:group_counts",
        keys.FEATURE_SUMS: "fedweight.clients.queries:feature_sums",
        "discriminate": "fedweight.strategies.fedcollab:discriminate",
    },
)
