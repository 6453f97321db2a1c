"""The quantization grids of Gaussian weights: of mu, sigma, the noise, and the drawn weights."""

import torch
from torch import Tensor, nn

from bqnn.arguments import ArgumentError
from bqnn.layers.bayes import GaussianWeight
from bqnn.layers.draws import evaluation_uniform
from bqnn.quant.fake_quant import FakeQuant, make_fake_quant, make_fixed_fake_quant
from bqnn.quant.spec import QuantSpec

QUANTILES = (-1.2816, -0.5244, 0.0, 0.5244, 1.2816)  # of N(0, 1), at 10, 30, ... 90 %


class LogFakeQuant(nn.Module):
    """Rounds positive numbers to log-spaced levels from the smallest to the largest.

        log(x_q) = log_max + Q(log(x) - log_max)

    Q is a grid whose largest value is 0. Neighboring levels have a constant ratio, so that small
    standard deviations do not become 0 at low bit widths.

    Args:
        bits: The bit width.
        channels: The number of channels in dimension 0, each with its own grid, or None.

    Examples:
        >>> quant = LogFakeQuant(2, None)
        >>> sigma = torch.tensor([[0.125, 0.25, 0.5, 1.0]])
        >>> torch.allclose(quant(sigma), sigma), quant.integers(sigma)
        (True, tensor([[0, 1, 2, 3]], dtype=torch.uint8))
    """

    log_max: Tensor

    def __init__(self, bits: int, channels: int | None) -> None:
        super().__init__()
        self.exponent = make_fake_quant(bits, signed=False, channels=channels)
        self.register_buffer("log_max", torch.zeros(channels or 1))

    def forward(self, x: Tensor) -> Tensor:
        exponent = self.exponent
        log_x = x.clamp_min(1e-30).log()
        if exponent.training and not exponent.frozen:
            flat = log_x.detach().flatten(1)
            largest = flat.amax() if exponent.channels is None else flat.amax(1)
            self.log_max.copy_(largest)
        log_max = FakeQuant.along(x, self.log_max)
        rounded = exponent(log_x - log_max)
        return (rounded + log_max).exp() if exponent.enabled else x

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """Quantize `x` to the numbers of its levels, in uint8; 0 is the smallest level."""
        log_max = FakeQuant.along(x, self.log_max)
        return self.exponent.integers(x.clamp_min(1e-30).log() - log_max)

    def dequantize(self, integers: Tensor) -> Tensor:
        """Convert the numbers of levels to floats, bit-equal to the results of `forward`."""
        log_max = FakeQuant.along(integers, self.log_max)
        return (self.exponent.dequantize(integers) + log_max).exp()


