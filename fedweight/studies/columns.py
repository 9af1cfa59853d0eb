"""The columns of ``rounds.csv`` and ``clients.csv``."""

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
    "test_loss",
    "test_accuracy",
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
    "bytes_down",
    "bytes_up",
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
}

COUNTS = {"examples", "steps", "held_out_examples"}
