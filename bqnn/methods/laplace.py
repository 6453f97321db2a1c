"""Laplace: a Gaussian around the weights of a trained network, from the curvature of its loss."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError, real_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.inference.metrics import NotFiniteError
from bqnn.inference.precision import full_precision
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.bayes import GaussianWeight
from bqnn.methods.base import Batch, Method, channels_last
from bqnn.methods.fisher import fisher_diagonal
from bqnn.methods.posthoc import PostHocGaussian, sum_over_ranks
from bqnn.text import short

log = logging.getLogger(__name__)
CRITERIA = ("validation", "marginal_likelihood")
PRIOR_STDS = torch.logspace(-3, 1, 17).tolist()  # four per factor of ten


class Laplace(PostHocGaussian):
    r"""Diagonal Laplace approximation of all layers (MacKay, 1992; Daxberger et al., 2021).

    The means are the weights of the trained network. With the diagonal F of the Fisher information,
    which for these likelihoods equals the generalized Gauss-Newton matrix,

        sigma^2 = 1 / (\sum_n F_n + 1 / prior_std^2).

    Predictions average over draws of the weights. Biases and the parameters of batch norm keep
    their trained values.

    A network that `initialize_from` has set is not trained further.

    Args:
        net: The network. Its linear layers and convolutions get Gaussian weights.
        prior: The standard deviation of the prior, or how it is chosen from `PRIOR_STDS`:
            `validation` by the NLL of the validation rows, `marginal_likelihood` by the evidence
            of the training rows.
        options: Arguments of `PostHocGaussian` and `Method`.

    Examples:
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 2, "seed": 0, "optimizer": {"name": "adam"}}
        >>> method = Laplace(net, likelihood, prior=0.1, **options)
        >>> method.set_posterior([(torch.ones(2, 3), torch.zeros(2))], validation=[])
        >>> bool((method.net.output.heads[0].linear.sigma < 0.1001).all())
        True
    """

    trains_after_start = False

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        prior: float | str = "validation",
        **options: Any,
    ) -> None:
        if isinstance(prior, str):
            if prior not in CRITERIA:
                choices = " or ".join(CRITERIA)
                raise ArgumentError(f"prior={short(prior)}: choose {choices}, or a number", "prior")
        else:
            reason = "a standard deviation must be positive and finite"
            prior = real_number("prior", prior, reason, 0, without=(0,))
        super().__init__(net, likelihood, **options)
        self.prior = prior
        self.is_given = False

    def initialize_from(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of a pointwise method with the same network, which stay as they are.

        Args:
            state: The `state_dict` of the pointwise method.

        Raises:
            ValueError: The state does not fit this network.
        """
        super().initialize_from(state)
        self.is_given = True

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> Method:
        self.is_given = False
        return super().fine_tuning(optimizer, prior_weight)

    def optimizer_options(self, steps_per_epoch: int) -> dict[str, Any]:
        still = {"name": "sgd", "lr": 0.0}
        return still if self.is_given else super().optimizer_options(steps_per_epoch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.is_fine_tuned or self.prior != "validation":
            return
        if not self.trainer.enable_validation:
            raise ArgumentError(
                "prior=validation: there are no validation rows; provide some, or choose "
                "prior=marginal_likelihood",
                "prior",
            )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.is_given:
            self.eval()  # the statistics of batch norm stay as they are

    @full_precision()
    def set_posterior(self, batches: Iterable[Batch], validation: Collection[Batch]) -> None:
        self.eval()
        fisher = self.fisher(batches)
        prior_std = self.prior
        if isinstance(prior_std, str):
            prior_std = self.best_prior_std(prior_std, fisher, validation)
            log.info("laplace: prior_std=%.3g is chosen by %s", prior_std, self.prior)
        self.set_sigmas(fisher, prior_std)

    def fisher(self, batches: Iterable[Batch]) -> dict[GaussianWeight, Tensor]:
        """Compute the diagonal of the Fisher information of all training rows.

        Args:
            batches: The training rows, or a part of them, which then stands for all.

        Returns:
            For each layer with Gaussian weights that is not frozen, a tensor like its means.
        """
        count = torch.zeros((), device=self.device)

        def counted() -> Iterator[Tensor]:
            for inputs, _ in batches:
                count.add_(len(inputs))
                yield channels_last(inputs)

        sums = fisher_diagonal(self.net, counted(), self.likelihood.fisher_factors)
        share = sum_over_ranks(count) / self.num_train
        return {layer: sum_over_ranks(value) / share for layer, value in sums.items()}

    def best_prior_std(
        self,
        criterion: str,
        fisher: Mapping[GaussianWeight, Tensor],
        validation: Collection[Batch],
    ) -> float:
        """Return the prior's standard deviation of `PRIOR_STDS` that is best by a criterion."""
        if criterion == "marginal_likelihood":
            return max(PRIOR_STDS, key=lambda std: log_evidence(fisher, std))
        nlls = {std: self._validation_nll(fisher, std, validation) for std in PRIOR_STDS}
        if min(nlls.values()) == math.inf:
            raise ValueError(
                "laplace: no prior leads to a finite NLL of the validation rows; look for rows far "
                "from the training rows, or choose prior=marginal_likelihood"
            )
        return min(PRIOR_STDS, key=nlls.__getitem__)

    @torch.no_grad()
    def set_sigmas(self, fisher: Mapping[GaussianWeight, Tensor], prior_std: float) -> None:
        """Set the standard deviations of the posterior for a prior."""
        for layer, information in fisher.items():
            layer.set_sigma((information + prior_std**-2).rsqrt())

    def _validation_nll(
        self,
        fisher: Mapping[GaussianWeight, Tensor],
        prior_std: float,
        validation: Collection[Batch],
    ) -> float:
        """Return the NLL of validation rows, or infinity if it is not finite."""
        self.set_sigmas(fisher, prior_std)
        predictions = [
            Prediction(self.likelihood, self.predictive(inputs).cpu(), targets.cpu())
            for inputs, targets in validation
        ]
        if not all(prediction.samples.isfinite().all() for prediction in predictions):
            return math.inf
        try:
            return score(*predictions)["nll"]
        except NotFiniteError as error:
            nll = error.metrics["nll"]
            return math.inf if math.isnan(nll) else nll


def log_evidence(fisher: Mapping[GaussianWeight, Tensor], prior_std: float) -> float:
    r"""Compute Laplace's log marginal likelihood, up to a constant in `prior_std`.

        \sum_i (log(t) - log(F_i + t) - t mean_i^2) / 2,    t = 1 / prior_std^2

    Args:
        fisher: The diagonal of the Fisher information of each layer's means.
        prior_std: The standard deviation of the prior.

    Examples:
        >>> from bqnn.layers.bayes import BayesLinear
        >>> layer = BayesLinear(1, 1)
        >>> layer.mean = nn.Parameter(torch.ones(1, 1))
        >>> round(log_evidence({layer: torch.full((1, 1), 3.0)}, 1.0), 4)  # -(log 4 + 1) / 2
        -1.1931
    """
    precision = prior_std**-2
    total = 0.0
    for layer, information in fisher.items():
        shrunk = torch.log1p(information.double() / precision).sum()
        total -= 0.5 * float(shrunk + precision * layer.mean.detach().double().square().sum())
    return total
