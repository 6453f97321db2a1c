"""Bayes by Backprop: variational inference with one Gaussian per weight."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import real_number, whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.bayes import GaussianWeight, JointPosterior, to_bayes
from bqnn.methods.base import Method
from bqnn.methods.start import PointwiseStart
from bqnn.methods.terms import Terms


class BayesByBackprop(PointwiseStart):
    """Bayes by Backprop (Blundell et al., 2015).

    The loss is mean NLL + beta * KL / num_train, with the KL in closed form.

    Args:
        net: The network. Its linear layers and convolutions get Gaussian weights.
        prior_std: Standard deviation of the prior.
        init_rho: Initial rho of each weight; sigma = softplus(rho).
        beta: Factor of the KL; 1 is the ELBO.
        warmup_epochs: The number of epochs in which beta grows linearly from 0, batch by batch.
        init_delta: Sigma after `initialize_from`, as a multiple of |mean|.
        keep: Types of modules whose parameters keep point values, see `to_bayes`.
        options: Arguments of `Method`.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "adam"}}
        >>> method = BayesByBackprop(net, likelihood, prior_std=0.3, init_rho=-5, beta=1, **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([20, 2, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        prior_std: float,
        init_rho: float,
        beta: float,
        warmup_epochs: int = 0,
        init_delta: float = 0.1,
        keep: type[nn.Module] | Collection[type[nn.Module]] = (),
        **options: Any,
    ) -> None:
        beta = real_number("beta", beta, "the weight of the KL term, 0 or more", 0)
        reason = "epochs in which beta grows, 0 or more"
        warmup_epochs = whole_number("warmup_epochs", warmup_epochs, reason, 0)
        reason = "sigma as a multiple of the mean has to be positive; 0.1 is usual"
        init_delta = real_number("init_delta", init_delta, reason, 0, without=(0,))
        super().__init__(to_bayes(net, prior_std, init_rho, keep=keep), likelihood, **options)
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.init_delta = init_delta

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        with JointPosterior(self.net) as posterior:
            nll = self.likelihood.loss(self(inputs), targets)
        kl = posterior.kl()
        beta = self.current_beta()
        loss = nll + beta * kl / self.num_train
        return {"loss": loss, "nll": nll, "kl": kl, "beta": beta}

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> Method:
        self.beta *= prior_weight
        self.warmup_epochs = 0
        return super().fine_tuning(optimizer, prior_weight)

    def current_beta(self) -> float:
        """Return beta at the current batch of the warm-up."""
        if self.current_epoch >= self.warmup_epochs:
            return self.beta
        return self.beta * self.epochs_done / self.warmup_epochs

    @torch.no_grad()
    def initialize_from(self, state: Mapping[str, Tensor]) -> None:
        """Initialize from a pointwise method with the same network.

        Its weights become the means, and sigma = max(init_delta * |mean|, 1e-4), so that sigma
        can be learned for weights of zero. Other parameters and buffers are copied.

        Args:
            state: The `state_dict` of the pointwise method.

        Raises:
            ValueError: The state does not fit this network.
        """
        super().initialize_from(state)
        for layer in self.modules():
            if isinstance(layer, GaussianWeight):
                layer.set_sigma((self.init_delta * layer.mean.abs()).clamp_min(1e-4))
