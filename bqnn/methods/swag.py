"""SWAG: the mean and the covariance of the networks that SGD passes in its last epochs."""

import logging
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from bqnn.arguments import ArgumentError, real_number, whole_number
from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.bayes import GaussianWeight
from bqnn.layers.draws import held_draw
from bqnn.methods.base import Batch
from bqnn.methods.posthoc import PostHocGaussian, num_ranks, sum_over_ranks

log = logging.getLogger(__name__)
SMALLEST = 1e-3  # smallest sigma, as a share of the root mean square of a layer's


class SWAG(PostHocGaussian):
    r"""SWAG with a diagonal covariance, or a diagonal and a low rank (Maddox et al., 2019).

    The networks w_1, ..., w_T at the ends of epochs give the posterior of the weights,

        mean = 1/T \sum_t w_t,    sigma^2 = scale (1/T \sum_t w_t^2 - mean^2).

    With rank K, the last K deviations d_k = w_t - (mean of w_1, ..., w_t) add a covariance of all
    weights:

        w = mean + sigma z / sqrt(2) + sqrt(scale / (2 (K - 1))) \sum_k d_k u_k,    z, u ~ N(0, I).

    A layer has the standard deviation of w as its sigma, and the loadings of u in the noise
    w - mean, divided by sigma. So each weight is Gaussian, as in the methods without a rank, and is
    rounded alike.

    Biases and the parameters of batch norm get their means. The statistics of batch norm are
    averages over draws: they are computed anew from the training rows, with one draw of the
    weights for each batch.

    Args:
        net: The network. Its linear layers and convolutions get Gaussian weights.
        swa_lr: The learning rate while networks are collected. The schedule leads from
            `optimizer.lr` to it.
        swa_start: The share of the epochs before networks are collected.
        collect_every: The number of epochs from one collected network to the next.
        scale: Factor of the variances.
        rank: The rank K of the covariance, 2 or more, or 0 for a diagonal one.
        options: Arguments of `PostHocGaussian` and `Method`.

    Examples:
        >>> from bqnn.inference.likelihoods import Regression
        >>> from bqnn.nets import MLP
        >>> net, likelihood = MLP([3], [1, 1], hidden_features=[4]), Regression(0.0, 1.0)
        >>> options = {"num_train": 100, "seed": 0, "optimizer": {"name": "sgd", "lr": 0.1}}
        >>> method = SWAG(net, likelihood, swa_lr=0.05, **options)
        >>> method.eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([20, 2, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        swa_lr: float,
        swa_start: float = 0.5,
        collect_every: int = 1,
        scale: float = 1.0,
        rank: int = 0,
        **options: Any,
    ) -> None:
        swa_lr = real_number("swa_lr", swa_lr, "a learning rate above 0", 0, without=(0,))
        reason = "the share of the epochs before networks are collected, from 0 to below 1"
        swa_start = real_number("swa_start", swa_start, reason, 0, 1, without=(1,))
        reason = "in epochs, 1 or more"
        collect_every = whole_number("collect_every", collect_every, reason, 1)
        scale = real_number("scale", scale, "a factor of the variances above 0", 0, without=(0,))
        reason = "the rank of the covariance, 2 or more, or 0 for a diagonal one"
        rank = whole_number("rank", rank, reason, 0)
        if rank == 1:
            raise ArgumentError(f"rank=1: {reason}; one deviation has no covariance", "rank")
        super().__init__(net, likelihood, **options)
        self.swa_lr = swa_lr
        self.swa_start = swa_start
        self.collect_every = collect_every
        self.scale = scale
        self.start_epoch = 0  # the first epoch at whose end a network may be collected
        self.rank = rank
        self.moments = Moments(rank)
        if rank > 0:
            for layer in self.gaussian_weights().values():
                layer.correlate(layer.mean.new_zeros(rank, *layer.mean.shape))

    def configure_callbacks(self) -> list[pl.Callback]:
        callbacks = super().configure_callbacks()
        if self.is_fine_tuned:
            return callbacks
        self.moments = Moments(self.rank)
        first, *rest = callbacks
        return [first, CollectMoments(self.moments), *rest]

    def scheduled(self, optimizer: Optimizer, epochs: int, steps: int) -> Any:
        if self.is_fine_tuned:
            return super().scheduled(optimizer, epochs, steps)
        self.start_epoch = int(self.swa_start * epochs)
        by_step = self.schedule == "cosine_by_step"
        length = self.start_epoch * (self.steps_per_epoch if by_step else 1)
        last = self.swa_lr / optimizer.param_groups[0]["lr"]

        def factor(done: int) -> float:
            if done >= length:
                return last
            if self.schedule == "constant":
                return 1.0
            return last + (1 - last) * (1 + math.cos(math.pi * done / length)) / 2

        schedule = {"scheduler": LambdaLR(optimizer, factor)}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {**schedule, "interval": "step" if by_step else "epoch"},
        }

    @torch.no_grad()
    def set_posterior(self, batches: Iterable[Batch], validation: Collection[Batch]) -> None:
        moments = self.moments
        if moments.count < 2:
            log.warning(
                "swag has collected %d of the networks at the ends of epochs, and a variance needs "
                "2: all draws will be equal; train longer, or lower swa_start or collect_every",
                moments.count,
            )
        for name, mean in moments.means.items():
            self.net.get_parameter(name).copy_(mean)
        for name, layer in self.gaussian_weights().items():
            if f"{name}.mean" in moments.means:  # else it is frozen
                self._set_covariance(layer, f"{name}.mean")
        self._renew_batch_norm(batches)

    def _set_covariance(self, layer: GaussianWeight, name: str) -> None:
        """Set sigma of a layer, and its loadings if there is a rank."""
        variance = self.scale * self.moments.variance(name)
        deviations = self.moments.deviations.get(name, []) if self.rank > 0 else []
        factors = layer.mean.new_zeros(self.rank, *layer.mean.shape)
        if len(deviations) > 1:
            used = torch.stack(deviations)
            factors[: len(used)] = used * math.sqrt(self.scale / (2 * (len(used) - 1)))
            variance = variance / 2 + factors.square().sum(0)
        least = SMALLEST * variance.mean().sqrt()
        sigma = variance.sqrt().clamp_min(least.clamp_min(1e-12))
        layer.set_sigma(sigma)
        if self.rank > 0:
            layer.correlate(factors / sigma)

    def _renew_batch_norm(self, batches: Iterable[Batch]) -> None:
        """Average the statistics of batch norm over batches, each with a draw of the weights."""
        update_bn(self._inputs_of_draws(batches), self)
        for module in self.net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        statistic.copy_(sum_over_ranks(statistic) / num_ranks())

    def _inputs_of_draws(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield the inputs of each batch, and hold a draw of the network while it is used."""
        for inputs, _ in batches:
            with held_draw(self.net, 0):
                yield inputs


