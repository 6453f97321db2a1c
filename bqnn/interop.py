"""Take over Bayesian layers of other libraries: bayesian-torch and torch-uncertainty.

Both store a mean and rho for each weight, with sigma = log(1 + exp(rho)), as bqnn does. The layers
are therefore converted without loss: the converted layer has the same means and standard
deviations, bit by bit.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bqnn.arguments import real_number
from bqnn.layers.bayes import BayesConv2d, BayesLinear, GaussianWeight
from bqnn.layers.linear_map import Geometry
from bqnn.layers.swap import check_no_hooks
from bqnn.text import type_of

log = logging.getLogger(__name__)


class Posterior(NamedTuple):
    """The parameters of a Bayesian layer.

    Attributes:
        mean: Means of the weights.
        rho: rho of each weight; sigma = softplus(rho).
        bias: Means of the bias, or None.
        bias_rho: rho of the bias, or None.
        prior_std: Standard deviation of the prior, or the reason why it has none.
    """

    mean: nn.Parameter
    rho: nn.Parameter
    bias: nn.Parameter | None
    bias_rho: nn.Parameter | None
    prior_std: float | str


def from_bayesian_torch(net: nn.Module, prior_std: float | None = None) -> nn.Module:
    """Convert the Bayesian layers of bayesian-torch, in place.

    The layers are LinearReparameterization, LinearFlipout, Conv2dReparameterization and
    Conv2dFlipout. All other modules stay as they are.

    A layer of bayesian-torch returns a tuple (output, KL), unless its `dnn_to_bnn_flag` is set, as
    `dnn_to_bnn` does. A converted layer returns the output alone. A network whose `forward`
    unpacks the tuples would therefore fail, and is refused. Write its `forward` without the tuples
    and set `dnn_to_bnn_flag = True` on each layer before the conversion; `kl_divergence(net)`
    computes the KL.

    Args:
        net: The network. It stays unchanged when an error is raised.
        prior_std: Standard deviation of the prior of the weights; None for that of each layer.
            bayesian-torch uses its `prior_variance` as a standard deviation.

    Returns:
        The network, or the converted layer if the network is a single one. Gaussian biases become
        their means, with a warning in the log, because bqnn has point values for biases.

    Raises:
        ImportError: bayesian-torch is not installed.
        TypeError: A layer returns tuples, has hooks, or is a Bayesian layer of another type.
        ValueError: There is no layer to convert, or a prior has a mean other than 0.

    Example, which requires bayesian-torch:

        net = torchvision.models.resnet18(num_classes=10)
        dnn_to_bnn(net, parameters)  # of bayesian_torch.models.dnn_to_bnn
        ...                          # a training
        net = from_bayesian_torch(net)
    """
    from bayesian_torch import layers
    from bayesian_torch.layers.base_variational_layer import BaseVariationalLayer_

    readers: dict[type, Callable[[Any], Posterior]] = {
        layers.LinearReparameterization: _linear_of_bayesian_torch,
        layers.LinearFlipout: _linear_of_bayesian_torch,
        layers.Conv2dReparameterization: _conv_of_bayesian_torch,
        layers.Conv2dFlipout: _conv_of_bayesian_torch,
    }
    return _take_over(net, "from_bayesian_torch", readers, (BaseVariationalLayer_,), prior_std)


def from_torch_uncertainty(net: nn.Module, prior_std: float | None = None) -> nn.Module:
    """Convert the layers BayesLinear and BayesConv2d of torch-uncertainty, in place.

    All other modules stay as they are.

    Args:
        net: The network. It stays unchanged when an error is raised.
        prior_std: Standard deviation of the prior of the weights; None for that of each layer. It
            is required for a prior that is a mixture of two Gaussians.

    Returns:
        The network, or the converted layer if the network is a single one. Gaussian biases become
        their means, with a warning in the log, because bqnn has point values for biases.

    Raises:
        ImportError: torch-uncertainty is not installed.
        TypeError: A layer is frozen, has hooks, or is a Bayesian layer of another type.
        ValueError: There is no layer to convert, or a prior is not a Gaussian.

    Example, which requires torch-uncertainty:

        net = from_torch_uncertainty(nn.Sequential(bayesian.BayesLinear(3, 2)))
    """
    from torch_uncertainty.layers import bayesian

    readers: dict[type, Callable[[Any], Posterior]] = {
        bayesian.BayesLinear: _of_torch_uncertainty,
        bayesian.BayesConv2d: _of_torch_uncertainty,
    }
    others = bayesian.bayesian_modules
    return _take_over(net, "from_torch_uncertainty", readers, others, prior_std)


def _take_over(
    net: nn.Module,
    caller: str,
    readers: Mapping[type, Callable[[Any], Posterior]],
    others: tuple[type, ...],
    prior_std: float | None,
) -> nn.Module:
    """Convert every layer whose type has a reader, and refuse subclasses and `others`."""
    if prior_std is not None:
        reason = "a standard deviation must be positive and finite; 1 is usual"
        prior_std = real_number("prior_std", prior_std, reason, 0, without=(0,))
    made: dict[nn.Module, GaussianWeight] = {}
    num_gaussian_biases = 0
    for name, layer in net.named_modules():
        path = name or "the network"
        if type(layer) in readers:
            check_no_hooks(path, layer)
            posterior = _read(path, readers[type(layer)], layer)
            made[layer] = _converted(path, layer, posterior, prior_std)
            num_gaussian_biases += posterior.bias_rho is not None
        elif isinstance(layer, (*readers, *others)):
            known = ", ".join(kind.__name__ for kind in readers)
            raise TypeError(
                f"{path} is {type_of(layer)}, which {caller} does not support; it converts "
                f"{known}; replace the layer by one of these"
            )
    if not made:
        known = ", ".join(kind.__name__ for kind in readers)
        raise ValueError(f"{caller}: the network has no layer to convert; it converts {known}")
    if num_gaussian_biases:
        log.warning(
            "%s: %d Gaussian biases became their means, because biases have point values in bqnn",
            caller,
            num_gaussian_biases,
        )
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return made.get(net, net)


def _read(path: str, reader: Callable[[Any], Posterior], layer: nn.Module) -> Posterior:
    try:
        return reader(layer)
    except TypeError as error:
        raise TypeError(f"{path} is {type_of(layer)} that {error}") from None


def _converted(
    path: str, layer: Any, posterior: Posterior, prior_std: float | None
) -> GaussianWeight:
    """Make a layer of bqnn with a posterior, and the geometry of another layer."""
    mean, rho, bias = posterior.mean, posterior.rho, posterior.bias
    std = posterior.prior_std if prior_std is None else prior_std
    if isinstance(std, str):
        raise ValueError(f"{path} has {std}; give prior_std, for a prior N(0, prior_std^2)")
    like: dict[str, Any] = {"bias": bias is not None, "device": mean.device, "dtype": mean.dtype}
    made: GaussianWeight
    if mean.dim() == 2:
        linear = nn.Linear(mean.shape[1], mean.shape[0], **like)
        made = BayesLinear.like(linear, prior_std=std, init_rho=0.0)
    else:
        like |= {name: getattr(layer, name) for name in Geometry._fields}
        like["padding_mode"] = getattr(layer, "padding_mode", "zeros")
        height, width = mean.shape[2:]
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, (height, width), **like)
        try:
            made = BayesConv2d.like(conv, prior_std=std, init_rho=0.0)
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from None
    pairs = [(made.mean, mean), (made.rho, rho)]
    pairs += [(made.bias, bias)] if made.bias is not None and bias is not None else []
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
            own.requires_grad_(other.requires_grad)
    return made.train(layer.training)


def _linear_of_bayesian_torch(layer: Any) -> Posterior:
    return _of_bayesian_torch(layer, layer.mu_weight, layer.rho_weight)


def _conv_of_bayesian_torch(layer: Any) -> Posterior:
    return _of_bayesian_torch(layer, layer.mu_kernel, layer.rho_kernel)


def _of_bayesian_torch(layer: Any, mean: nn.Parameter, rho: nn.Parameter) -> Posterior:
    if not layer.dnn_to_bnn_flag:
        raise TypeError(
            "returns a tuple (output, KL), which a converted layer would not; write the network's "
            "forward without the tuples, and set dnn_to_bnn_flag = True on each such layer"
        )
    means, stds = layer.prior_weight_mu, layer.prior_weight_sigma
    prior: float | str = stds.flatten()[0].item()
    if (means != 0).any() or (stds != prior).any():
        prior = "a prior that differs between weights, or whose mean is not 0"
    return Posterior(mean, rho, layer.mu_bias, layer.rho_bias, prior)


def _of_torch_uncertainty(layer: Any) -> Posterior:
    if layer.frozen:
        raise TypeError(
            "is frozen, so that its weights have no distribution; call unfreeze() on it"
        )
    share = layer.prior_pi
    stds = {layer.prior_sigma_1} if share > 0 else set()
    stds |= {layer.prior_sigma_2} if share < 1 else set()
    prior: float | str = float(min(stds))
    if len(stds) > 1:
        variance = share * layer.prior_sigma_1**2 + (1 - share) * layer.prior_sigma_2**2
        prior = f"a mixture of Gaussians as its prior, of standard deviation {variance**0.5:.4g}"
    bias_rho = None if layer.bias_mu is None else layer.bias_sigma
    return Posterior(layer.weight_mu, layer.weight_sigma, layer.bias_mu, bias_rho, prior)