class GaussianGrids(nn.Module):
    """The grids of mu, sigma and the weights w drawn from N(mu, sigma^2).

    The strategy of the spec defines the rounding of a draw:

        both        w = Q(Q(mu) + Q(Q(sigma) Q(eps)))
        parameters  w = Q8(Q(mu) + Q(sigma) eps)
        weights     w = Q(mu + sigma eps)

    With `both`, mu and w have the same grid, so that a weight without noise is not rounded twice.
    The ranges are mu +- noise_range * sigma, so no draws need to be observed.

    With `rounding=nearest`, noise below half a step of the grid of w disappears, and at few bits
    most of the uncertainty with it. With `rounding=stochastic`, w = Q(mu) + S(sigma eps), where S
    rounds the noise up or down at random such that the variance stays sigma^2, see
    `round_noise`.

    Args:
        spec: Bit widths and ranges.
        num_channels: The number of output channels.
    """

    def __init__(self, spec: QuantSpec, num_channels: int) -> None:
        super().__init__()
        channels = num_channels if spec.weight_granularity == "channel" else None
        sigma_bits = spec.weight_bits if spec.sigma_bits is None else spec.sigma_bits
        self.noise_range = spec.noise_range
        self.rounds_at_random = spec.rounds_at_random
        self.is_searched = spec.weight_observer == "least_squares"
        self.weight = weight_fake_quant(spec, num_channels, bits=spec.draw_bits)
        self.mean: FakeQuant | None = None
        self.sigma: FakeQuant | LogFakeQuant | None = None
        if spec.strategy != "weights":
            self.mean = weight_fake_quant(spec, num_channels)
            if spec.sigma_grid == "log":
                self.sigma = LogFakeQuant(sigma_bits, channels)
            else:
                self.sigma = make_fake_quant(
                    sigma_bits, signed=False, channels=channels, observer=spec.weight_observer
                )
        self.noise: FakeQuant | None = None
        self.product: FakeQuant | None = None
        if spec.strategy == "both":
            self.noise = make_fixed_fake_quant(spec.noise_bits, spec.noise_range)
            self.product = make_fake_quant(
                spec.noise_bits, signed=True, symmetric=True, channels=channels
            )

    def parameters_on_grid(self, mean: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Round mu and sigma; training mode updates the ranges first.

        Args:
            mean: mu of the weights [C, ...].
            sigma: Standard deviations, shaped like `mean`.

        Returns:
            Q(mu) and Q(sigma).
        """
        if self.sigma is not None:
            sigma = self.sigma(sigma)
        if self.weight.training and not self.weight.frozen:
            with torch.no_grad():
                reach = self.noise_range * sigma
                if self.is_searched:  # the quantiles of all weights
                    drawn = torch.cat([mean + z * sigma for z in QUANTILES], dim=1)
                else:
                    drawn = torch.cat([mean - reach, mean + reach], dim=1)
                self.weight.watch(drawn)
                if self.mean is not None:
                    self.mean.watch(drawn)
                if self.product is not None:
                    self.product.watch(reach)
        return (mean if self.mean is None else self.mean.round(mean)), sigma

    def draw(self, mean: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """Draw the weights, on the grid of `weight`.

        Args:
            mean: Q(mu) [C, ...].
            sigma: Q(sigma), shaped like `mean`.
            eps: N(0, 1) noise, shaped like `mean`.
        """
        return self.weight.round(self._drawn(mean, sigma, eps))

    def draw_integers(self, mean: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """Draw the weights as integers of the grid of `weight`; `draw` describes the arguments."""
        return self.weight.integers(self._drawn(mean, sigma, eps))

    def _drawn(self, mean: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """Draw the weights before their last rounding."""
        is_stochastic = self.rounds_at_random and self.weight.enabled
        if self.noise is not None and self.product is not None:
            noise = self.product.round(self.noise.round(eps) * sigma)
        elif is_stochastic:
            noise = sigma * eps
        else:
            return torch.addcmul(mean, sigma, eps)
        if is_stochastic:
            step = FakeQuant.along(noise, self.weight.scale)
            noise = step * round_noise(noise / step, evaluation_uniform(noise))
            mean = self.weight.round(mean)
        return noise + mean


def round_noise(noise: Tensor, uniform: Tensor) -> Tensor:
    """Round noise to whole numbers at random, with its second moment.

    For |n| between the whole numbers k and k + 1,

        P(|S(n)| = k + 1) = (n^2 - k^2) / (2k + 1),

    so that E[S(n)^2] = n^2. The sign stays, so symmetric noise keeps its mean of 0 and its
    variance. Rounding to the nearest number would remove noise below 1/2, and rounding without
    bias, P = |n| - k, would raise the variance to that of a coin.

    Args:
        noise: Noise in steps of the grid, of any shape.
        uniform: Uniform numbers in [0, 1), shaped like `noise`.

    Examples:
        >>> noise = torch.full((1000,), 0.3)
        >>> rounded = round_noise(noise, torch.rand(1000))
        >>> rounded.unique(), bool((rounded.square().mean() - 0.09).abs() < 0.04)
        (tensor([0., 1.]), True)
    """
    magnitude = noise.abs()
    low = magnitude.floor()
    is_up = uniform * (2 * low + 1) < magnitude.square() - low.square()
    return torch.copysign(low + is_up, noise)


def check_rounding(net: nn.Module, spec: QuantSpec) -> None:
    """Raise an ArgumentError for stochastic rounding of a network without Gaussian weights."""
    is_gaussian = any(isinstance(module, GaussianWeight) for module in net.modules())
    if spec.rounding == "stochastic" and not is_gaussian:
        raise ArgumentError(
            "rounding=stochastic: it rounds the noise of Gaussian weights, and this network has "
            "none; leave it out",
            "rounding",
        )


def weight_fake_quant(spec: QuantSpec, num_channels: int, bits: int | None = None) -> FakeQuant:
    """Create the fake quantizer of a layer's weights; `bits` overrides the spec."""
    return make_fake_quant(
        spec.weight_bits if bits is None else bits,
        signed=True,
        symmetric=spec.weight_symmetric,
        channels=num_channels if spec.weight_granularity == "channel" else None,
        observer=spec.weight_observer,
    )


def activation_fake_quant(spec: QuantSpec) -> FakeQuant:
    """Create the fake quantizer of an activation: unsigned and affine, with one scale."""
    kind = spec.activation_observer
    return make_fake_quant(
        spec.activation_bits,
        signed=False,
        observer="running_minmax" if kind == "minmax" else kind,
    )
