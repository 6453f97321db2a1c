"""Bayes by Backprop: variational inference with one Gaussian per weight."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Optimizer

from bqnn.arguments import real_number, whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.bayes import GaussianWeight, JointPosterior, to_bayes
from bqnn.methods.base import Method, Parameters, channels_last
from bqnn.methods.start import PointwiseStart
from bqnn.methods.terms import Terms
from bqnn.seeds import Stream

log = logging.getLogger(__name__)

# Limit of mean / root mean square of the gradients of rho in the last steps, in the median. It is
# near 0 where sigma has converged, and near 1 where all gradients point the same way.
LARGEST_DRIFT = 0.5


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
        rho_lr: Learning rate of rho; None for that of the optimizer.
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
        rho_lr: float | None = None,
        keep: type[nn.Module] | Collection[type[nn.Module]] = (),
        **options: Any,
    ) -> None:
        beta = real_number("beta", beta, "the weight of the KL term, 0 or more", 0)
        reason = "epochs in which beta grows, 0 or more"
        warmup_epochs = whole_number("warmup_epochs", warmup_epochs, reason, 0)
        reason = "sigma as a multiple of the mean has to be positive; 0.1 is usual"
        init_delta = real_number("init_delta", init_delta, reason, 0, without=(0,))
        if rho_lr is not None:
            rho_lr = real_number("rho_lr", rho_lr, "choose more than 0", 0, without=(0,))
        super().__init__(to_bayes(net, prior_std, init_rho, keep=keep), likelihood, **options)
        self.prior_std = prior_std
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.init_delta = init_delta
        self.rho_lr = rho_lr

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        with JointPosterior(self.net) as posterior:
            nll = self.nll(self, channels_last(inputs), targets)
        kl = posterior.kl()
        beta = self.step_number("beta")
        loss = nll + beta * kl / self.num_train
        return {"loss": loss, "nll": nll, "kl": kl, "beta": beta}

    def step_numbers(self) -> dict[str, float]:
        return {"beta": self.current_beta()}

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> Method:
        self.beta *= prior_weight
        self.warmup_epochs = 0
        self.rho_lr = None
        return super().fine_tuning(optimizer, prior_weight)

    def trained_parameters(self) -> Parameters:
        if self.rho_lr is None:
            return super().trained_parameters()
        rhos = {id(layer.rho) for layer in self._layers()}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for param in self.parameters():
            if param.requires_grad:
                groups[id(param) in rhos].append(param)
        others: dict[str, Any] = {"params": groups[0]}
        return [others, {"params": groups[1], "lr": self.rho_lr}]

    def on_train_end(self) -> None:
        if self.stream is Stream.TRAINING:  # a fine-tuning starts from a sigma that has converged
            self._warn_of_drift(self.trainer.optimizers[0])

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
        for layer in self._layers():
            layer.set_sigma((self.init_delta * layer.mean.abs()).clamp_min(1e-4))

    def _layers(self) -> list[GaussianWeight]:
        return [module for module in self.modules() if isinstance(module, GaussianWeight)]

    def _warn_of_drift(self, optimizer: Optimizer) -> None:
        """Warn if sigma was still on its way from its start. Only Adam keeps what this needs."""
        rhos = [layer.rho for layer in self._layers()]
        rhos = [rho for rho in rhos if "exp_avg" in optimizer.state.get(rho, {})]
        if not rhos:
            return
        betas = optimizer.param_groups[0]["betas"]
        drift = float(torch.cat([_drift(optimizer.state[rho], betas) for rho in rhos]).median())
        if abs(drift) < LARGEST_DRIFT:
            return
        sigma = torch.cat([softplus(rho.detach()).flatten() for rho in rhos])
        log.warning(
            "sigma has not converged: its median is %.3g, and the gradients of most weights still "
            "%s it (prior_std is %g), so that mutual information depends on its start, init_rho; "
            "choose a larger rho_lr, or train longer",
            float(sigma.median()),
            "raise" if drift < 0 else "lower",
            self.prior_std,
        )


def _drift(state: Mapping[str, Any], betas: tuple[float, float]) -> Tensor:
    """Return Adam's mean of the gradient divided by its root mean square, flat and unbiased."""
    first, second = (1 - beta ** float(state["step"]) for beta in betas)
    mean = state["exp_avg"].flatten() / first
    root = (state["exp_avg_sq"].flatten() / second).sqrt()
    return mean / root.clamp_min(torch.finfo(root.dtype).tiny)
