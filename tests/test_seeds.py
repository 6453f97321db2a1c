"""Seeds: every purpose, number and neighbouring run has a random stream of its own."""

import ast
import itertools
from pathlib import Path

import pytest
import torch

from bqnn.data.loader import permutation
from bqnn.layers.noise import reseed
from bqnn.seeds import Stream, stream_seed

PACKAGE = Path(__file__).resolve().parents[1] / "bqnn"
SEEDS = [*range(20), 1_000_003, 2**31, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 2, 2**63 - 1]


def all_seeds() -> list[int]:
    """Generator seeds of many runs: each stream, alone, with a number, and with two."""
    numbers = [(), *itertools.product(range(20)), *itertools.product(range(8), range(4))]
    return [
        stream_seed(seed, stream, *each) for seed in SEEDS for stream in Stream for each in numbers
    ]


def test_no_two_streams_have_one_seed():
    seeds = all_seeds()
    assert len(set(seeds)) == len(seeds) > 10_000
    assert all(0 <= seed < 2**64 for seed in seeds)
    # What the CPU's generator reads of them: n^2 / 2^33 pairs agree by chance, here 0.02.
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_streams_start_generators_that_have_nothing_in_common():
    starts = [stream_seed(seed, stream, 0) for seed in (0, 1, 2**32) for stream in Stream]
    draws = torch.stack(
        [torch.randn(1000, generator=torch.Generator().manual_seed(s)) for s in starts]
    )
    correlations = torch.corrcoef(draws) - torch.eye(len(starts))
    assert correlations.abs().max() < 5 / 1000**0.5


def test_seeds_are_the_same_in_every_version():
    """What a checkpoint evaluates with, and its validation rows, come from them."""
    assert stream_seed(0, Stream.INITIAL_WEIGHTS) == 7358642676132404131
    assert stream_seed(2**63 - 1, Stream.TRAINING, 3, 1) == 8952023847694337011


def test_every_generator_of_a_run_starts_from_a_stream():
    """Of the other ones, a constant or a seed of the data set defines a data set."""
    defines_data = {"data/shift.py", "data/synthetic.py", "data/unfamiliar.py"}
    starts = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).as_posix()
        if own in defines_data or own == "layers/noise.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith(("manual_seed", "reseed", "permutation")):
                seed = node.args[-1]
                is_mixed = isinstance(seed, ast.Name) or ast.unparse(seed).startswith("stream_seed")
                # Two networks are compared at equal noise: any seed does.
                is_comparison = own == "quant/summary.py" and isinstance(seed, ast.Constant)
                assert is_mixed or is_comparison, f"{own}: {ast.unparse(node)}"
                starts += 1
    assert starts >= 6


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1, 2**64 - 1])
def test_generators_take_every_seed(seed):
    state = torch.get_rng_state()
    try:
        reseed(torch.device("cpu"), seed)
        first = torch.rand(3)
        reseed(torch.device("cpu"), seed)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_rng_state(state)
    assert sorted(permutation(10, seed).tolist()) == list(range(10))
