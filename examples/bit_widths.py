"""Calibration against fine-tuning of MC dropout at few bits: python examples/bit_widths.py"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import bqnn


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> nn.Module:
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def nll(net: nn.Module, x: Tensor, y: Tensor) -> float:
    samples = bqnn.predictive(net, x, num_samples=20)
    return F.nll_loss(samples.softmax(-1).mean(0).log(), y).item()


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    rows, test = train_test_split(torch.arange(len(x)), test_size=0.25, random_state=0)

    layers = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Dropout(0.2), nn.Linear(100, 10))
    net = train(bqnn.to_mcdropout(layers), x[rows], y[rows], epochs, lr=1e-2)
    print(f"float                    test NLL {nll(net, x[test], y[test]):.3f}")
    for bits in (4, 3, 2):
        spec = bqnn.QuantSpec(weight_bits=bits)
        calibrated = bqnn.quantize(net, [x[rows]], spec)
        tuned = train(bqnn.prepare_qat(net, spec), x[rows], y[rows], epochs=3, lr=1e-3)
        tuned = bqnn.convert(tuned)
        print(f"{bits} bits, calibrated, int8  test NLL {nll(calibrated, x[test], y[test]):.3f}")
        print(f"{bits} bits, fine-tuned, int8  test NLL {nll(tuned, x[test], y[test]):.3f}")


if __name__ == "__main__":
    main()
