"""Sample a posterior that is known in closed form with SGHMC: python examples/sghmc_line.py"""

import torch

import bqnn


def main(steps: int = 20_000) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    num_train, precision = 50, 1.0
    x = torch.randn(num_train, generator=generator)
    y = 2 * x + torch.randn(num_train, generator=generator)

    # With unit noise and the prior N(0, 1 / precision), the posterior of the slope is Gaussian.
    curvature = precision + (x * x).sum()
    mean, std = (x * y).sum() / curvature, curvature.rsqrt()

    slope = torch.zeros(1, requires_grad=True)
    sampler = bqnn.SGHMC(
        [slope], lr=0.025, num_train=num_train, num_burn_in_steps=1000, resample_prior=0
    )
    draws = []
    for step in range(steps):
        sampler.zero_grad()
        (0.5 * (y - slope * x).square()).mean().backward()
        sampler.step()
        if step >= 1000:
            draws.append(slope.item())
    found = torch.tensor(draws)
    print(f"posterior mean {mean:.3f}, sampled {found.mean():.3f}")
    print(f"posterior standard deviation {std:.3f}, sampled {found.std():.3f}")


if __name__ == "__main__":
    main()
