"""Bayes by Backprop in a plain training loop, on digits: python examples/training_loop.py"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import bqnn


def entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(-1)


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    y = torch.tensor(digits)
    train, test = train_test_split(torch.arange(len(x)), test_size=0.25, random_state=0)

    layers = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    net = bqnn.to_bayes(layers, prior_std=0.3)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            nll = F.cross_entropy(net(x[rows]), y[rows])
            loss = nll + 0.1 * bqnn.kl_divergence(net) / len(train)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    net.eval()
    integer = bqnn.quantize(net, [x[train]], bqnn.QuantSpec(weight_bits=4))
    for name, model in (("float", net), ("int8, 4-bit weights", integer)):
        digits_seen = bqnn.predictive(model, x[test], num_samples=20).softmax(-1)
        noise = bqnn.predictive(model, torch.rand(500, 64), num_samples=20).softmax(-1)
        error = (digits_seen.mean(0).argmax(-1) != y[test]).double().mean()
        print(
            f"{name}: test error {100 * error:.1f} %, predictive entropy "
            f"{entropy(digits_seen.mean(0)).mean():.3f} nats on digits, "
            f"{entropy(noise.mean(0)).mean():.3f} on noise"
        )


if __name__ == "__main__":
    main()
