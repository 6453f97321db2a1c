"""A model as one ONNX file: normalization, the network once for each draw, and their mixture."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bqnn.data.normalization import Normalization
from bqnn.export.masks import RandomMasks
from bqnn.export.mixture import write_mixture
from bqnn.inference.likelihoods import Classification
from bqnn.inference.predict import evaluation_draw
from bqnn.layers.dropout import MCDropout, one_mask_for_all_rows
from bqnn.methods import Method
from bqnn.quant.onnx.exact import ExactForm
from bqnn.quant.onnx.graph import Graph, Port, value_info
from bqnn.quant.onnx.network import Form, NetworkWriter
from bqnn.quant.onnx.qdq import QdqForm
from bqnn.quant.onnx.values import Value
from bqnn.seeds import Stream, stream_seed

NUM_EXAMPLES = 3  # rows with which the network is walked
FORMS: Mapping[str, Any] = {"exact": ExactForm, "qdq": QdqForm}


@dataclass(frozen=True, eq=False)
class Exported:
    """A model of ONNX, and what its outputs come from.

    Attributes:
        proto: The model, an onnx.ModelProto.
        form: `exact` or `qdq`.
        inputs: The input of the model.
        steps: The step of the grid of each output of each draw [S, num_outputs].
        float_parts: What computes in float, outside of the integers.
        masks: The masks of MC dropout that the file draws itself, of all draws.
        rates: Their dropout rates.
    """

    proto: Any
    form: str
    inputs: Port
    steps: Tensor
    float_parts: list[str]
    masks: list[Port] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def content(self, *, with_masks: bool = False) -> bytes:
        """Return the content of the file.

        Args:
            with_masks: Whether the masks that the file draws are outputs, too.
        """
        if not with_masks:
            return bytes(self.proto.SerializeToString())
        shown = type(self.proto)()
        shown.CopyFrom(self.proto)
        shown.graph.output.extend(map(value_info, self.masks))
        return bytes(shown.SerializeToString())


@torch.no_grad()
def export(model: Method, num_samples: int, form: str = "exact", masks: str = "fixed") -> Exported:
    """Write a quantized model as ONNX.

    Draw s of the file is draw s of bqnn's int8 with the seed of the model. MC dropout has one mask
    in each draw for all rows: that of a row that bqnn predicts alone. With random masks, the
    runtime draws a mask for each row in each call. The calibration of a model applies to all
    outputs except `samples`.

    Args:
        model: The model with fake quantization, in evaluation mode, with its recipe.
        num_samples: The number of draws S.
        form: `exact` or `qdq`.
        masks: `fixed` or `random`.

    Returns:
        The model of ONNX, checked against the standard.

    Raises:
        ValueError: The recipe has no normalization, the file would be too large, or there is no MC
            dropout whose masks could be random.
        TypeError: The network has an operation that cannot be exported. The message names it.
    """
    assert model.recipe is not None
    facts = model.recipe["facts"]
    graph = Graph()
    shape: list[int] = facts["input_shape"]
    inputs, port = write_normalization(graph, _normalization(facts), shape, form)
    writer = _writer(masks, graph, _form(form, graph), model)
    generator = torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))
    example = torch.randn(NUM_EXAMPLES, *shape, generator=generator)
    net = deepcopy(model.net).cpu().eval()
    draws = []
    with one_mask_for_all_rows(net):
        for index in range(num_samples):
            with evaluation_draw(net, index, model.seed) as restart_masks:
                restart_masks()
                draws.append(writer.write(net, Value(inputs, example)))
    names = [draw.name for draw in draws]
    samples, outputs = write_mixture(graph, names, model.likelihood, model.calibration)
    sizes = (num_samples, "N", model.likelihood.num_outputs)
    outputs = {samples: Port("samples", np.dtype(np.float32), sizes), **outputs}
    proto = graph.to_onnx([port], outputs, metadata(form, masks, model))
    steps = torch.stack([_steps(draw) for draw in draws])
    exported = Exported(proto, form, port, steps, sorted(writer.float_parts))
    if isinstance(writer, RandomMasks):
        return replace(exported, masks=writer.masks, rates=writer.rates)
    return exported


def metadata(form: str, masks: str, model: Method) -> dict[str, str]:
    """Return what stands in a file besides its graph, such as the names of classes."""
    found = {"bqnn.form": form, "bqnn.masks": masks, "bqnn.seed": str(model.seed)}
    if isinstance(model.likelihood, Classification):
        found["bqnn.class_names"] = json.dumps(model.likelihood.class_names)
    if model.calibration is not None:
        found["bqnn.calibration"] = json.dumps(model.calibration.to_dict())
    return found


def write_normalization(
    graph: Graph, normalization: Normalization, shape: list[int], form: str
) -> tuple[str, Port]:
    """Write the normalization of rows in the units of the data, as `Normalization` computes it.

    Args:
        graph: The graph to write into.
        normalization: The normalization.
        shape: The shape of a row.
        form: The form of the file. `qdq` computes in float32, since hardware has no float64.

    Returns:
        The name of the normalized rows, and the input `inputs`: pixels [N, C, H, W] in uint8 or
        features [N, F], in float64 or, for `qdq`, float32.
    """
    scale = normalization.scale
    is_double = scale is None and form == "exact"
    dtype = np.float64 if is_double else np.float32
    rows = "inputs"
    if scale is not None:
        rows = graph.call("Div", graph.cast(rows, np.float32), graph.constant(np.float32(scale)))
    along = (-1,) if scale is None else (-1, 1, 1)
    mean, std = (
        graph.constant(np.array(values, dtype).reshape(along))
        for values in (normalization.mean, normalization.std)
    )
    rows = graph.call("Div", graph.call("Sub", rows, mean), std)
    if is_double:
        rows = graph.cast(rows, np.float32)
    kind = np.dtype(dtype if scale is None else np.uint8)
    return rows, Port("inputs", kind, ("N", *shape))


def _writer(masks: str, graph: Graph, form: Form, model: Method) -> NetworkWriter:
    if masks == "fixed":
        return NetworkWriter(graph, form)
    if not any(isinstance(m, MCDropout) and m.rate > 0 for m in model.net.modules()):
        raise ValueError(
            "masks=random: the network has no MC dropout whose masks could be random; use "
            "masks=fixed"
        )
    return RandomMasks(graph, form, model.seed)


def _form(name: str, graph: Graph) -> Form:
    form: Form = FORMS[name](graph)
    return form


def _normalization(facts: Mapping[str, Any]) -> Normalization:
    found = Normalization.from_facts(facts)
    if found is None:
        raise ValueError(
            "export: the checkpoint does not store how its inputs are normalized, so a file could "
            "not read rows in the units of the data; its data set needs input_mean and input_std "
            "in its facts (see Normalization.facts), and a new training"
        )
    return found


def _steps(draw: Value) -> Tensor:
    """Return the steps of an output [num_outputs]."""
    if draw.steps is None:
        raise TypeError("export: the network has no Leave before its output")
    return draw.steps
