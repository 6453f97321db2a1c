"""Answers of a model about rows: class probabilities or a mean, and their uncertainty."""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from torch import Tensor

Array = np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Answer:
    """Base class of answers about N rows, in float64.

    Attributes:
        samples: The answer of each of the S draws [S, N, ...]; NaN for draws that a row did not
            make.
        num_samples: The number of draws of each row [N].
    """

    samples: Array
    num_samples: Array

    def numpy(self) -> Self:
        """Return the answer with NumPy arrays in place of tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {n: value.numpy() for n, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **arrays)


@dataclass(frozen=True, eq=False)
class ClassificationAnswer(Answer):
    """Class probabilities and their uncertainty. Entropies are in nats.

    Attributes:
        samples: The class probabilities of each draw [S, N, C]. Their mean is `probabilities`. NaN
            for draws that a row did not make.
        num_samples: The number of draws of each row [N].
        probabilities: The class probabilities [N, C].
        labels: The index of the most probable class [N].
        class_names: The names of the C classes.
        entropy: The entropy of `probabilities` [N]. It is the sum of the next two.
        aleatoric: The mean entropy of the draws [N]: noise in the data.
        mutual_information: The disagreement of the draws [N]: the uncertainty of the model.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Classification
        >>> answer = Classification(["cat", "dog"]).answer(torch.zeros(3, 4, 2))
        >>> answer.probabilities[0].tolist(), answer.class_names[answer.labels[0]]
        ([0.5, 0.5], 'cat')
    """

    probabilities: Array
    labels: Array
    class_names: tuple[str, ...]
    entropy: Array
    aleatoric: Array
    mutual_information: Array


@dataclass(frozen=True, eq=False)
class RegressionAnswer(Answer):
    """A mean and its standard deviations, in the units of the target.

    Attributes:
        samples: The mean of each draw [S, N]. Their mean is `mean`, and their standard deviation
            (divided by S) is `epistemic`. NaN for draws that a row did not make.
        num_samples: The number of draws of each row [N].
        mean: The predicted mean [N].
        std: The predicted standard deviation [N]. Its square is the sum of those of the next two.
        aleatoric: The standard deviation of the noise in the data [N].
        epistemic: The disagreement of the draws [N]: the uncertainty of the model.

    Examples:
        >>> import torch
        >>> from bqnn.inference.likelihoods import Regression
        >>> answer = Regression(target_mean=20.0, target_std=2.0).answer(torch.zeros(3, 4, 2))
        >>> answer.mean[0].item(), answer.aleatoric[0].item(), answer.epistemic[0].item()
        (20.0, 2.0, 0.0)
    """

    mean: Array
    std: Array
    aleatoric: Array
    epistemic: Array
