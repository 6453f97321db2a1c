"""The grids of a Gaussian posterior: mu, sigma, the noise, and the weights drawn from them."""

import torch
from torch import Tensor, nn

from bqnn.quant.fbgemm import FakeQuant, make_fake_quant, make_fixed_fake_quant
from bqnn.quant.spec import QuantSpec


class LogFakeQuant(nn.Module):
    """Rounds positive numbers to log-spaced levels between the smallest and the largest.

        log(x_q) = log_max + Q(log(x) - log_max)

    with Q a grid whose largest point is zero. The levels between keep their ratio, so that small
    standard deviations survive at few bits.
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
        """The level of each entry, 0 the smallest, in uint8."""
        log_max = FakeQuant.along(x, self.log_max)
        return self.exponent.integers(x.clamp_min(1e-30).log() - log_max)

    def dequantize(self, integers: Tensor) -> Tensor:
        """The numbers that levels stand for, bit for bit those that `forward` gives."""
        log_max = FakeQuant.along(integers, self.log_max)
        return (self.exponent.dequantize(integers) + log_max).exp()


class GaussianGrids(nn.Module):
    """The grids of mu, sigma and the weights w drawn from N(mu, sigma^2).

    With the strategy `both`, w = Q(Q(mu) + Q(Q(sigma) Q(eps))); the last Q has the grid of mu, so
    that a weight without noise is not rounded twice. With `parameters`, w = Q8(Q(mu) + Q(sigma)
    eps); with `weights`, w = Q(mu + sigma eps). Ranges come from mu and sigma, as far as
    noise_range standard deviations: no draw has to be watched.
    """

    def __init__(self, spec: QuantSpec, num_channels: int) -> None:
        super().__init__()
        channels = num_channels if spec.weight_granularity == "channel" else None
        sigma_bits = spec.weight_bits if spec.sigma_bits is None else spec.sigma_bits
        self.noise_range = spec.noise_range
        self.weight = weight_fake_quant(
            spec, num_channels, bits=8 if spec.strategy == "parameters" else None
        )
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
        """Q(mu) and Q(sigma); in training mode their ranges are set first."""
        if self.sigma is not None:
            sigma = self.sigma(sigma)
        if self.weight.training and not self.weight.frozen:
            with torch.no_grad():
                reach = self.noise_range * sigma
                extremes = torch.cat([mean - reach, mean + reach], dim=1)
                self.weight.watch(extremes)
                if self.mean is not None:
                    self.mean.watch(extremes)
                if self.product is not None:
                    self.product.watch(reach)
        return (mean if self.mean is None else self.mean.round(mean)), sigma

    def draw(self, mean: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        """One draw of the weights, on the grid of `weight`, from Q(mu), Q(sigma) and noise."""
        if self.noise is None or self.product is None:
            return self.weight.round(torch.addcmul(mean, sigma, eps))
        return self.weight.round(self.product.round(self.noise.round(eps) * sigma) + mean)


def weight_fake_quant(spec: QuantSpec, num_channels: int, bits: int | None = None) -> FakeQuant:
    """The grid of a layer's weights, with a scale per output channel or one for all."""
    return make_fake_quant(
        spec.weight_bits if bits is None else bits,
        signed=True,
        symmetric=spec.weight_symmetric,
        channels=num_channels if spec.weight_granularity == "channel" else None,
        observer=spec.weight_observer,
    )


def activation_fake_quant(spec: QuantSpec) -> FakeQuant:
    """The grid of an activation: unsigned, affine, one scale."""
    kind = spec.activation_observer
    return make_fake_quant(
        spec.activation_bits,
        signed=False,
        observer="running_minmax" if kind == "minmax" else kind,
    )
