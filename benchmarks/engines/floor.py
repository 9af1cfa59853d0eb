"""The floor: a loop written by hand, one process, one thread.

What training costs if nothing is between PyTorch and the clients' data. On a GPU the
loop is as eager as on a CPU; model, examples and orders lie on the device from the
first round on, and nothing is copied or waited for within one.
"""

import torch
import torch.nn.functional as F

from .job import flat
from .work import BATCH, LEARNING_RATE, SAMPLES
from .worker import start


def main() -> None:
    """Run rounds as told."""
    worker, job = start(f"PyTorch {torch.__version__}")
    torch.set_num_threads(1)
    module = job.model().to(job.device).train()
    parameters: list[torch.Tensor] = list(module.parameters())
    current = [p.detach().clone() for p in parameters]
    total = [torch.zeros_like(p) for p in current]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE)
    examples = job.cohort * SAMPLES
    round = 0
    while worker.next_round(lambda: flat([p.cpu() for p in current])):
        round += 1
        torch._foreach_zero_(total)
        for k in range(job.cohort):
            with torch.no_grad():
                torch._foreach_copy_(parameters, current)
            x, y = job.shuffled(round, k)
            for first in range(0, SAMPLES, BATCH):
                optimizer.zero_grad()
                logits = module(x[first : first + BATCH])
                loss = F.cross_entropy(logits, y[first : first + BATCH])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters, alpha=SAMPLES / examples)
        torch._foreach_copy_(current, total)


if __name__ == "__main__":
    main()
