"""TensorLoader: order of rows, ranks, and the interface that Lightning needs."""

import pytest
import torch

from bqnn.data.loader import TensorLoader


def make_loader(num_rows: int = 10, batch_size: int = 3, **options: object) -> TensorLoader:
    rows = torch.arange(num_rows)
    return TensorLoader(rows.float().unsqueeze(1), rows, batch_size, **options)


def order(loader: TensorLoader) -> list[int]:
    return torch.cat([targets for _, targets in loader]).tolist()


def test_without_shuffle_batches_are_views_in_order():
    loader = make_loader()
    assert order(loader) == list(range(10))
    inputs, targets = next(iter(loader))
    assert inputs.data_ptr() == loader.inputs.data_ptr()
    assert targets.data_ptr() == loader.targets.data_ptr()


def test_last_batch_may_hold_one_row():
    loader = make_loader(shuffle=True)
    assert [len(targets) for _, targets in loader] == [3, 3, 3, 1]
    assert len(loader) == 4


def test_each_row_comes_once_per_epoch_beside_its_target():
    loader = make_loader(277, 32, shuffle=True)
    assert sorted(order(loader)) == list(range(277))
    assert all(torch.equal(inputs.squeeze(1).long(), targets) for inputs, targets in loader)


def test_order_depends_on_seed_and_epoch_alone():
    first = make_loader(50, shuffle=True, seed=1)
    torch.manual_seed(0)
    expected = order(first)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    other = make_loader(50, shuffle=True, seed=1)
    order(make_loader(50, shuffle=True, seed=9))
    assert order(other) == expected
    assert order(other) == expected  # a second pass over the same epoch
    other.set_epoch(1)
    assert order(other) != expected
    other.set_epoch(0)
    assert order(other) == expected
    assert order(make_loader(50, shuffle=True, seed=2)) != expected
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_iteration_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    order(make_loader(shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_lightning_sets_the_epoch():
    from lightning_fabric.utilities.data import _set_sampler_epoch

    loader = make_loader(50, shuffle=True)
    _set_sampler_epoch(loader, 3)
    assert loader.epoch == 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_out_each_global_batch(shuffle):
    whole = order(make_loader(24, shuffle=shuffle, seed=5))
    ranks = [
        list(make_loader(24, 3, shuffle=shuffle, seed=5, rank=rank, world_size=2))
        for rank in range(2)
    ]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        rows = [row for _, targets in batches for row in targets.tolist()]
        assert len(set(rows)) == 6
        assert set(rows) == set(whole[6 * step : 6 * (step + 1)])


@pytest.mark.parametrize(("num_rows", "world_size"), [(1, 4), (5, 4), (7, 3), (10, 3)])
def test_ranks_get_equally_many_rows_and_cover_all(num_rows, world_size):
    loaders = [
        make_loader(num_rows, 2, shuffle=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    parts = [order(loader) for loader in loaders]
    assert {len(part) for part in parts} == {-(-num_rows // world_size)}
    assert set().union(*parts) == set(range(num_rows))
    for loader in loaders:
        sizes = [len(targets) for _, targets in loader]
        assert len(sizes) == len(loader)
        assert min(sizes) >= 1


@pytest.mark.parametrize(
    ("num_inputs", "num_targets", "batch_size", "message"),
    [(3, 2, 1, "3 rows and targets 2"), (0, 0, 1, "0 rows"), (3, 3, 0, "batch_size=0")],
)
def test_impossible_batches_are_refused(num_inputs, num_targets, batch_size, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(torch.zeros(num_inputs, 2), torch.zeros(num_targets), batch_size)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank=2 with world_size=2"):
        make_loader(rank=2, world_size=2)
