"""Compare the time of an evaluation suite and of plain forward passes: python benchmarks/suite.py

The suite is that of `python evaluate.py suite=paper` on MNIST, except for the splits: test images,
out-of-distribution images and 15 distorted sets are made, predicted with the same draws, and
scored. The other side runs as many plain passes of the float network over as many images, which are
already in memory. The sides are timed in pairs within one run, so that noise of the machine affects
both, and the result is the median of the ratios. Images are random and networks untrained, which
does not change the time.
"""

import argparse
import statistics
from typing import Any

import torch
from random_data import RandomImages
from torch import Tensor, nn
from train_step import machine, seconds

from bqnn.checkpoints.recipe import build
from bqnn.data.images import ImageData
from bqnn.evaluation.suite import judge, make_sets, predict_sets
from bqnn.inference.predict import BATCH_SIZE
from bqnn.methods import Method
from bqnn.training.process import keep_freed_memory

SUITE = {
    "splits": ["test"],
    "ood": ["uniform"],
    "distortions": ["rotation", "shift", "brightness"],
}
METHODS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "bbb": {"prior_std": 0.1, "init_rho": -5.0, "beta": 1.0},
    "mcdropout": {"rate": 0.2, "drop_before_output": True},
    "sghmc": {"burn_in": 0, "collect_every": 1, "num_members": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000, help="in each of the 17 sets")
    parser.add_argument("--samples", type=int, default=20, help="draws; 1 for pointwise")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["bbb", "mcdropout"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as the command line does
    print(machine(arguments.threads))
    print(f"17 sets of {arguments.images} images, {arguments.samples} draws,", end=" ")
    print(f"batches of {BATCH_SIZE}; seconds of the suite / of plain float passes, and their ratio")
    data = RandomImages(arguments.images, batch_size=256)
    data.setup()
    for name in arguments.methods:
        model = _model(name, data, arguments.samples)
        _compare(name, model, data, arguments.pairs)


def _compare(name: str, model: Method, data: ImageData, num_pairs: int) -> None:
    plain = _model("pointwise", data, 1).net
    images = data.normalize(data.test.inputs).to(memory_format=torch.channels_last)
    num_samples = model.available_samples
    model.predictive(images[:BATCH_SIZE], 1)  # warm up
    _passes(plain, images[:BATCH_SIZE], 1)
    pairs = []
    for _ in range(num_pairs):
        suite = seconds(lambda: _suite(model, data, num_samples))
        pairs.append((suite, seconds(lambda: _passes(plain, images, 17 * num_samples))))
    ratio = statistics.median(suite / passes for suite, passes in pairs)
    suite, passes = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"{name:<10} {suite:8.2f} s / {passes:8.2f} s = {ratio:5.2f}", flush=True)


def _suite(model: Method, data: ImageData, num_samples: int) -> None:
    sets = make_sets(data, SUITE)
    assert len(sets) == 17
    judge(predict_sets(model, sets, data.normalize, num_samples))


@torch.no_grad()
def _passes(net: nn.Module, images: Tensor, count: int) -> None:
    for _ in range(count):
        for batch in images.split(BATCH_SIZE):
            net(batch)


def _model(name: str, data: ImageData, num_samples: int) -> Method:
    options = METHODS[name]
    method = {
        "name": name,
        "num_samples": 1 if name == "pointwise" else num_samples,
    }
    recipe = {
        "seed": 0,
        "method": {**method, "optimizer": {}, **options},
        "net": {"name": "lenet"},
        "facts": data.facts(),
    }
    model = build(recipe)
    if name == "sghmc":
        for _ in range(num_samples):
            model.net.collect()  # type: ignore[operator]
    return model.eval()


if __name__ == "__main__":
    main()
