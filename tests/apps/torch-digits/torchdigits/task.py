"""The network, the data and the training."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two layers and a norm, which has a whole number among its tensors."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 3)

    def forward(self, x):
        """Return the scores."""
        return self.last(torch.relu(self.norm(self.first(x))))


def load_data(partition: int, examples: int, batch: int) -> DataLoader:
    """Return a client's examples, in an order that is drawn."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(examples + 4 * partition, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch, shuffle=True)


def train(net: Net, loader: DataLoader, rate: float) -> float:
    """Train for an epoch; return the mean loss."""
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    total = 0.0
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def test(net: Net, loader: DataLoader) -> tuple[float, float]:
    """Return the loss and the accuracy."""
    net.eval()
    loss, right, number = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            scores = net(x)
            loss += nn.functional.cross_entropy(scores, y, reduction="sum").item()
            right += int((scores.argmax(1) == y).sum())
            number += len(x)
    return loss / number, right / number
