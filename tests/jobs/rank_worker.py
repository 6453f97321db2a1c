"""One of two processes that train every method together, and write their results to a file.

python rank_worker.py <rank> <port> <folder>
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from bqnn.data import SyntheticData
from bqnn.inference.likelihoods import Regression
from bqnn.layers.markers import Enter
from bqnn.methods import METHODS, Method, PostHocGaussian
from bqnn.nets import MLP, ResNet
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from bqnn.training.callbacks import ShareBuffers
from tests.bare_trainer import bare_trainer
from tests.small_methods import made

SGD = {"name": "sgd", "lr": 1e-2}
# bbb has next to no sigma, so that there is no noise to differ, and the prior pulls hard.
OPTIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"optimizer": SGD},
    "bbb": {"prior_std": 0.1, "init_rho": -20.0, "beta": 3.0, "optimizer": SGD},
    "mcdropout": {"rate": 0.2, "drop_before_output": True, "optimizer": SGD},
    "sghmc": {
        "burn_in": 1,
        "collect_every": 1,
        "num_members": 3,
        "schedule": "constant",
        "optimizer": {"name": "sghmc", "lr": 1e-3},
    },
    "swag": {"swa_lr": 1e-2, "swa_start": 0.0, "optimizer": SGD},
    "laplace": {"optimizer": SGD},
    "ensemble": {"num_members": 3, "optimizer": SGD},
}
GLOBAL_BATCH = 20


def rows(batch_size: int) -> SyntheticData:
    return SyntheticData(num_train=100, num_test=30, batch_size=batch_size, validation_share=0.2)


def make(name: str, data: SyntheticData) -> Method:
    data.setup()
    torch.manual_seed(0)
    net = MLP([1], [1, 1], hidden_features=[16, 16])
    options = {**OPTIONS[name], "num_samples": 3, "val_samples": 2}
    return made(name, net, Regression(0.0, 1.0), num_train=len(data.train), seed=0, **options)


def with_batch_norm(data: SyntheticData) -> Method:
    """Make a residual network that sees each number as an image of one color."""
    data.setup()
    torch.manual_seed(0)
    net = ResNet([1, 8, 8], [1, 1], width=4, blocks_per_stage=[1])
    stem: Any = net.stem
    stem[0] = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 1, 1)), Spread(), Enter())
    return METHODS["pointwise"](
        net, Regression(0.0, 1.0), num_train=len(data.train), seed=0, optimizer=SGD
    )


class Spread(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 1, 8, 8)


def fit(method: Method, data: SyntheticData, callbacks: list[pl.Callback], **options: Any) -> Any:
    """Train two epochs and test; return the metrics and the state of the method."""
    trainer = bare_trainer(
        2,
        callbacks=[ShareBuffers(), *callbacks],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        **options,
    )
    trainer.fit(method, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics |= trainer.test(method, datamodule=data, verbose=False)[0]
    return {"metrics": metrics, "state": method.state_dict()}


def main(rank: str, port: str, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": rank, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    two: dict[str, Any] = {"strategy": "ddp", "devices": 2}
    seen = {}
    for name in METHODS:
        data = rows(GLOBAL_BATCH // 2)
        seen[name] = fit(make(name, data), data, [], **two)
        quantize = QuantizationCallback(QuantSpec(), freeze_epochs=1)
        method = make(name, data)
        if isinstance(method, PostHocGaussian):  # it is quantized after the training
            fit(method, data, [], **two)
            method = method.fine_tuning(SGD, prior_weight=1.0)
        seen[f"{name} quantized"] = fit(method, data, [quantize], **two)
    seen["batch norm"] = fit(with_batch_norm(data), data, [], **two)
    torch.save(seen, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
