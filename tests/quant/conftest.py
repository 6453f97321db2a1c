"""Small networks of every method, prepared and calibrated."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.nets import NETS
from bqnn.quant.fuse import fuse
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec

SHAPES = {"mlp": (6,), "lenet": (1, 8, 8), "resnet": (3, 8, 8)}
OPTIONS: dict[str, dict] = {
    "mlp": {"hidden_features": [24, 24]},
    "lenet": {"channels": [6, 8], "hidden_features": 32},
    "resnet": {"width": 4, "blocks_per_stage": [1, 1]},
}

Make = Callable[..., nn.Module]


def float_net(method: str, net: str, num_outputs: int = 10) -> nn.Module:
    """Create a network in evaluation mode whose batch norms are far from the identity."""
    return converted(plain_net(net, num_outputs), method)


def plain_net(net: str, num_outputs: int = 10) -> nn.Module:
    """Create a network with point-valued weights whose batch norms are far from the identity."""
    torch.manual_seed(3)
    made = NETS[net](SHAPES[net], (num_outputs,), **OPTIONS[net])
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0, 1)  # half of them negative
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


def converted(net: nn.Module, method: str) -> nn.Module:
    """Give a network the layers of a method, in evaluation mode."""
    if method == "bbb":
        net = to_bayes(net, prior_std=0.3, init_rho=-3.0)
    elif method == "mcdropout":
        net = to_mcdropout(net, rate=0.25)
    elif method == "sghmc":
        net = Ensemble(net, num_members=2)
        for _ in range(2):
            for param in net.current.parameters():
                param.data.add_(0.1 * torch.randn_like(param) * param.abs().mean())
            net.collect()
    return net.to(memory_format=torch.channels_last).eval()


def inputs(net: str, rows: int = 64) -> Tensor:
    torch.manual_seed(5)
    x = torch.randn(rows, *SHAPES[net])
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


@pytest.fixture
def simulated() -> Make:
    """Return make(method, net, **spec): a calibrated network without extra bits for outputs."""

    def make(method: str, net: str, **options: object) -> nn.Module:
        options = {"activation_observer": "minmax", "output_bits": None, **options}
        spec = QuantSpec(**options)
        prepared = prepare(fuse(float_net(method, net)), spec)
        return calibrate(prepared, [inputs(net)])

    return make
