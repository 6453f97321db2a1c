"""How well a score of uncertainty tells unfamiliar inputs from familiar ones."""

from torch import Tensor


def detection(familiar: Tensor, unfamiliar: Tensor) -> dict[str, float]:
    """auroc, aupr and fpr95 of scores that should be higher for the unfamiliar rows.

    The unfamiliar rows are the positive class (Hendrycks et al. 2019): fpr95 is the share of
    familiar rows that are flagged where at least 95 % of the unfamiliar ones are; aupr is the
    average precision.
    """
    import numpy as np
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    scores = np.concatenate([familiar.cpu().numpy(), unfamiliar.cpu().numpy()])
    # Only their order counts, which infinite ones have, too.
    _, scores = np.unique(scores, return_inverse=True)
    is_unfamiliar = np.arange(len(scores)) >= len(familiar)
    false_positive, true_positive, _ = roc_curve(is_unfamiliar, scores, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(is_unfamiliar, scores)),
        "aupr": float(average_precision_score(is_unfamiliar, scores)),
        "fpr95": float(false_positive[np.argmax(true_positive >= 0.95)]),
    }
