"""Bayes-by-backprop: a Gaussian per weight, learned by variational inference."""

from typing import Any

import torch
from torch import Tensor, nn

from bqnn.checkpoints.file import read_checkpoint
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.bayes import GaussianWeight, JointPosterior, to_bayes
from bqnn.methods.base import Method, Terms
from bqnn.numbers import real_number, whole_number


class BayesByBackprop(Method):
    """Blundell et al. (2015): minimizes mean NLL + beta * KL / N, N the rows trained on.

    beta grows linearly from 0 over the first `warmup_epochs` epochs. `init_from` is a pointwise
    checkpoint of the same network: its weights become the means and sigma = init_delta * |mean|
    (but at least 1e-4, so that a weight of zero can still learn its sigma).
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
        init_from: str | None = None,
        init_delta: float = 0.1,
        **options: Any,
    ) -> None:
        beta = real_number("method.beta", beta, "the weight of the KL term, 0 or more", 0)
        reason = "epochs in which beta grows, 0 or more"
        warmup_epochs = whole_number("method.warmup_epochs", warmup_epochs, reason, 0)
        reason = "sigma as a multiple of the mean has to be positive; 0.1 is usual"
        init_delta = real_number("method.init_delta", init_delta, reason, 0, without=(0,))
        super().__init__(to_bayes(net, prior_std, init_rho), likelihood, **options)
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.init_from = init_from
        self.init_delta = init_delta
        self.register_load_state_dict_post_hook(_forget_init_from)

    def initialize(self) -> None:
        if self.init_from is not None:
            self.initialize_from(self.init_from)

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        with JointPosterior(self.net) as posterior:
            nll = self.likelihood.loss(self(inputs), targets)
        kl = posterior.kl()
        beta = self.current_beta()
        loss = nll + beta * kl / self.num_train
        return {"loss": loss, "nll": nll, "kl": kl, "beta": beta}

    def fine_tune(self, optimizer: dict[str, Any], prior_weight: float) -> None:
        super().fine_tune(optimizer, prior_weight)
        self.beta *= prior_weight
        self.warmup_epochs = 0
        self.init_from = None

    def current_beta(self) -> float:
        """beta at this batch of the warm-up."""
        if self.current_epoch >= self.warmup_epochs:
            return self.beta
        return self.beta * self.epochs_done / self.warmup_epochs

    @torch.no_grad()
    def initialize_from(self, path: str) -> None:
        """Take the means, point parameters and buffers of the pointwise checkpoint at `path`."""
        checkpoint = read_checkpoint(path)
        method = checkpoint["recipe"]["method"]["name"]
        if method != "pointwise":
            raise ValueError(
                f"method.init_from={path}: this is a {method} run, give a pointwise one"
            )
        state = dict(checkpoint["state_dict"])
        layers = {n: m for n, m in self.named_modules() if isinstance(m, GaussianWeight)}
        for name, layer in layers.items():
            state[f"{name}.mean"] = state.pop(f"{name}.weight", None)
            state[f"{name}.rho"] = layer.rho
        own = self.state_dict()
        differing = [
            name
            for name in own.keys() | state.keys()
            if state.get(name) is None or name not in own or state[name].shape != own[name].shape
        ]
        if differing:
            raise ValueError(
                f"method.init_from={path}: its network is not this one, they differ in "
                f"{', '.join(sorted(differing)[:3])}; train with the same net and task"
            )
        self.load_state_dict(state)
        for layer in layers.values():
            layer.set_sigma((self.init_delta * layer.mean.abs()).clamp_min(1e-4))


def _forget_init_from(module: nn.Module, _: object) -> None:
    """A model that was loaded has its weights: a fit must not begin anew from that file."""
    assert isinstance(module, BayesByBackprop)
    module.init_from = None
