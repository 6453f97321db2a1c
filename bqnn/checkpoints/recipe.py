"""From a plain dictionary to a model, and from a checkpoint file to the model it describes."""

import logging
import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bqnn.arguments import prefixed
from bqnn.checkpoints.file import read_checkpoint
from bqnn.checkpoints.schema import check_recipe
from bqnn.inference.likelihoods import likelihood_from
from bqnn.layers.noise import reseed
from bqnn.methods import METHODS, BayesByBackprop, Method
from bqnn.methods.base import channels_last
from bqnn.nets import NETS
from bqnn.quant.callback import quantize_module
from bqnn.quant.fbgemm import FakeQuant
from bqnn.quant.integer import convert
from bqnn.quant.simulated import enable
from bqnn.quant.spec import QuantSpec
from bqnn.seeds import Stream, stream_seed
from bqnn.text import one_line, printable, short

log = logging.getLogger(__name__)

Recipe = dict[str, Any]
LARGEST_PROBE = 2**18  # values of the inputs together; a picture of 3x224x224 has 150,528
NUMERICS = ("unquantized", "simulated", "int8")


def make_recipe(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Recipe:
    """All that a model is rebuilt from, in plain JSON types.

    config: the resolved configuration of a job; facts: what the data set says of itself
    (`TensorData.facts`).
    """
    recipe = {
        "version": 1,
        "stage": "float",
        "seed": config["seed"],
        "method": config["method"],
        "net": config["net"],
        "task": config["task"],
        "facts": dict(facts),
    }
    check_recipe(recipe)  # now, and not when the trained model is to be loaded
    return recipe


def described(recipe: Recipe | None) -> dict[str, Any]:
    """The groups of the configuration that a checkpoint was made with, as far as it tells."""
    if recipe is None:
        return {}
    groups = {key: recipe[key] for key in ("method", "net", "task", "seed")}
    if recipe["stage"] == "float":
        return {**groups, "quant": {"name": "none"}}
    return {**groups, "quant": {"name": "checkpoint", "mode": recipe["stage"], **recipe["quant"]}}


def start_keys(method: str) -> tuple[str, ...]:
    """The keys of a method's configuration that say where its training starts.

    They are no arguments of its class: a model that is built or loaded begins nothing anew.
    """
    return ("init_from",) if issubclass(METHODS.get(method, Method), BayesByBackprop) else ()


def build(recipe: Recipe) -> Method:
    """The untrained model that a recipe describes. A ValueError says what is wrong with it."""
    facts = recipe["facts"]
    likelihood = likelihood_from(facts)
    reseed(torch.device("cpu"), stream_seed(recipe["seed"], Stream.INITIAL_WEIGHTS))
    net = _construct(NETS, "net", recipe["net"], facts["input_shape"], likelihood.heads)
    no_options = start_keys(recipe["method"]["name"])
    options = {key: value for key, value in recipe["method"].items() if key not in no_options}
    options |= {"num_train": facts["num_train"], "seed": recipe["seed"]}
    model: Method = _construct(METHODS, "method", options, net, likelihood)
    model.recipe = recipe
    return model


def load(path: str | Path, numeric: str | None = None, *, allow_saturation: bool = False) -> Method:
    """The model in a checkpoint, in eval mode.

    A quantized checkpoint can be had in three ways: `unquantized`, with its weights but without
    rounding; `simulated`, in floats that lie on the integers' grids (this is the default); and
    `int8`, executed in integers, whose layers are compared with the simulation for a few random
    inputs. ValueError: the file is not a checkpoint of this package, or was not quantized, or this
    CPU would compute other integers (`allow_saturation` makes that a warning). Weights load
    strictly.
    """
    if numeric not in (None, *NUMERICS):
        raise ValueError(f"numeric={short(numeric)}: choose one of {', '.join(NUMERICS)}")
    checkpoint, where = read_checkpoint(path), printable(str(path))
    recipe = checkpoint["recipe"]
    if numeric is not None and recipe["stage"] == "float":
        raise ValueError(
            f"numeric={numeric}: {where} is a float checkpoint; quantize it first "
            f"(python quantize.py checkpoint={where})"
        )
    state = checkpoint["state_dict"]
    _refuse_unfitting(recipe, state, where)
    model = _assembled(recipe)
    model.load_state_dict(state)
    model.eval()
    try:
        _refuse_unusable(model)
        if numeric == "unquantized":
            enable(model.net, False)
        elif numeric == "int8":
            spec = QuantSpec.from_dict(recipe["quant"])
            model.net = convert(
                model.net,
                spec.engine,
                probe=_probe(recipe, where),
                allow_saturation=allow_saturation or spec.allow_saturation,
            )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(str(error))[:300]}") from error
    return model


