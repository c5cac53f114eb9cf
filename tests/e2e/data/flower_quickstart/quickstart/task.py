"""The model and the data."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for images of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        return self.out(self.dropout(torch.relu(self.hidden(x))))


def load_data(partition_id, num_partitions, batch_size):
    """Load the images of a partition, to train with and to test with."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    mine = torch.utils.data.Subset(data, range(partition_id, len(data), num_partitions))
    cut = len(mine) * 4 // 5
    train = torch.utils.data.Subset(mine, range(cut))
    test = torch.utils.data.Subset(mine, range(cut, len(mine)))
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(test, batch_size=batch_size)


def train(net, loader, epochs, lr):
    """Train the model, and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net, loader):
    """Return the mean loss and the accuracy."""
    net.eval()
    loss = correct = 0.0
    with torch.no_grad():
        for images, labels in loader:
            logits = net(images)
            loss += nn.functional.cross_entropy(logits, labels).item()
            correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(loader), correct / len(loader.dataset)