class Moments:
    """Running means and variances of named tensors, by Welford's algorithm.

    Args:
        rank: The number of last deviations that are kept.

    Attributes:
        count: The number of observations.
        means: The mean of each tensor.
        squares: The sum of squared deviations from the mean, of each tensor.
        deviations: The last deviations of each tensor from the mean at their time.

    Examples:
        >>> moments = Moments()
        >>> for value in (1.0, 2.0, 6.0):
        ...     moments.add({"a": torch.tensor([value])})
        >>> moments.means["a"], moments.variance("a")
        (tensor([3.]), tensor([4.6667]))
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.clear()

    def clear(self) -> None:
        """Forget all observations."""
        self.count = 0
        self.means: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.deviations: dict[str, list[Tensor]] = {}

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        self.means = {name: value.to(device) for name, value in self.means.items()}
        self.squares = {name: value.to(device) for name, value in self.squares.items()}
        self.deviations = {n: [each.to(device) for each in v] for n, v in self.deviations.items()}

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Add an observation of each tensor."""
        self.count += 1
        if self.count == 1:
            self.means = {name: value.detach().clone() for name, value in values.items()}
            self.squares = {name: torch.zeros_like(value) for name, value in values.items()}
        new = list(values.values())
        means = [self.means[name] for name in values]
        changes = torch._foreach_sub(new, means)
        torch._foreach_add_(means, torch._foreach_div(changes, self.count))
        left = torch._foreach_sub(new, means)
        torch._foreach_addcmul_([self.squares[name] for name in values], changes, left)
        if self.rank > 0:
            for name, deviation in zip(values, left, strict=True):
                self.deviations[name] = [*self.deviations.get(name, []), deviation][-self.rank :]

    def variance(self, name: str) -> Tensor:
        """Return the mean squared deviation of a tensor from its mean."""
        return self.squares[name] / self.count


class CollectMoments(pl.Callback):
    """Add the network to the moments of `SWAG` every `collect_every` epochs.

    Args:
        moments: The moments, which checkpoints contain.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moments.to(pl_module.device)  # those of a checkpoint are on the CPU

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SWAG)
        passed = trainer.current_epoch + 1 - pl_module.start_epoch
        if passed <= 0:  # a prolonged training starts to collect later
            self.moments.clear()
        elif passed % pl_module.collect_every == 0:
            trained = pl_module.net.named_parameters()
            self.moments.add({name: param for name, param in trained if param.requires_grad})

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.moments))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.moments).update(state_dict)
