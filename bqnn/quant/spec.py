"""QuantSpec: the bit widths and ranges of a quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from bqnn.arguments import ArgumentError, ArgumentTypeError, prefixed, real_number, whole_number
from bqnn.text import short

ENGINES = ("fbgemm", "x86", "onednn", "onnxruntime", "reference")
SYMMETRIC_ONLY = ("onednn", "onnxruntime")


@dataclass(frozen=True)
class QuantSpec:
    """The bit widths and ranges of a quantization.

    Integers have 2 to 8 bits and are stored in 8-bit containers. Activations are unsigned and
    affine. The strategies for Gaussian weights are those of Borras et al. (arXiv 2512.10602).

    Args:
        weight_bits: Bit width of the weights.
        activation_bits: Bit width of the activations.
        output_bits: Bit width of the network's outputs, which no integer layer reads; None for
            `activation_bits`.
        weight_granularity: One scale per output `channel`, or one per `tensor`.
        weight_symmetric: Whether the zero point of the weights is 0.
        weight_observer: Range of the weights: `minmax` of their current values, the
            `moving_average` of minimum and maximum, or `least_squares`, which cuts the range of the
            current values to the share with the smallest squared error.
        activation_observer: Range of the activations: `moving_average` or `minmax` over training
            batches, or `histogram`, which minimizes the squared error over the batches of a
            calibration, or over the first batch of each epoch of a training.
        strategy: For Gaussian weights, the rounded quantities: the `parameters` mu and sigma (draws
            are rounded to 8 bits), the drawn `weights`, or `both`.
        sigma_bits: For Gaussian weights, the bit width of sigma; None for `weight_bits`.
        sigma_grid: For Gaussian weights, the spacing of sigma's grid: `linear` or `log`.
        noise_bits: For Gaussian weights, the bit width of eps and of sigma * eps.
        noise_range: For Gaussian weights, the range of the noise in standard deviations.
        rounding: For Gaussian weights, the rounding of the noise of a draw: `nearest`, or
            `stochastic`, which keeps its variance; None for `stochastic` where drawn weights have
            3 bits or fewer.
        weight_rounding: Integers of the weights: the `nearest` ones, or `adaptive` ones, which
            minimize the error of the outputs of each layer; it supports only calibration.
        bias_correction: Whether calibration changes the biases so that the mean outputs of each
            layer stay as in float. Layers without a bias get one.
        engine: What executes the integers: `fbgemm`, `x86`, `onednn`, `onnxruntime` or
            `reference`.
        overrides: Dictionaries with the key `layer`, a glob over layer names, and bit widths for
            these layers; the last match wins.
        keep: Globs over the names of modules that stay in float with all that they contain, for
            networks without their own Enter and Leave.

    Raises:
        ValueError: A value is invalid.
        TypeError: A number has an invalid type.

    Examples:
        >>> spec = QuantSpec(weight_bits=4, overrides=[{"layer": "output.*", "weight_bits": 8}])
        >>> spec.for_layer("features.1").weight_bits, spec.for_layer("output.0").weight_bits
        (4, 8)
    """

    weight_bits: int = 8
    activation_bits: int = 7
    output_bits: int | None = 8
    weight_granularity: str = "channel"
    weight_symmetric: bool = True
    weight_observer: str = "minmax"
    activation_observer: str = "moving_average"
    strategy: str = "both"
    sigma_bits: int | None = None
    sigma_grid: str = "linear"
    noise_bits: int = 8
    noise_range: float = 3.0
    rounding: str | None = None
    weight_rounding: str = "nearest"
    bias_correction: bool = False
    engine: str = "fbgemm"
    overrides: tuple[Mapping[str, Any], ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in BITS:
            object.__setattr__(self, name, _checked_bits(name, getattr(self, name)))
        _check_choice("weight_granularity", self.weight_granularity, ("channel", "tensor"))
        _check_choice(
            "weight_observer", self.weight_observer, ("minmax", "moving_average", "least_squares")
        )
        _check_choice(
            "activation_observer",
            self.activation_observer,
            ("moving_average", "minmax", "histogram"),
        )
        _check_choice("strategy", self.strategy, ("both", "parameters", "weights"))
        _check_choice("sigma_grid", self.sigma_grid, ("linear", "log"))
        if self.rounding is not None:
            _check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        _check_choice("weight_rounding", self.weight_rounding, ("nearest", "adaptive"))
        _check_choice("engine", self.engine, ENGINES)
        for name in ("weight_symmetric", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                shown = _shown(getattr(self, name))
                raise ArgumentError(f"{name}={shown}: choose true or false", name)
        if self.weight_rounding == "adaptive" and self.strategy == "weights":
            raise ArgumentError(
                "weight_rounding=adaptive chooses the integers of means, and strategy=weights "
                "rounds only drawn weights; choose strategy=both or parameters",
                *("weight_rounding", "strategy"),
            )
        reason = "in standard deviations, above 0; 3 is usual"
        noise_range = real_number("noise_range", self.noise_range, reason, 0, without=(0,))
        object.__setattr__(self, "noise_range", noise_range)
        check_symmetry(self.engine, self.weight_symmetric)
        object.__setattr__(self, "overrides", tuple(_checked_override(o) for o in self.overrides))
        object.__setattr__(self, "keep", _checked_keep(self.keep))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> QuantSpec:
        """Create a spec from the options of a configuration or recipe.

        Args:
            options: Arguments by name.

        Raises:
            ValueError: A key or a value is invalid.

        Examples:
            >>> QuantSpec.from_dict({"weight_bits": 4}).weight_bits
            4
        """
        known = {field.name for field in fields(cls)}
        options = {key: value for key, value in options.items() if key not in RETIRED}
        options = {**BEFORE, **options}
        for key in options:
            if key not in known:
                raise ArgumentError(f"{_shown(key)}: no such option of a quantization", _shown(key))
        overrides = options.get("overrides", ())
        if not isinstance(overrides, list | tuple) or len(overrides) > 1000:
            raise ArgumentError(
                f"overrides={_shown(overrides)}: give a list of at most 1000 dictionaries",
                "overrides",
            )
        try:
            return cls(**options)
        except ArgumentTypeError as error:  # in a file, a wrong type is a wrong value
            raise ArgumentError(str(error), *error.names) from None

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> QuantSpec:
        """Create a spec from the group `quant` of a configuration.

        The options of the procedure, such as `mode`, are ignored, except that the default observer
        of a training is `moving_average` above 4 activation bits.

        Args:
            options: The group.

        Raises:
            ValueError: An option is invalid. The message names its key.
        """
        with prefixed("quant"):
            if options["mode"] not in ("qat", "ptq"):
                raise ArgumentError(
                    f"mode={_shown(options['mode'])}: choose qat (quantization-aware training) or "
                    "ptq (post-training quantization)",
                    "mode",
                )
            spec = {key: value for key, value in options.items() if key not in PROCEDURE}
            if spec.get("activation_observer") is None:
                spec["activation_observer"] = "histogram"
                made = cls.from_dict(spec)
                if options["mode"] == "qat" and made.activation_bits > FEW_ACTIVATION_BITS:
                    made = replace(made, activation_observer="moving_average")
            else:
                made = cls.from_dict(spec)
            if options["mode"] == "qat":
                made.check_trainable()
            return made

    def to_dict(self) -> dict[str, Any]:
        """Convert the spec to JSON types."""
        overrides = [dict(override) for override in self.overrides]
        return {**asdict(self), "overrides": overrides, "keep": list(self.keep)}

    def for_layer(self, name: str, is_output: bool = False) -> QuantSpec:
        """Return the spec of a layer, with its overrides applied.

        Args:
            name: The name of the layer in the network.
            is_output: Whether the layer computes the outputs, which have `output_bits`.
        """
        bits: dict[str, Any] = {}
        if is_output and self.output_bits is not None:
            bits["activation_bits"] = self.output_bits
        for override in self.overrides:
            if fnmatchcase(name, override["layer"]):
                bits |= {key: value for key, value in override.items() if key != "layer"}
        return replace(self, **bits, overrides=()) if bits or self.overrides else self

    @property
    def draw_bits(self) -> int:
        """The bit width of drawn weights."""
        return 8 if self.strategy == "parameters" else self.weight_bits

    @property
    def rounds_at_random(self) -> bool:
        """Whether the noise of a draw is rounded at random."""
        if self.rounding is None:
            return self.draw_bits <= FEW_BITS
        return self.rounding == "stochastic"

    def check_trainable(self) -> None:
        """Raise a ValueError if an option supports only calibration."""
        for name, is_set in (
            ("weight_rounding=adaptive", self.weight_rounding == "adaptive"),
            ("bias_correction=true", self.bias_correction),
        ):
            if is_set:
                raise ArgumentError(
                    f"{name}: it supports only calibration, and a training moves weights and "
                    "biases by itself; leave it out",
                    name.partition("=")[0],
                )

    def check_overrides(self, names: list[str]) -> None:
        """Raise a ValueError if an override matches none of these layer names."""
        for override in self.overrides:
            if not any(fnmatchcase(name, override["layer"]) for name in names):
                raise ArgumentError(
                    f"overrides: layer={short(override['layer'])} matches no layer; choose from "
                    f"{', '.join(names)}",
                    "overrides",
                )


FEW_ACTIVATION_BITS = 4  # a training takes ranges with the least squared error there
FEW_BITS = 3  # of weights: most of the noise is smaller than half a step
RETIRED = ("allow_saturation",)  # in recipes of older versions; without effect
BEFORE = {"rounding": "nearest"}  # what recipes of older versions do not say
PROCEDURE = ("name", "mode", "control", "freeze_epochs", "budget", "fine_tuning")
LAYER_BITS = ("weight_bits", "activation_bits", "sigma_bits", "noise_bits")
BITS = (*LAYER_BITS, "output_bits")


def check_symmetry(engine: str, is_symmetric: bool) -> None:
    """Raise an ArgumentError if an engine does not support weights with zero points."""
    if engine in SYMMETRIC_ONLY and not is_symmetric:
        raise ArgumentError(
            f"engine={engine} supports only symmetric weights; set weight_symmetric=true, "
            f"or choose {' or '.join(e for e in ENGINES if e not in SYMMETRIC_ONLY)}",
            *("engine", "weight_symmetric"),
        )


def _checked_bits(name: str, bits: object) -> int | None:
    if name in ("sigma_bits", "output_bits") and bits is None:
        return None
    return whole_number(name, bits, "integers are stored in 8 bits; choose 2 to 8", 2, 8)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if type(value) is not str or value not in choices:
        raise ArgumentError(f"{name}={_shown(value)}: choose {' or '.join(choices)}", name)


def _checked_override(override: object) -> dict[str, Any]:
    if not isinstance(override, Mapping):
        raise ArgumentError(
            f"overrides: {short(override)} is not a dictionary; write "
            "'overrides=[{layer: output.*, weight_bits: 8}]'",
            "overrides",
        )
    for key in override:
        if key not in ("layer", *LAYER_BITS):
            raise ArgumentError(
                f"overrides: {_shown(key)} cannot be set for single layers; an entry has the key "
                f"layer (a glob) and at least one of {', '.join(LAYER_BITS)}",
                "overrides",
            )
    layer = override.get("layer")
    if type(layer) is not str or len(layer) > 200 or len(override) < 2:
        keys = ", ".join(sorted(_shown(key) for key in override))
        raise ArgumentError(
            f"overrides: an entry with {keys or 'no keys'} needs the key layer (a glob) and at "
            f"least one of {', '.join(LAYER_BITS)}",
            "overrides",
        )
    return {
        name: value if name == "layer" else _checked_bits(name, value)
        for name, value in override.items()
    }


def _checked_keep(keep: object) -> tuple[str, ...]:
    globs = tuple(keep) if isinstance(keep, list | tuple) else (None,)
    if len(globs) > 1000 or not all(type(glob) is str and 0 < len(glob) <= 200 for glob in globs):
        raise ArgumentError(
            f"keep={_shown(keep)}: give a list of at most 1000 globs over names of modules, such "
            "as [features.*.se]",
            "keep",
        )
    return globs


def _shown(value: object) -> str:
    """Format a value for a message as on the command line: strings without quotes."""
    return short(value)[1:-1] if type(value) is str else short(value)
