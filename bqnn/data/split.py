"""Draw test rows for data without a split of their own."""

import logging

import torch
from torch import Tensor

from bqnn.arguments import ArgumentError, real_number
from bqnn.data.loader import permutation
from bqnn.seeds import Stream, stream_seed

log = logging.getLogger(__name__)


def draw_test_rows(labels: Tensor, share: float, seed: int) -> Tensor:
    """Draw the same share of the rows of each label, at least one if there are two or more.

    Args:
        labels: Class indices [N], or zeros [N] for rows without classes.
        share: The share of test rows.
        seed: The seed of the run.

    Returns:
        A mask [N], True for test rows.

    Raises:
        ValueError: The share is not above 0 and below 1, or no row is left for the test or for
            the training.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
        >>> labels[draw_test_rows(labels, 0.25, seed=0)]
        tensor([0, 1])
    """
    reason = "it is the share of rows for the test; choose a number above 0 and below 1"
    share = real_number("test_share", share, reason, 0, 1, without=(0, 1))
    # Sorting by label keeps the random order of the rows of a label.
    order = permutation(len(labels), stream_seed(seed, Stream.TEST_SPLIT))
    by_label = order[labels[order].sort(stable=True).indices]
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    counts, start = labels.unique(return_counts=True)[1], 0
    for count in counts.tolist():
        num_test = min(max(1, round(share * count)), count - 1)
        is_test[by_label[start : start + num_test]] = True
        start += count
    if not is_test.any():
        raise ArgumentError(
            f"test_share={share}: {len(labels)} rows are too few for a test row and a training "
            "row; add rows",
            "test_share",
        )
    if (num_single := int((counts == 1).sum())) and len(counts) > 1:
        log.warning(
            "%d of %d classes have a single row, which is a training row, so they have no test "
            "row; add rows",
            *(num_single, len(counts)),
        )
    return is_test
