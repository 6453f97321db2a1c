"""A trained model that predicts rows in the units of the data."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Self

from torch import Tensor

from bqnn.arguments import ArgumentError, renamed, whole_number
from bqnn.checkpoints.recipe import Recipe
from bqnn.checkpoints.recipe import load as load_method
from bqnn.checkpoints.rows import read_rows
from bqnn.data.normalization import Normalization
from bqnn.inference.answers import ClassificationAnswer, RegressionAnswer
from bqnn.inference.early_stop import check_early_stop
from bqnn.inference.moments import NUM_SAMPLES, SinglePass
from bqnn.inference.predict import BATCH_SIZE, Bank
from bqnn.jobs.locate import CHECKPOINT
from bqnn.methods import Method
from bqnn.methods.base import prepared
from bqnn.settings.options import PREDICTIVE, is_plugin
from bqnn.text import short

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    numeric: str | None = None,
    *,
    trust: bool = False,
) -> "Model":
    """Load the model in a checkpoint, which may come from an untrusted source.

    Args:
        path: The path of the checkpoint, or the folder of a run.
        numeric: The arithmetic of a quantized model: `unquantized`, `simulated` (the default) or
            `int8`. None for a float checkpoint.
        trust: Whether to import the code of a method or network that is not bqnn's own.

    Returns:
        The model, on the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint of bqnn, is not quantized although `numeric` is
            given, needs `trust`, or would saturate on this CPU.

    Examples:
        >>> import bqnn, tempfile, torch
        >>> from bqnn.checkpoints.recipe import build
        >>> recipe = {  # of a network for images of 8x8 pixels
        ...     "version": 1, "stage": "float", "seed": 0, "net": {"name": "mlp"},
        ...     "method": {
        ...         "name": "bbb", "prior_std": 0.3, "init_rho": -5.0, "beta": 1.0,
        ...         "optimizer": {"name": "adam"},
        ...     },
        ...     "task": {"name": "pets", "dataset": "images"},
        ...     "facts": {
        ...         "likelihood": "classification", "class_names": ["cat", "dog"],
        ...         "input_shape": [1, 8, 8], "input_scale": 255.0, "input_mean": [0.0],
        ...         "input_std": [1.0], "num_train": 100,
        ...     },
        ... }
        >>> content = {"recipe": recipe, "state_dict": build(recipe).state_dict()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(content, Path(folder, "checkpoint.ckpt"))
        ...     model = bqnn.load(folder)
        >>> images = torch.randint(256, (5, 1, 8, 8))
        >>> answer = model.predict(images)
        >>> answer.probabilities.shape, answer.mutual_information.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / CHECKPOINT
    return Model(load_method(file, numeric, trust=trust))


class Model:
    """A trained model that predicts rows in the units of the data.

    It may be used by many threads.

    Args:
        method: A trained method in evaluation mode, on the CPU, with its recipe.

    Attributes:
        method: The method, whose `net` is the network and whose `likelihood` has the meaning of its
            outputs.

    Examples:
        >>> from bqnn.checkpoints.recipe import build
        >>> recipe = {
        ...     "version": 1, "stage": "float", "seed": 0,
        ...     "method": {
        ...         "name": "bbb", "prior_std": 0.3, "init_rho": -5.0, "beta": 1.0,
        ...         "optimizer": {"name": "adam"},
        ...     },
        ...     "net": {"name": "mlp", "hidden_features": [4]},
        ...     "task": {"name": "houses", "dataset": "uci"},
        ...     "facts": {
        ...         "likelihood": "regression", "target_mean": 200.0, "target_std": 50.0,
        ...         "input_shape": [2], "input_mean": [80.0, 3.0], "input_std": [20.0, 1.0],
        ...         "num_train": 100,
        ...     },
        ... }
        >>> answer = Model(build(recipe).eval()).predict([[70, 2], [120, 5]], num_samples=10)
        >>> answer.mean.shape, answer.std.shape, answer.samples.shape
        ((2,), (2,), (10, 2))
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._bank: Bank | None = None
        self._single_pass: SinglePass | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the model, in plain types."""
        if self.method.recipe is None:
            raise ValueError(
                "this method has no recipe, which describes the rows that it predicts; build it "
                "with bqnn.checkpoints.recipe.build"
            )
        return self.method.recipe

    def prepare(self, num_samples: int | None = None, *, seed: int | None = None) -> Self:
        """Draw the weights now, and keep them for all calls of `predict`.

        Answers stay bit-equal to those of a model that is not prepared. A call is faster, most of
        all for few rows in int8, because the weights of a draw are packed once. Calls with more
        draws or another seed make those draws that are not kept.

        Args:
            num_samples: The number of draws S; None for the method's own.
            seed: The seed of the draws; None for that of the training.

        Returns:
            The model.

        Raises:
            TypeError: An argument has a wrong type.
            ValueError: An argument is out of its range.
        """
        num_samples, seed = self._checked(num_samples, seed)
        self._bank = Bank(self.method.net, num_samples, seed=seed)
        return self

    def prepare_moments(self, rows: object) -> Self:
        """Prepare `predict(rows, predictive="moments")`, and fit the factor of its variances.

        Moments take activations as independent of each other, so that their mutual information is
        about half of that of draws. The factor corrects it; ten draws of at most 512 rows are made.

        Args:
            rows: Rows like those that will be predicted, such as training rows; see `predict`.
                Targets are not needed.

        Returns:
            The model.

        Raises:
            TypeError: The rows are not numbers, or a layer has no moments.
            ValueError: The rows are refused, or the network has neither random weights nor dropout.
        """
        self._single_pass = self._new_single_pass()
        facts, seed = self.recipe["facts"], self.method.seed
        self._single_pass.fit(read_rows(rows, facts), seed=seed)
        return self

    def _new_single_pass(self) -> SinglePass:
        return SinglePass(self.method.net, self.method.likelihood, prepared(self._prepare()))

    def _checked(self, num_samples: int | None, seed: int | None) -> tuple[int, int]:
        if num_samples is not None:
            num_samples = whole_number("num_samples", num_samples, "choose 1 or more", 1)
        seed = self.method.seed if seed is None else seed
        seed = whole_number("seed", seed, "choose 0 or more", 0, 2**63 - 1)
        return self.method.check_samples(num_samples), seed

    def predict(
        self,
        rows: object,
        num_samples: int | None = None,
        *,
        max_samples: int | None = None,
        tolerance: float | None = None,
        predictive: str = "draws",
        seed: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> ClassificationAnswer | RegressionAnswer:
        """Predict rows in the units of the data, and how uncertain each prediction is.

        Equal calls give equal answers. All rows of a call see the same draws of the weights, so the
        answer for a row depends on the other rows by rounding only. MC dropout is different: the
        mask of a row depends on its position in the call and on `batch_size`.

        With a tolerance, a row stops after 2, 4, 8, ... draws once its prediction has settled: for
        classes, the 95 % confidence interval of its entropy is within +- tolerance nats, and that
        of the margin between its two most probable classes does not contain 0; for a regression,
        those of the mean and of the standard deviation are within +- tolerance standard
        deviations. Its draws are the first ones that it makes without a tolerance.

        Args:
            rows: Features [N, F] in their original units, or images [N, C, H, W] with pixels in
                their original range (0 to 255; 0 to 16 for digits). A NumPy array, a tensor, nested
                lists or a pandas DataFrame.
            num_samples: The number of draws S; None for the method's own. An ensemble has one per
                member.
            max_samples: With a tolerance, the largest number of draws S of a row; None for the
                method's own number.
            tolerance: Lets rows stop early, 0 or more; 0.02 is usual. None makes all draws.
            predictive: `draws` passes rows through each draw of the network. `moments` passes means
                and variances through it once, and draws the outputs from them, 100 times unless
                `num_samples` is given; see `prepare_moments`. It is for bbb, swag, laplace and
                mcdropout, in float or simulated.
            seed: The seed of the draws; None for that of the training, with which bqnn evaluates.
            batch_size: The number of rows in a forward pass, which bounds the memory. The answer
                itself has S numbers per row and class.

        Returns:
            The answer, with tensors if `rows` is a tensor and NumPy arrays otherwise.

        Raises:
            TypeError: The rows are not numbers, or an argument has a wrong type.
            ValueError: The rows have a wrong shape or range or are not finite, or an argument is
                out of its range, or the checkpoint has no normalization.
        """
        if predictive not in PREDICTIVE:
            raise ArgumentError(
                f"predictive={short(predictive)}: choose {' or '.join(PREDICTIVE)}", "predictive"
            )
        batch_size = whole_number("batch_size", batch_size, "choose 1 row or more", 1)
        if predictive == "moments":
            if tolerance is not None or max_samples is not None:
                raise ArgumentError(
                    "predictive='moments' makes one pass, which cannot stop early; leave tolerance "
                    "and max_samples out",
                    *("predictive", "tolerance", "max_samples"),
                )
            answer = self._predict_moments(rows, num_samples, seed, batch_size)
        elif check_early_stop(num_samples, max_samples, tolerance) is None:
            num_samples, seed = self._checked(num_samples, seed)
            answer = self._predict_draws(rows, num_samples, None, seed, batch_size)
        else:
            with renamed(lambda name: "max_samples" if name == "num_samples" else name):
                max_samples, seed = self._checked(max_samples, seed)
            answer = self._predict_draws(rows, max_samples, tolerance, seed, batch_size)
        return answer if isinstance(rows, Tensor) else answer.numpy()

    def _predict_draws(
        self,
        rows: object,
        num_samples: int,
        tolerance: float | None,
        seed: int,
        batch_size: int,
    ) -> ClassificationAnswer | RegressionAnswer:
        prepare, inputs = self._prepare(), read_rows(rows, self.recipe["facts"])
        method, bank = self.method, self._bank
        if tolerance is None:
            (draws,) = method.predictive_sets(
                [inputs], prepare, num_samples, seed=seed, batch_size=batch_size, bank=bank
            )
            return method.likelihood.answer(draws)
        (early,) = method.predictive_until_settled(
            [inputs], prepare, num_samples, tolerance, seed=seed, batch_size=batch_size, bank=bank
        )
        return method.likelihood.answer(*early)

    def _predict_moments(
        self, rows: object, num_samples: int | None, seed: int | None, batch_size: int
    ) -> ClassificationAnswer | RegressionAnswer:
        if num_samples is not None:
            whole_number("num_samples", num_samples, "choose 1 or more", 1)
        _, seed = self._checked(None, seed)
        if self._single_pass is None:
            self._single_pass = self._new_single_pass()
            log.warning(
                "predict: predictive=moments without prepare_moments(rows): mutual information and "
                "epistemic deviation come out too small; call it with training rows first"
            )
        inputs = read_rows(rows, self.recipe["facts"])
        draws = self._single_pass.predict(
            inputs, num_samples or NUM_SAMPLES, seed=seed, batch_size=batch_size
        )
        if self.method.calibration is not None:
            draws = self.method.calibration(draws)
        return self.method.likelihood.answer(draws)

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        """Return the function that converts rows of the data to inputs of the network."""
        normalization = self._normalization()

        def prepare(batch: Tensor) -> Tensor:
            inputs = normalization(batch)
            if not inputs.isfinite().all():
                raise ValueError(
                    "rows: a row is so far from the training rows that its normalized values "
                    "exceed float32; correct or remove it"
                )
            return inputs

        return prepare

    def _normalization(self) -> Normalization:
        found = Normalization.from_facts(self.recipe["facts"])
        if found is None:
            if is_plugin("task", self.recipe["task"]):
                reason = (
                    "its data set normalizes them without input_mean and input_std in its facts; "
                    "add them and train again"
                )
            else:
                reason = "it was made by an earlier version; train it again"
            raise ValueError(
                "predict: the checkpoint does not store how its inputs are normalized, because "
                f"{reason}, or normalize the rows and call model.method.predictive(inputs)"
            )
        return found
