"""A single pass: the moments of a network's outputs, and draws from them."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bqnn.inference.likelihoods import Likelihood, Regression
from bqnn.inference.precision import full_precision
from bqnn.inference.predict import BATCH_SIZE, predictive_sets
from bqnn.layers.bayes import JointPosterior
from bqnn.layers.draws import Stochastic
from bqnn.layers.ensemble import Ensemble
from bqnn.layers.finite import refuse_non_finite
from bqnn.layers.markers import Quantized
from bqnn.layers.moments import (
    Moments,
    NoMomentsError,
    Rule,
    WithMoments,
    added,
    concatenated,
    rectified,
    rule_of,
)
from bqnn.layers.trace import function_of, trace
from bqnn.seeds import Stream, stream_seed

NUM_SAMPLES = 100  # draws of outputs from their moments, which cost little
MAX_FITTED, FITTED_DRAWS = 512, 10  # the rows and draws to which a factor is fitted
LARGEST_FACTOR = 100.0
REMEDY = "; choose predictive=draws"

# The functions that a network may call between its modules.
FUNCTIONS: Mapping[Any, Rule] = {
    **dict.fromkeys((torch.relu, F.relu, torch.Tensor.relu), lambda x: rectified(x)),
    **dict.fromkeys((operator.add, torch.add, torch.Tensor.add), lambda x, y: added(x, y)),
    torch.cat: lambda parts, dim=0: concatenated(parts, dim),
    torch.flatten: lambda x, *dims, **named: x.each(lambda t: torch.flatten(t, *dims, **named)),
    torch.Tensor.flatten: lambda x, *dims, **named: x.each(lambda t: t.flatten(*dims, **named)),
}


class MomentNetwork:
    """A network whose passes compute means and variances of its outputs.

    Gaussian weights and the masks of MC dropout are integrated out: each value of an activation is
    taken as an independent Gaussian (Wu et al. 2019). Values that share inputs, weights or masks
    are not independent, so the variances are too small; `fit_factor` corrects them.

    Args:
        net: The network, in evaluation mode: in float, or simulated.

    Raises:
        TypeError: A layer has no moments. The message names it.
        ValueError: The network has nothing random, or its draws are members of an ensemble.

    Examples:
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-5.0).eval()
        >>> mean, variance = MomentNetwork(net)(torch.ones(4, 3))
        >>> torch.allclose(variance, net[0].variance.sum(1).expand(4, 2))
        True
    """

    def __init__(self, net: nn.Module) -> None:
        if isinstance(net, Ensemble):
            raise ValueError(
                "predictive=moments: the draws of an ensemble are its members, which have no "
                "Gaussian weights and no dropout; choose predictive=draws"
            )
        modules = list(net.modules())
        leaves = [module for module in modules if isinstance(module, WithMoments)]
        if isinstance(net, Quantized) or (
            not leaves and any(isinstance(module, Quantized) for module in modules)
        ):
            raise TypeError(
                "predictive=moments: an int8 network has no moments; choose numeric=simulated"
            )
        if not any(isinstance(module, Stochastic) for module in modules):
            raise ValueError(
                "predictive=moments: the network has no random weights and no dropout; choose "
                "predictive=draws"
            )
        try:
            self._graph = trace(net, leaves=leaves)
        except TypeError as error:
            raise TypeError(f"predictive=moments: {error}; choose predictive=draws") from error
        named = dict(net.named_modules(remove_duplicate=False))
        with torch.no_grad(), JointPosterior(net):
            self._rules = {node: _rule(node, named) for node in self._graph.nodes}

    @full_precision()
    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        prepare: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Moments:
        """Compute the moments of the outputs.

        Args:
            x: Rows [N, ...].
            prepare: Converts rows to inputs of the network; None for the identity.
            batch_size: The number of rows in a pass.

        Returns:
            Means and variances [N, num_outputs].
        """
        refuse_non_finite(x, "inputs")
        batches = x.split(batch_size)
        parts = [self._pass(rows if prepare is None else prepare(rows)) for rows in batches]
        return concatenated(parts, 0)

    def _pass(self, x: Tensor) -> Moments:
        values: dict[fx.Node, Any] = {}
        for node in self._graph.nodes:
            if node.op == "placeholder":
                values[node] = Moments(x)
            elif node.op == "output":
                out = fx.node.map_arg(node.args[0], values.__getitem__)
                assert isinstance(out, Moments)
                return out
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                try:
                    values[node] = self._rules[node](*args, **kwargs)
                except NoMomentsError as error:
                    raise TypeError(
                        f"predictive=moments: {node.target}: {error}{REMEDY}"
                    ) from error
            for read in node.all_input_nodes:  # activations that nothing reads again are freed
                if list(read.users)[-1] is node:
                    del values[read]
        raise AssertionError("a graph ends with its output")


def _rule(node: fx.Node, modules: Mapping[str, nn.Module]) -> Rule:
    """Return the function that computes the moments of a node.

    Raises:
        TypeError: There is none.
    """
    if node.op in ("placeholder", "output"):
        return Moments
    if node.op == "call_module":
        try:
            return rule_of(modules[str(node.target)])
        except NoMomentsError as error:
            raise TypeError(f"predictive=moments: {node.target} is {error}{REMEDY}") from error
    if (function := FUNCTIONS.get(function_of(node))) is not None:
        return function
    name = getattr(node.target, "__name__", node.target)
    raise TypeError(f"predictive=moments: {name}, which the network calls, has no moments{REMEDY}")


class SinglePass:
    """Predictions of a network by the moments of its outputs.

    The network must not change as long as this object is used.

    Args:
        net: The network, in evaluation mode: in float, or simulated.
        likelihood: The likelihood of the network's outputs.
        prepare: Converts rows to inputs of the network; None for the identity.

    Attributes:
        factor: Multiplies the variances of the outputs; None before `fit`, which counts as 1.

    Raises:
        TypeError: A layer has no moments. The message names it.
        ValueError: The network has nothing random, or its draws are members of an ensemble.

    Examples:
        >>> from bqnn.inference.likelihoods import Classification
        >>> from bqnn.layers.bayes import to_bayes
        >>> net = to_bayes(nn.Sequential(nn.Linear(3, 2)), prior_std=1.0, init_rho=-2.0).eval()
        >>> single_pass, x = SinglePass(net, Classification(["cat", "dog"])), torch.ones(50, 3)
        >>> single_pass.fit(x)
        >>> single_pass.factor > 0
        True
        >>> single_pass.predict(x, num_samples=100).shape
        torch.Size([100, 50, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._net, self._likelihood, self._prepare = net, likelihood, prepare
        self._network = MomentNetwork(net)
        self.factor: float | None = None

    def fit(self, x: Tensor, *, seed: int = 0) -> None:
        """Fit the factor to a few draws of rows, such as training or validation rows.

        Args:
            x: Rows like those that are predicted later, without targets. The first 512 are used.
            seed: The seed of the draws.
        """
        x = x[:MAX_FITTED]
        (draws,) = predictive_sets(self._net, [x], FITTED_DRAWS, prepare=self._prepare, seed=seed)
        moments = self._network(x, self._prepare)
        self.factor = fit_factor(self._likelihood, moments, draws)

    def predict(
        self, x: Tensor, num_samples: int, *, seed: int = 0, batch_size: int = BATCH_SIZE
    ) -> Tensor:
        """Draw outputs for rows from their moments [S, N, num_outputs]."""
        moments = self._network(x, self._prepare, batch_size)
        factor = 1.0 if self.factor is None else self.factor
        return draws_from(moments, num_samples, seed=seed, factor=factor)


def draws_from(moments: Moments, num_samples: int, *, seed: int = 0, factor: float = 1.0) -> Tensor:
    """Draw outputs from their moments.

    All rows have the same noise. If there are enough draws, its mean is exactly 0 and its
    covariance exactly the identity, so that the spread of few draws is that of the moments.

    Args:
        moments: Means and variances of the outputs [N, num_outputs].
        num_samples: The number of draws S.
        seed: The seed of the run.
        factor: Multiplies the variances.

    Returns:
        Draws of the output [S, N, num_outputs].

    Examples:
        >>> draws = draws_from(Moments(torch.zeros(1, 2), torch.ones(1, 2)), 10)
        >>> draws.shape, torch.allclose(draws.var(0, correction=0), torch.ones(1, 2))
        (torch.Size([10, 1, 2]), True)
    """
    mean, variance = moments.mean, moments.known_variance()
    generator = torch.Generator().manual_seed(stream_seed(seed, Stream.EVALUATION_WEIGHTS, 0))
    noise = torch.randn(num_samples, mean.shape[-1], generator=generator, dtype=torch.float64)
    noise = _whitened(noise).to(mean.device, mean.dtype)
    return torch.addcmul(mean, (factor * variance).sqrt(), noise[:, None])


def _whitened(noise: Tensor) -> Tensor:
    """Transform noise [S, K] to mean 0 and covariance I, or variance 1 if S is at most K."""
    if len(noise) == 1:
        return noise
    centered = noise - noise.mean(0)
    if len(noise) <= noise.shape[1]:
        return centered / centered.std(0, correction=0)
    factor = torch.linalg.cholesky(centered.t() @ centered / len(noise))
    return torch.linalg.solve_triangular(factor, centered.t(), upper=False).t()


def fit_factor(likelihood: Likelihood, moments: Moments, draws: Tensor) -> float:
    """Fit the factor of the outputs' variances with which moments spread as draws do.

    The epistemic uncertainty of the draws, averaged over the rows, is matched: the mutual
    information of classes, or the variance of the means of a regression.

    Args:
        likelihood: The likelihood of the outputs.
        moments: Moments of the outputs of some rows [N, num_outputs].
        draws: Draws for the same rows [S, N, num_outputs], at least 2.

    Returns:
        The factor, from 0.01 to 100.

    Examples:
        >>> from bqnn.inference.likelihoods import Classification
        >>> moments = Moments(torch.zeros(50, 2), torch.ones(50, 2))
        >>> draws = draws_from(moments, 100, factor=3.0)
        >>> abs(fit_factor(Classification(["cat", "dog"]), moments, draws) - 3) < 0.2
        True
    """
    count = len(draws)
    wanted = _epistemic(likelihood, draws) * count / (count - 1)  # S draws spread less by 1 / S
    low, high = 1 / LARGEST_FACTOR, LARGEST_FACTOR
    for _ in range(40):  # bisection of the logarithm
        middle = (low * high) ** 0.5
        found = _epistemic(likelihood, draws_from(moments, 100, factor=middle))
        low, high = (middle, high) if found < wanted else (low, middle)
    return (low * high) ** 0.5


def _epistemic(likelihood: Likelihood, draws: Tensor) -> float:
    summary = likelihood.summary(draws)
    if isinstance(likelihood, Regression):
        return float(summary["epistemic_std"].square().mean())
    return float(summary["mutual_information"].mean())
