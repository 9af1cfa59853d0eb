"""The columns of ``rounds.csv`` and ``clients.csv``."""

from ..metrics.measures import MEASURES

# What may be measured besides loss and accuracy: there where it is.
_MEASURES = {
    name: name.replace("-", "_")
    for name in MEASURES
    if name not in ("loss", "accuracy", "confusion")
}

# What clients measure of a global model that a decision may rest on, by key.
DECISIVE = {f"evaluate-{name}": name for name, one in MEASURES.items() if one.sign}

# What may be measured on the test set besides loss and accuracy.
TESTED = tuple(f"test_{column}" for column in _MEASURES.values())

# What the server measures on what it chooses by, where it has that.
VALIDATED = tuple(
    f"validation_{column}" for column in ("loss", "accuracy", *_MEASURES.values())
)

ROUND_COLUMNS = (
    "round",
    "status",
    "reason",
    "asked",
    "ok",
    "rejected",
    "failed",
    "missing",
    "dropped",
    "effective_clients",
    "train_loss",
    "train_accuracy",
    "evaluate_loss",
    "evaluate_accuracy",
    *(f"evaluate_{column}" for column in _MEASURES.values()),
    "test_loss",
    "test_accuracy",
    *TESTED,
    *VALIDATED,
    "client_accuracy_mean",
    "client_accuracy_std",
    "client_accuracy_worst10",
    "client_accuracy_best10",
    "bytes_down",
    "bytes_up",
)

CLIENT_COLUMNS = (
    "round",
    "client",
    "name",  # only where some client has one
    "status",
    "reason",
    "weight",
    "examples",
    "steps",
    "train_loss",
    "train_accuracy",
    "held_out_examples",
    "loss",
    "accuracy",
    *_MEASURES.values(),
    "bytes_down",
    "bytes_up",
)

# Of ``personal.csv``: what clients made of the last global model for themselves.
PERSONAL_COLUMNS = (
    "client",
    "name",  # only where some client has one
    "status",
    "reason",
    "held_out_examples",
    "loss",
    "accuracy",
    "personal_loss",
    "personal_accuracy",
    "bytes_down",
)

# Those that are there only where something brings them; of accuracies, where a
# prediction is not simply right or wrong.
OPTIONAL = frozenset(
    {
        *("name", *VALIDATED),
        *(
            f"{what}{c}"
            for c in _MEASURES.values()
            for what in ("", "evaluate_", "test_")
        ),
    }
)
ACCURACIES = frozenset(
    column for column in (*ROUND_COLUMNS, *CLIENT_COLUMNS) if "accuracy" in column
)

# A client's metrics whose column is not simply the name in snake_case.
CLIENT_NAMES = {
    "num-examples": "examples",
    "num-steps": "steps",
    "evaluate-num-examples": "held_out_examples",
    "evaluate-loss": "loss",
    "evaluate-accuracy": "accuracy",
    "evaluate-personal-loss": "personal_loss",
    "evaluate-personal-accuracy": "personal_accuracy",
    **{f"evaluate-{name}": column for name, column in _MEASURES.items()},
}

COUNTS = {"examples", "steps", "held_out_examples"}
