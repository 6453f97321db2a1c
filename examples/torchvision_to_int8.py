"""Quantize a Bayesian ResNet-18 of torchvision: python examples/torchvision_to_int8.py"""

import torch
import torchvision

import bqnn


def main() -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    net = bqnn.to_bayes(net, prior_std=0.1).eval()  # untrained: this example shows the calls
    images = torch.randn(16, 3, 32, 32)
    exact = bqnn.predictive(net, images, num_samples=4).softmax(-1).mean(0)
    for bits in (8, 4, 2):
        integer = bqnn.quantize(net, [images], bqnn.QuantSpec(weight_bits=bits))
        rounded = bqnn.predictive(integer, images, num_samples=4).softmax(-1).mean(0)
        distance = (exact - rounded).abs().sum(-1).mean() / 2
        print(f"{bits}-bit weights: total variation from float {distance:.4f}")


if __name__ == "__main__":
    main()
