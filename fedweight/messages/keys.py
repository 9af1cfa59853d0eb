"""Names of the records and metrics that server and clients exchange.

Kebab-case, as Flower writes them. One name for one thing: both sides import it
from here.
"""

from typing import Final

# Records of a message.
ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
PROFILE: Final = "profile"
SHARED: Final = "shared"

# What the server tells a client in the config record.
ROUND: Final = "server-round"
REQUEST: Final = "request"
QUERY: Final = "query"
LOCAL_EPOCHS: Final = "local-epochs"
PROXIMAL_MU: Final = "proximal-mu"
LEARNING_RATE: Final = "learning-rate"
CLASS_TOTALS: Final = "class-totals"
COEFFICIENT: Final = "coefficient"
GROUP: Final = "group"
GROUP_WEIGHTS: Final = "group-weights"
SCHEMA: Final = "schema"
BASE: Final = "base"
WRITTEN: Final = "written"
AFTER_ROUNDS: Final = "after-rounds"

# What it tells all of them alike, in the shared record: the names of the tensors that
# vectors of every parameter are of, and a mask, where every model of the run is 0.
TENSORS: Final = "tensors"
MASK: Final = "mask"

# What of it no strategy tells otherwise.
OF_THE_SERVER: Final = (
    *(ROUND, REQUEST, QUERY, SCHEMA, BASE),
    *(WRITTEN, AFTER_ROUNDS, TENSORS, MASK),
)

# What every reply to a train message reports.
NUM_EXAMPLES: Final = "num-examples"
TRAIN_LOSS: Final = "train-loss"
TRAIN_ACCURACY: Final = "train-accuracy"
NUM_STEPS: Final = "num-steps"

# What every reply to an evaluate message reports, besides num-examples: the accuracy
# where there is one, and the sums of fedweight.metrics where more is measured.
LOSS: Final = "loss"
ACCURACY: Final = "accuracy"
STATISTICS: Final = "statistics"

# Besides, where clients have personal models.
PERSONAL_LOSS: Final = "personal-loss"
PERSONAL_ACCURACY: Final = "personal-accuracy"

# What a strategy may ask for (the entries of `request`).
LABEL_COUNTS: Final = "label-counts"
LOSS_BEFORE: Final = "loss-before"
LOSS_AFTER: Final = "loss-after"
ACCURACY_BEFORE: Final = "accuracy-before"
ACCURACY_AFTER: Final = "accuracy-after"
HELD_OUT_LOSS_BEFORE: Final = "held-out-loss-before"
HELD_OUT_LOSS_AFTER: Final = "held-out-loss-after"
HELD_OUT_ACCURACY_BEFORE: Final = "held-out-accuracy-before"
HELD_OUT_ACCURACY_AFTER: Final = "held-out-accuracy-after"
MINUS_ERROR: Final = "minus-error"
NORMALISER: Final = "normaliser"
TRANSITION_SUMS: Final = "transition-sums"
GROUP_COUNTS: Final = "group-counts"
GROUP_LOSSES: Final = "group-losses"
FEATURE_SUMS: Final = "feature-sums"

# Why a client is dropped, where that is nobody's fault.
NO_EXAMPLES: Final = "it has no examples"
STRAGGLER: Final = "straggler"

# Why a model is refused, its client's or that of all, where training diverged.
NOT_FINITE: Final = "NaN or infinite values"

# How the reason begins of a client that has another frozen base than the server tells.
OTHER_BASE: Final = "its frozen tensors are not the server's"
