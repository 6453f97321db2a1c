"""Base class of methods that train a network, and then put a Gaussian around its weights."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bqnn.inference.likelihoods import Likelihood
from bqnn.layers.bayes import GaussianWeight, JointPosterior, held_means, to_bayes
from bqnn.layers.markers import Quantized
from bqnn.methods.base import Batch, Method
from bqnn.methods.epochs import is_last_epoch
from bqnn.methods.start import PointwiseStart
from bqnn.methods.terms import Terms

NO_SIGMA = -80.0  # rho before there is a posterior: a draw then equals the mean


class PostHocGaussian(PointwiseStart):
    """Base class for methods that set sigma after the training, from what was trained.

    The training moves the means without noise, as a pointwise method does. Sigma is set after the
    last epoch: until then, all draws are equal. Subclasses implement `set_posterior`.

    A fine-tuning keeps sigma. It minimizes the expected NLL of draws, plus weight decay, over the
    means and the other parameters.

    Args:
        net: The network. Its linear layers and convolutions get Gaussian weights.
        keep: Types of modules whose parameters keep point values, see `to_bayes`.
        options: Arguments of `Method`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        *,
        keep: type[nn.Module] | Collection[type[nn.Module]] = (),
        **options: Any,
    ) -> None:
        super().__init__(to_bayes(net, init_rho=NO_SIGMA, keep=keep), likelihood, **options)
        self.is_fine_tuned = False
        for layer in self.gaussian_weights().values():
            layer.rho.requires_grad_(False)

    def set_posterior(self, batches: Iterable[Batch], validation: Collection[Batch]) -> None:
        """Set the posterior of the trained network.

        Args:
            batches: The training rows, as normalized inputs [B, ...] and targets [B].
            validation: The validation rows in the same form; empty if there are none.
        """
        raise NotImplementedError

    def gaussian_weights(self) -> dict[str, GaussianWeight]:
        """Return the layers with Gaussian weights, by their names in the network."""
        modules = self.net.named_modules()
        return {name: module for name, module in modules if isinstance(module, GaussianWeight)}

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> Terms:
        with JointPosterior(self.net) if self.is_fine_tuned else held_means(self.net):
            return super().loss_terms(inputs, targets)

    def fine_tuning(self, optimizer: dict[str, Any], prior_weight: float) -> Method:
        self.is_fine_tuned = True
        return super().fine_tuning(optimizer, prior_weight)

    def configure_callbacks(self) -> list[pl.Callback]:
        added = [] if self.is_fine_tuned else [SetPosterior()]
        return [*super().configure_callbacks(), *added]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        is_quantized = any(isinstance(module, Quantized) for module in self.net.modules())
        if is_quantized and not self.is_fine_tuned:
            raise ValueError(
                f"QuantizationCallback: {type(self).__name__} sets sigma after the training, and "
                "the ranges of a training without sigma are too narrow; train in float "
                "(quant=none), then quantize the result"
            )


class SetPosterior(pl.Callback):
    """Set the posterior of a `PostHocGaussian` after the last epoch.

    A checkpoint also has what the posterior has replaced, so that a resumed training continues
    from there.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.replaced:
            pl_module.load_state_dict(self.replaced, strict=False)
            self.replaced = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PostHocGaussian)
        if not is_last_epoch(trainer):
            return
        before = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.set_posterior(_training_batches(trainer), _validation_batches(trainer))
        after = pl_module.state_dict()
        self.replaced = {n: v for n, v in before.items() if not torch.equal(v, after[n])}
        pl_module.train()

    def state_dict(self) -> dict[str, Any]:
        return {"replaced": self.replaced} if self.replaced else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.replaced = state_dict["replaced"]


def _training_batches(trainer: pl.Trainer) -> Iterator[Batch]:
    """Yield the batches of an epoch, on the device of the training."""
    loader = trainer.train_dataloader
    assert loader is not None
    for batch in islice(loader, int(trainer.num_training_batches)):
        yield trainer.strategy.batch_to_device(batch)


def _validation_batches(trainer: pl.Trainer) -> list[Batch]:
    """Return the batches of a validation, on the device of the training."""
    if not trainer.enable_validation:
        return []
    trainer.validating = True  # so that the data set does not augment them
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # there may have been no validation yet
    found = trainer.val_dataloaders
    loaders = found if isinstance(found, list) else [found]
    batches = [
        trainer.strategy.batch_to_device(batch)
        # Without loaders, Lightning still counts the batches of one.
        for loader, count in zip(loaders, trainer.num_val_batches, strict=bool(loaders))
        for batch in islice(loader, None if count == float("inf") else int(count))
    ]
    trainer.training = True
    return batches


def num_ranks() -> int:
    """Return the number of processes that train the network together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of the tensors of all ranks."""
    x = x.clone()
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x
