"""torchmetrics classes for the ranking of rows by an uncertainty score.

A ranking depends on all rows at once, so the states keep the score of every row, in float64.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat

from bqnn.inference.functional import risk_coverage


class Detection(Metric):
    """Base class of metrics for the detection of unfamiliar rows by a score.

    The unfamiliar rows are the positive class (Hendrycks et al. 2019), and their scores should be
    higher. Only the order of the scores matters, so they may be infinite.

    Args:
        options: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    scores: list[Tensor]
    unfamiliar: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("unfamiliar", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, unfamiliar: Tensor) -> None:
        """Add rows.

        Args:
            scores: Scores [B].
            unfamiliar: Whether each row is unfamiliar [B].
        """
        if scores.dim() != 1 or scores.shape != unfamiliar.shape:
            raise ValueError(
                f"scores of shape {list(scores.shape)}, unfamiliar of shape "
                f"{list(unfamiliar.shape)}: expected one of each per row"
            )
        self.scores.append(scores.double())
        self.unfamiliar.append(unfamiliar.bool())

    def compute(self) -> Tensor:
        """Return the metric of all rows, a float64 scalar."""
        import numpy as np

        scores, unfamiliar = dim_zero_cat(self.scores), dim_zero_cat(self.unfamiliar)
        # scikit-learn rejects infinite scores, so it gets ranks.
        _, ranks = np.unique(scores.cpu().numpy(), return_inverse=True)
        value = self._compute(unfamiliar.cpu().numpy(), ranks)
        return torch.tensor(value, dtype=torch.float64, device=scores.device)

    def _compute(self, is_unfamiliar: Any, ranks: Any) -> float:
        raise NotImplementedError


class AUROC(Detection):
    """Probability that an unfamiliar row has a higher score than a familiar one; ties count half.

    torchmetrics' class computes in float32.

    Examples:
        >>> metric = AUROC()
        >>> metric.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True

    def _compute(self, is_unfamiliar: Any, ranks: Any) -> float:
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(is_unfamiliar, ranks))


class AUPR(Detection):
    """Average precision of the unfamiliar rows; chance level is their share of all rows.

    Examples:
        >>> metric = AUPR()
        >>> metric.update(torch.zeros(4), torch.tensor([False, False, False, True]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = True

    def _compute(self, is_unfamiliar: Any, ranks: Any) -> float:
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(is_unfamiliar, ranks))


class FPR95(Detection):
    """Share of familiar rows that are flagged at a threshold that flags 95 % of unfamiliar rows.

    It is 0 if all rows are of one kind: then no familiar row need be flagged. With wrong
    predictions as the unfamiliar rows, it measures the detection of errors.

    Examples:
        >>> metric = FPR95()
        >>> metric.update(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([False, False, True]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def _compute(self, is_unfamiliar: Any, ranks: Any) -> float:
        import numpy as np
        from sklearn.metrics import roc_curve

        if is_unfamiliar.all() or not is_unfamiliar.any():
            return 0.0

        false_positive, true_positive, _ = roc_curve(is_unfamiliar, ranks, drop_intermediate=False)
        return float(false_positive[np.argmax(true_positive >= 0.95)])


class RiskCoverage(Metric):
    """Base class of metrics of the risk-coverage curve, whose coverage grows with the score.

    Args:
        options: Options of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    scores: list[Tensor]
    losses: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, losses: Tensor) -> None:
        """Add rows.

        Args:
            scores: Scores that are higher for uncertain rows [B].
            losses: The loss of each row [B].
        """
        if scores.dim() != 1 or scores.shape != losses.shape:
            raise ValueError(
                f"scores of shape {list(scores.shape)}, losses of shape {list(losses.shape)}: "
                "expected one of each per row"
            )
        self.scores.append(scores.double())
        self.losses.append(losses.double())

    def curve(self) -> Tensor:
        """Return the risk of all rows so far at coverage 1/N, 2/N, ..., 1, in float64 [N]."""
        return risk_coverage(dim_zero_cat(self.scores), dim_zero_cat(self.losses))


class AURC(RiskCoverage):
    """Area under the risk-coverage curve: the mean risk of the k rows with the lowest scores.

    It is the mean of `bqnn.inference.functional.risk_coverage` (Geifman & El-Yaniv 2017).

    Examples:
        >>> metric = AURC()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]))
        >>> metric.compute()  # of the risks 0 and 1/2
        tensor(0.2500, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the area, a float64 scalar."""
        return self.curve().mean()


class AUGRC(RiskCoverage):
    """Area under the generalized risk-coverage curve (Traub et al. 2024).

    The generalized risk is the loss of the accepted rows, divided by the number of all rows: the
    probability that a row is accepted and wrong. The area is that of the curve through (0, 0) and
    a point per row. For losses of 0 and 1 with mean e, it is (1 - AUROC) e (1 - e) + e^2 / 2, with
    the AUROC of the detection of errors.

    Examples:
        >>> metric = AUGRC()
        >>> metric.update(torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]))
        >>> metric.compute()  # a perfect ranking: 0 and (1/2)^2 / 2
        tensor(0.1250, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the area, a float64 scalar."""
        risk = self.curve()
        count = len(risk)
        generalized = risk * torch.arange(1, count + 1, device=risk.device) / count
        return generalized.mean() - generalized[-1] / (2 * count)


def detection_metrics(**options: Any) -> MetricCollection:
    """Collect AUROC, AUPR and FPR95, under these names.

    Examples:
        >>> metrics = detection_metrics()
        >>> metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([False, True]))
        >>> list(metrics.compute())
        ['AUROC', 'AUPR', 'FPR95']
    """
    return MetricCollection([AUROC(**options), AUPR(**options), FPR95(**options)])
