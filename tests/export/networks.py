"""Small quantized models to export, and their files in ONNX Runtime."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bqnn.export.model import Exported
from bqnn.export.verification import predict_executed
from bqnn.inference.likelihoods import Classification
from bqnn.methods import METHODS, Method
from bqnn.methods.base import channels_last
from bqnn.quant.fuse import fuse
from bqnn.quant.mark import mark
from bqnn.quant.onnx.session import start_session
from bqnn.quant.simulated import calibrate, prepare
from bqnn.quant.spec import QuantSpec

NUM_SAMPLES = {"pointwise": 1, "sghmc": 2, "bbb": 3, "mcdropout": 3}


def quantized(net: nn.Module, shape: tuple[int, ...], **options: Any) -> Method:
    """A model with a calibrated network that reads pixels, or rows of a table."""
    options = {"activation_observer": "minmax", "output_bits": None, **options}
    spec = QuantSpec(**options)
    torch.manual_seed(5)
    inputs = channels_last(torch.randn(64, *shape))
    simulated = calibrate(prepare(fuse(mark(net, trains=False)), spec), [inputs])
    likelihood = Classification([str(digit) for digit in range(10)])
    adam = {"name": "adam", "lr": 0.01}
    model = METHODS["pointwise"](nn.Linear(1, 10), likelihood, num_train=1, seed=7, optimizer=adam)
    model.net = simulated
    facts: dict[str, Any] = {"input_shape": list(shape), "input_mean": [0.4] * shape[0]}
    facts |= {"input_std": [0.3] * shape[0]}
    if len(shape) == 3:
        facts["input_scale"] = 255.0
    model.recipe = {"facts": facts}
    return model.eval()


def rows_for(model: Method, count: int = 100) -> Tensor:
    """Rows in the units of the data."""
    shape = model.recipe["facts"]["input_shape"]
    generator = torch.Generator().manual_seed(11)
    if len(shape) == 3:
        return torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def run(exported: Exported, rows: Tensor, *, optimized: bool = True) -> dict[str, np.ndarray]:
    """The outputs of a file by name."""
    session = start_session(exported.proto.SerializeToString(), 1, optimized=optimized)
    names = [output.name for output in session.get_outputs()]
    inputs = rows.numpy().astype(exported.inputs.dtype)
    return dict(zip(names, session.run(names, {"inputs": inputs}), strict=True))


def differing(
    exported: Exported, model: Method, *, optimized: bool = True, count: int = 100
) -> int:
    """How many outputs differ from those of a model."""
    rows = rows_for(model, count)
    expected = predict_executed(model, rows, len(exported.steps))
    found = run(exported, rows, optimized=optimized)["samples"]
    assert found.shape == expected.shape
    return int((found != expected.numpy()).sum())
