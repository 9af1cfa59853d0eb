"""fedweight's local grid with many clients, for scale.py.

Started with a folder, the number of clients and the cohort. The clients' data are
views of a job's few examples, so the memory is what the library itself needs.
"""

import sys

import fedweight

from .job import MODELS
from .local import run
from .talk import start


def main() -> None:
    """Run rounds as told."""
    talk, job = start(f"fedweight {fedweight.__version__}")
    run(
        talk,
        model=MODELS[job.work.model],
        first=job.model(),
        x=job.x,
        y=job.y,
        clients=int(sys.argv[2]),
        cohort=int(sys.argv[3]),
        engine="local",
        workers=None,
    )


if __name__ == "__main__":
    main()