def _probe(recipe: Recipe, where: str) -> torch.Tensor | None:
    """A few inputs of the shape that the model reads, the same each time.

    None, with a warning, where they are so large that a small file could fill the memory: the
    weights of a convolution do not tell how large its pictures are.
    """
    shape = recipe["facts"]["input_shape"]
    if prod(shape) > LARGEST_PROBE:
        log.warning(
            "%s: its layers are not compared with their simulation, for an input has more than %d "
            "values; compare the predictions of numeric=int8 and numeric=simulated on a few rows",
            where,
            LARGEST_PROBE,
        )
        return None
    count = max(1, min(4, LARGEST_PROBE // prod(shape)))
    generator = torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))
    return channels_last(torch.randn(count, *shape, generator=generator))


def _assembled(recipe: Recipe) -> Method:
    """The model of a recipe, fake-quantized where it is a quantized one; not trained."""
    model = build(recipe)
    if recipe["stage"] != "float":
        with prefixed("quant"):
            quantize_module(model, QuantSpec.from_dict(recipe["quant"]), recipe["stage"])
    return model


class _CallLimit(TorchFunctionMode):
    """ValueError after that many calls of torch.

    A recipe of a few bytes can describe a network that takes hours to build, even without memory.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its recipe describes a network of many more layers than it has")
        return function(*args, **(kwargs or {}))


def _refuse_unfitting(recipe: Recipe, state: dict[str, Tensor], where: str) -> None:
    """ValueError where a state is not that of the recipe's model, which takes no memory here."""
    limit = _CallLimit(1000 + 50 * len(state))  # about 10 for a tensor are usual
    try:
        with torch.device("meta"), limit, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that copies to the meta device copy nothing
            model = _assembled(recipe)
            model.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(str(error))[:500]}") from error
    except RuntimeError as error:
        # The second line is the first difference; the first one says that there are some.
        reason = one_line(" ".join(str(error).splitlines()[:2]))[:300]
        raise ValueError(f"{where}: its weights are not those of its recipe: {reason}") from error
    except Exception as error:  # whatever a network does with options that do not suit it
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise ValueError(f"{where}: its recipe describes no network: {reason}") from error
    for name, value in model.state_dict().items():
        if state[name].dtype != value.dtype:  # torch would convert it, and lose digits
            raise ValueError(
                f"{where}: {name} is of {state[name].dtype}, and its recipe's network "
                f"has {value.dtype} there"
            )


def _refuse_unusable(model: Method) -> None:
    """ValueError for weights that are no numbers, and for grids that no integers lie on."""
    for name, value in model.state_dict().items():
        if value.isnan().any():
            raise ValueError(f"{name} has values that are no numbers (NaN)")
    for name, param in model.named_parameters():
        if not param.isfinite().all():
            raise ValueError(f"{name} has infinite values; the training diverged")
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            scale, zero = module.scale, module.zero_point
            in_range = (module.quant_min <= zero) & (zero <= module.quant_max)
            ends = scale * (module.quant_max - module.quant_min)
            if not (ends.isfinite() & (scale >= 0) & in_range).all():
                raise ValueError(f"{name} has no grid of floats that holds 0")


def _construct(table: Mapping[str, Any], group: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Look `options["name"]` up in a table and call it with the other options."""
    rest = dict(options)
    name = rest.pop("name")
    if name not in table:
        raise ValueError(f"{group}.name={short(name)}: unknown; choose one of {', '.join(table)}")
    try:
        with prefixed(group):
            return table[name](*args, **rest)
    except TypeError as error:
        raise ValueError(
            f"{group}={name} cannot be built from these options: {one_line(str(error))}"
        ) from error
