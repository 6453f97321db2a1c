"""Build a model from its recipe, and load a model from a checkpoint file."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bqnn.arguments import keywords, prefixed
from bqnn.checkpoints.file import read_checkpoint
from bqnn.checkpoints.schema import check_recipe
from bqnn.inference.calibration import calibration_from
from bqnn.inference.likelihoods import Likelihood, likelihood_from
from bqnn.jobs.typed import command_line
from bqnn.layers.noise import reseed
from bqnn.methods import METHODS, Method, PointwiseStart
from bqnn.methods.base import channels_last
from bqnn.nets import NETS
from bqnn.plugins import find_class, refuse_foreign
from bqnn.quant.callback import quantize_module
from bqnn.quant.fake_quant import FakeQuant
from bqnn.quant.integer import convert
from bqnn.quant.simulated import enable
from bqnn.quant.spec import QuantSpec
from bqnn.seeds import Stream, stream_seed
from bqnn.settings.options import is_plugin
from bqnn.text import one_line, printable, short

log = logging.getLogger(__name__)

Recipe = dict[str, Any]
LARGEST_PROBE = 2**18  # values in all inputs together; an image of 3x224x224 has 150,528
NUMERICS = ("unquantized", "simulated", "int8")


def make_recipe(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Recipe:
    """Collect everything that a model is rebuilt from.

    Args:
        config: The resolved configuration of a job.
        facts: The properties of the data set, from `TensorData.facts`.

    Returns:
        The recipe of a float model, in plain JSON types.

    Raises:
        ValueError: The recipe does not match the schema.
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
    check_recipe(recipe)  # fail before the training, not when the model is loaded
    return recipe


def described(recipe: Recipe | None) -> dict[str, Any]:
    """Return the configuration groups in a recipe, which are empty without a recipe."""
    if recipe is None:
        return {}
    groups = {key: recipe[key] for key in ("method", "net", "task", "seed")}
    if recipe["stage"] == "float":
        return {**groups, "quant": {"name": "none"}}
    return {**groups, "quant": {"name": "checkpoint", "mode": recipe["stage"], **recipe["quant"]}}


