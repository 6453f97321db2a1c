"""Random streams of different purposes, epochs, draws and seeds differ."""

import ast
from pathlib import Path

import pytest
import torch

from bqnn import seeds
from bqnn.data.loader import permutation
from bqnn.seeds import NUMBERS, Stream, stream_seed

PACKAGE = Path(seeds.__file__).parent


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32, 2**63 - 1])
def test_streams_of_different_purposes_start_at_different_seeds(seed):
    ends = [0, 1, 2, 1000, 500_000, NUMBERS - 1]
    found = {stream_seed(seed, stream, number) for stream in Stream for number in ends}
    assert len(found) == len(Stream) * len(ends)
    assert all(0 <= each < 2**32 for each in found)  # torch reads no more
    assert len(Stream) * NUMBERS <= 2**32


def test_neighbouring_seeds_share_no_start():
    runs = [0, 1, 2, 3, 2**32, 2**32 + 1, 1_000_003, 2_000_006, 2**63 - 2, 2**63 - 1]
    found = {stream_seed(run, stream, n) for run in runs for stream in Stream for n in range(300)}
    assert len(found) == len(runs) * len(Stream) * 300


def test_ranks_have_streams_of_their_own():
    found = {stream_seed(0, Stream.TRAINING, n, rank) for n in range(300) for rank in range(8)}
    assert len(found) == 2400


def test_the_cpu_generator_reads_32_bits_of_a_seed():
    """The reason why streams differ within 32 bits."""
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=one), torch.randn(4, generator=other))


def test_the_first_epoch_and_the_validation_split_have_orders_of_their_own():
    streams = (Stream.ORDER, Stream.FINE_TUNING_ORDER, Stream.VALIDATION_SPLIT)
    one, two, three = (permutation(100, stream_seed(0, stream)) for stream in streams)
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize("number", [-1, NUMBERS])
def test_a_number_outside_of_its_stream_is_refused(number):
    with pytest.raises(ValueError, match=f"number={number}"):
        stream_seed(0, Stream.EVALUATION_MASKS, number)


def test_streams_start_generators_that_have_nothing_in_common():
    starts = [stream_seed(seed, stream, 0) for seed in (0, 1, 2**32) for stream in Stream]
    draws = torch.stack(
        [torch.randn(1000, generator=torch.Generator().manual_seed(s)) for s in starts]
    )
    correlations = torch.corrcoef(draws) - torch.eye(len(starts))
    assert correlations.abs().max() < 5 / 1000**0.5


def test_seeds_are_the_same_in_every_version():
    """The draws of an evaluation and the validation rows of a checkpoint depend on them."""
    assert stream_seed(0, Stream.INITIAL_WEIGHTS) == 1427366890
    assert stream_seed(2**63 - 1, Stream.TRAINING, 3, 1) == 3674552854


def test_every_generator_of_a_run_starts_from_a_stream():
    """Other generators, with a constant or the data's seed, define data sets or examples."""
    defines_data = {
        *("data/distortions.py", "data/synthetic.py", "data/ood.py", "quant/engines/measure.py"),
        "testing.py",
    }
    starts = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).as_posix()
        if own in defines_data or own == "layers/noise.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.endswith(("manual_seed", "reseed", "permutation")):
                assert isinstance(node, ast.Call)
                seed = node.args[-1]
                is_mixed = isinstance(seed, ast.Name) or ast.unparse(seed).startswith("stream_seed")
                assert is_mixed, f"{own}: {ast.unparse(node)}"
                starts += 1
    assert starts >= 6
