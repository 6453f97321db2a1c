"""The Fisher information is the one that the Jacobian of the outputs gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.inference.likelihoods import Classification, Regression
from bqnn.layers.bayes import BayesConv2d, GaussianWeight, held_means, to_bayes
from bqnn.methods.fisher import fisher_diagonal
from bqnn.nets import MLP, LeNet, ResNet


class Twice(nn.Module):
    """Calls one layer twice, and on several vectors of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.relu(self.layer(x.reshape(len(x), 3, 4)))
        out: Tensor = self.layer(vectors.sum(1))[:, :3]
        return out


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=2, padding=(2, 1), groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, dilation=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP([3], [3], hidden_features=[16, 16]), (3,)),
    "lenet": (lambda: LeNet([1, 8, 8], [3], channels=(2, 3), hidden_features=5), (1, 8, 8)),
    "resnet": (lambda: ResNet([1, 8, 8], [3], width=2, blocks_per_stage=[1, 1]), (1, 8, 8)),
    "grouped": (grouped, (2, 8, 8)),
    "twice": (Twice, (12,)),
}


def by_jacobian(
    net: nn.Module, x: Tensor, factors: Callable[[Tensor], Tensor]
) -> dict[GaussianWeight, Tensor]:
    """Compute the diagonal row by row, and factor by factor."""
    layers = [module for module in net.modules() if isinstance(module, GaussianWeight)]
    sums = {layer: torch.zeros_like(layer.mean) for layer in layers}
    for row in x.split(1):
        with held_means(net):
            output = net(row)
        for factor in factors(output.detach()):
            along = (factor * output).sum()
            means = [layer.mean for layer in layers]
            for layer, gradient in zip(
                layers, torch.autograd.grad(along, means, retain_graph=True), strict=True
            ):
                sums[layer] += gradient.square()
    return sums


@pytest.mark.parametrize("name", NETS)
def test_it_is_that_of_the_jacobian(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = to_bayes(make()).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(7, *shape)
    factors = Classification(["a", "b", "c"]).fisher_factors
    found = fisher_diagonal(net, x.split(4), factors)
    expected = by_jacobian(net, x, factors)
    assert found.keys() == expected.keys()
    for layer, value in expected.items():
        assert value.any()
        torch.testing.assert_close(found[layer], value, rtol=1e-4, atol=1e-7)


def test_factors_are_those_of_the_expected_hessian() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64)
    likelihood = Classification(["a", "b", "c"])
    for row, output in enumerate(logits):
        hessian = torch.autograd.functional.hessian(lambda f: -f.log_softmax(0)[0], output)
        factors = likelihood.fisher_factors(logits)[:, row]
        torch.testing.assert_close(torch.einsum("ki,kj->ij", factors, factors), hessian)
    outputs = torch.tensor([[5.0, -2.0]])
    factors = Regression(0.0, 1.0).fisher_factors(outputs)[:, 0]
    expected = torch.diag(torch.tensor([2.0, 0.0]).exp() + torch.tensor([0.0, -0.5]))
    torch.testing.assert_close(torch.einsum("ki,kj->ij", factors, factors), expected)


def test_a_layer_that_mixes_rows_with_another_dimension_is_refused() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BayesConv2d(1, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 1, 2, 2)).reshape(len(x), -1)

    with pytest.raises(TypeError, match="laplace: a BayesConv2d reads 6 rows for 3 inputs"):
        fisher_diagonal(Patches().eval(), [torch.randn(3, 8)], lambda output: output[None])