def start_keys(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the keys of a method's configuration that set the start of the training.

    They are not arguments of the method's class, because a model that is loaded does not start.
    """
    can_start = isinstance(method, type) and issubclass(method, PointwiseStart)
    return ("init_from",) if can_start else ()


def build(recipe: Recipe) -> Method:
    """Build the untrained model that a recipe describes.

    Args:
        recipe: A recipe, as `make_recipe` returns it. Its seed determines the initial weights.

    Returns:
        The float model, on the CPU.

    Raises:
        ValueError: A name is unknown, or a class does not accept its options.

    Examples:
        >>> recipe = {
        ...     "version": 1, "stage": "float", "seed": 0,
        ...     "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
        ...     "net": {"name": "mlp", "hidden_features": [4]},
        ...     "task": {"name": "table", "dataset": "uci"},
        ...     "facts": {
        ...         "likelihood": "regression", "target_mean": 0.0, "target_std": 1.0,
        ...         "input_shape": [3], "num_train": 100,
        ...     },
        ... }
        >>> build(recipe).eval().predictive(torch.zeros(2, 3)).shape
        torch.Size([1, 2, 2])
    """
    facts = recipe["facts"]
    likelihood = likelihood_from(facts)
    # Found before seeding: the import of a plug-in may draw random numbers.
    net_class = find_class("net", recipe["net"], NETS, nn.Module)
    method = find_class("method", recipe["method"], METHODS, Method)

    def make_net(number: int) -> nn.Module:
        seed = stream_seed(recipe["seed"], Stream.INITIAL_WEIGHTS, number)
        reseed(torch.device("cpu"), seed)
        return _make_net(net_class, recipe["net"], facts["input_shape"], likelihood)

    net = make_net(0)
    no_options = start_keys(method)
    options = {key: value for key, value in recipe["method"].items() if key not in no_options}
    options |= {"num_train": facts["num_train"], "seed": recipe["seed"]}
    if "make_net" in keywords(method):
        options["make_net"] = make_net
    model: Method = _construct(method, "method", options, net, likelihood)
    model.recipe = recipe
    if "calibration" in recipe:
        model.calibration = calibration_from(recipe["calibration"], likelihood)
    return model


def load(
    path: str | Path,
    numeric: str | None = None,
    *,
    trust: bool = False,
) -> Method:
    """Load the model in a checkpoint, which may come from an untrusted source.

    Args:
        path: The path of the checkpoint.
        numeric: The arithmetic of a quantized model: `unquantized` uses its weights without
            rounding, `simulated` (the default) rounds floats to the grids of the integers, and
            `int8` computes in integers. `int8` also compares all layers with the simulation, on a
            few random inputs. None for a float checkpoint.
        trust: Whether to import the method or network of another package that the checkpoint
            names, which runs code.

    Returns:
        The model, on the CPU and in evaluation mode. All weights match by name, shape and dtype.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint of bqnn, is not quantized although `numeric` is
            given, or names code of another package without `trust`.

    Examples:
        >>> import tempfile
        >>> recipe = {
        ...     "version": 1, "stage": "float", "seed": 0,
        ...     "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
        ...     "net": {"name": "mlp", "hidden_features": [4]},
        ...     "task": {"name": "table", "dataset": "uci"},
        ...     "facts": {
        ...         "likelihood": "regression", "target_mean": 0.0, "target_std": 1.0,
        ...         "input_shape": [3], "num_train": 100,
        ...     },
        ... }
        >>> content = {"recipe": recipe, "state_dict": build(recipe).state_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(content, Path(folder, "model.ckpt"))
        ...     model = load(Path(folder, "model.ckpt"))
        >>> model.predictive(torch.zeros(2, 3)).shape
        torch.Size([1, 2, 2])
    """
    if numeric not in (None, *NUMERICS):
        raise ValueError(f"numeric={short(numeric)}: choose one of {', '.join(NUMERICS)}")
    checkpoint, where = read_checkpoint(path), printable(str(path))
    recipe = checkpoint["recipe"]
    if numeric is not None and recipe["stage"] == "float":
        raise ValueError(
            f"numeric={numeric}: {where} is a float checkpoint; quantize it first "
            f"({command_line('quantize')} checkpoint={where})"
        )
    if not trust:
        refuse_foreign({"method": (recipe["method"], METHODS), "net": (recipe["net"], NETS)}, where)
    state = checkpoint["state_dict"]
    _check_fit(recipe, state, where)
    model = _assemble(recipe)
    model.load_state_dict(state)
    model.eval()
    try:
        _check_values(model)
        if numeric == "unquantized":
            enable(model.net, False)
        elif numeric == "int8":
            spec = QuantSpec.from_dict(recipe["quant"])
            model.net = convert(model.net, spec.engine, probe=_probe_inputs(recipe, where))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {one_line(str(error))[:300]}") from error
    return model


def _probe_inputs(recipe: Recipe, where: str) -> torch.Tensor | None:
    """Make a few fixed random inputs [N, ...] to compare integers and simulation.

    Returns None, with a warning, if an input is so large that a small file could exhaust the
    memory: the weights of a convolution do not bound the size of its images.
    """
    shape = recipe["facts"]["input_shape"]
    if prod(shape) > LARGEST_PROBE:
        log.warning(
            "%s: its layers are not compared with their simulation, since an input has more than "
            "%d values; compare the predictions of numeric=int8 and numeric=simulated on some rows",
            where,
            LARGEST_PROBE,
        )
        return None
    count = max(1, min(4, LARGEST_PROBE // prod(shape)))
    generator = torch.Generator().manual_seed(stream_seed(0, Stream.COMPARISON))
    return channels_last(torch.randn(count, *shape, generator=generator))


def _assemble(recipe: Recipe) -> Method:
    """Build the untrained model of a recipe, with fake quantization if it is quantized."""
    model = build(recipe)
    if recipe["stage"] != "float":
        with prefixed("quant"):
            quantize_module(model, QuantSpec.from_dict(recipe["quant"]), recipe["stage"])
    return model


class _CallLimit(TorchFunctionMode):
    """Raises a ValueError after a number of calls of torch functions.

    A recipe of a few bytes can describe a network that takes hours to build on the meta device.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("its recipe describes many more layers than it has weights for")
        return function(*args, **(kwargs or {}))


def _check_fit(recipe: Recipe, state: dict[str, Tensor], where: str) -> None:
    """Refuse a state that does not fit the recipe's model, which is built on the meta device."""
    limit = _CallLimit(1000 + 50 * len(state))  # about 10 per tensor are usual
    try:
        with torch.device("meta"), limit, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copies to the meta device are no-ops, as intended
            model = _assemble(recipe)
            model.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(str(error))[:500]}") from error
    except RuntimeError as error:
        # The first line only says that there are differences; the second is one of them.
        reason = one_line(" ".join(str(error).splitlines()[:2]))[:300]
        raise ValueError(f"{where}: its weights do not match its recipe: {reason}") from error
    except Exception as error:  # a network can raise anything for invalid options
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise ValueError(f"{where}: its recipe does not describe a network: {reason}") from error
    for name, value in model.state_dict().items():
        if state[name].dtype != value.dtype:  # torch would convert it silently and lose digits
            raise ValueError(
                f"{where}: {name} is of {state[name].dtype}, and its recipe's network "
                f"has {value.dtype}"
            )


def _check_values(model: Method) -> None:
    """Refuse weights that are not finite, and grids of quantization that are invalid."""
    for name, value in model.state_dict().items():
        if value.isnan().any():
            raise ValueError(f"{name} has NaN values")
    for name, param in model.named_parameters():
        if not param.isfinite().all():
            raise ValueError(f"{name} has infinite values; the training diverged")
    for name, module in model.named_modules():
        if isinstance(module, FakeQuant):
            scale, zero = module.scale, module.zero_point
            in_range = (module.quant_min <= zero) & (zero <= module.quant_max)
            ends = scale * (module.quant_max - module.quant_min)
            if not (ends.isfinite() & (scale >= 0) & in_range).all():
                raise ValueError(f"{name} has no valid grid: it must be finite and contain 0")


def _make_net(
    called: Callable[..., Any],
    options: Mapping[str, Any],
    input_shape: Sequence[int],
    likelihood: Likelihood,
) -> nn.Module:
    """Build the network of a recipe, with `input_shape` and `heads` if it has these arguments."""
    shapes = {"input_shape": tuple(input_shape), "heads": likelihood.heads}
    accepted = {name: shapes[name] for name in shapes.keys() & keywords(called)}
    net: nn.Module = _construct(called, "net", {**options, **accepted})
    if not is_plugin("net", options):
        return net
    if not isinstance(net, nn.Module):
        raise ValueError(f"net={options['name']} returned {short(net)}, not a torch.nn.Module")
    if not any(tensor.is_meta for tensor in net.parameters()):  # else its weights are not there yet
        _check_outputs(net, str(options["name"]), input_shape, likelihood)
    return net


def _check_outputs(
    net: nn.Module, name: str, input_shape: Sequence[int], likelihood: Likelihood
) -> None:
    """Refuse a network whose outputs are not those that the likelihood needs."""
    inputs, wanted = torch.zeros(2, *input_shape), (2, likelihood.num_outputs)
    meaning = "one output per class" if len(likelihood.heads) == 1 else "a mean and a log variance"
    modes = {module: module.training for module in net.modules()}
    try:
        with torch.no_grad():
            found: object = net.eval()(inputs)
    except Exception as error:  # a network can raise anything
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise ValueError(
            f"net={name} fails on inputs of shape {tuple(inputs.shape)} ({reason}); set its "
            "options for this shape, or give it the argument input_shape"
        ) from error
    for module, mode in modes.items():
        module.training = mode
    shape = tuple(found.shape) if isinstance(found, Tensor) else short(found)
    if shape != wanted:
        raise ValueError(
            f"net={name} has outputs of shape {shape} for inputs of shape {tuple(inputs.shape)}, "
            f"but the data need {wanted}: {meaning}; set its options (such as num_classes), or "
            "give it the argument heads"
        )


def _construct(
    called: Callable[..., Any], group: str, options: Mapping[str, Any], *args: Any
) -> Any:
    """Call a class or function with the options in a group of a recipe."""
    rest = {key: value for key, value in options.items() if key not in ("name", "_target_")}
    try:
        with prefixed(group):
            return called(*args, **rest)
    except TypeError as error:
        raise ValueError(
            f"{group}={options['name']} cannot be built from these options: {one_line(str(error))}"
        ) from error
