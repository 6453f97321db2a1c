"""Contracts of methods, networks and data sets: base classes for the tests of plug-ins.

A contract holds what bqnn expects of a plug-in. pytest collects its tests in a subclass whose name
begins with `Test`:

    class TestMyNet(NetContract):
        input_shapes = [(3, 32, 32)]

        def make(self, input_shape, heads):
            return MyNet(input_shape, heads, width=4)

bqnn's own methods, networks and data sets pass the same contracts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from bqnn.checkpoints.schema import check_recipe
from bqnn.data import Rows, TensorData, TensorLoader
from bqnn.inference.likelihoods import Classification, Regression, likelihood_from
from bqnn.inference.predict import predictive
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.bayes import to_bayes
from bqnn.layers.dropout import to_mcdropout
from bqnn.layers.ensemble import Ensemble
from bqnn.methods import Method
from bqnn.nets import MLP, LeNet
from bqnn.quant.callback import QuantizationCallback, quantize_module
from bqnn.quant.integer import convert
from bqnn.quant.simulated import calibrate, enable
from bqnn.quant.spec import QuantSpec

__all__ = ["DataContract", "MethodContract", "NetContract"]

NUM_ROWS = 12


class MethodContract:
    """Contract of methods: training, resuming, reloading, draws and quantization.

    The tests train small networks on twelve rows, of a table (`MLP`) and of images (`LeNet`).

    Attributes:
        method: The class.
        options: Its options, as in a configuration. They should lead to at least one draw after
            two epochs.
        trains_at_random: Whether the training draws random numbers, apart from the order of rows.

    Examples:
        >>> from bqnn.methods import Pointwise
        >>> class TestPointwise(MethodContract):
        ...     method = Pointwise
        ...     options = {"optimizer": {"name": "adam"}}
        ...     trains_at_random = False
        >>> TestPointwise().test_a_deep_copy_predicts_the_same()
    """

    method: Callable[..., Method]
    options: Mapping[str, Any]
    trains_at_random: bool = True

    def make(self, kind: str = "table", **changes: Any) -> Method:
        """Make an untrained method for the rows of a kind, table or images."""
        options = {"num_train": NUM_ROWS, "seed": 0, **deepcopy(dict(self.options)), **changes}
        torch.manual_seed(0)
        if kind == "table":
            net: nn.Module = MLP([3], [1, 1], hidden_features=[4])
            return type(self).method(net, Regression(0.0, 1.0), **options)
        net = LeNet([1, 8, 8], [3], channels=(2, 3), hidden_features=5)
        return type(self).method(net, Classification(["a", "b", "c"]), **options)

    def rows(self, kind: str = "table") -> TensorLoader:
        """Return twelve rows of a kind, table or images, four to a batch."""
        torch.manual_seed(0)
        shape = (3,) if kind == "table" else (1, 8, 8)
        inputs = torch.randn(NUM_ROWS, *shape)
        targets = torch.randn(NUM_ROWS) if kind == "table" else torch.arange(NUM_ROWS) % 3
        return TensorLoader(inputs, targets, batch_size=4)

    def trained(self, kind: str = "table", **changes: Any) -> Method:
        """Train a method for two epochs, and return it in evaluation mode."""
        method = self.make(kind, **changes)
        _trainer(2).fit(method, self.rows(kind))
        return method.eval()

    def test_an_epoch_moves_every_weight_and_ends_with_finite_metrics(self) -> None:
        for precision in ("32-true", "bf16-mixed"):
            method, rows = self.make("images"), self.rows("images")
            before = _weights(method.net)
            trainer = _trainer(1, precision=precision)
            trainer.fit(method, rows, rows)
            after = _weights(method.net)[: len(before)]  # members of an ensemble follow
            assert after.isfinite().all(), f"weights are not finite in {precision}"
            # Dropout and dead ReLUs may hold a few weights still.
            moved = float((after != before).float().mean())
            assert moved > 0.8, f"only {moved:.0%} of the weights were trained in {precision}"
            for name in ("train/loss", "train/nll", "val/nll", "val/error"):
                value = trainer.callback_metrics[name]
                assert torch.isfinite(value), f"{name} is {value} in {precision}"

    def test_equal_seeds_train_equal_weights_and_other_seeds_do_not(self) -> None:
        first, again, other = (_weights(self.trained(seed=seed).net) for seed in (0, 0, 1))
        assert torch.equal(first, again), "two trainings with one seed differ"
        differs = not torch.equal(first, other)
        assert differs == self.trains_at_random, "trains_at_random is not what another seed says"

    def test_a_resumed_training_ends_bit_equal(self, tmp_path: Path) -> None:
        whole, half, resumed = (self.make() for _ in range(3))
        _trainer(4).fit(whole, self.rows())
        stopped = _trainer(4, callbacks=[_StopAfter(2)])
        stopped.fit(half, self.rows())
        stopped.save_checkpoint(tmp_path / "half.ckpt")
        path = str(tmp_path / "half.ckpt")
        _trainer(4).fit(resumed, self.rows(), ckpt_path=path, weights_only=True)
        expected, found = whole.state_dict(), resumed.state_dict()
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{name} differs after an interruption"

    def test_a_checkpoint_loads_strictly_into_a_new_method_and_predicts_the_same(
        self, tmp_path: Path
    ) -> None:
        method = self.make("images")
        method.recipe = {"method": {"name": "mine"}}
        trainer = _trainer(2)
        trainer.fit(method, self.rows("images"))
        trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
        checkpoint = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)
        assert checkpoint["recipe"] == method.recipe
        loaded, inputs = self.make("images"), self.rows("images").inputs
        loaded.load_state_dict(checkpoint["state_dict"], strict=True)
        expected = method.eval().predictive(inputs)
        found = loaded.eval().predictive(inputs)
        assert torch.equal(found, expected), "a loaded method predicts otherwise"

    def test_a_deep_copy_predicts_the_same(self) -> None:
        method, inputs = self.trained(), self.rows().inputs
        expected = method.predictive(inputs)
        assert torch.equal(deepcopy(method).predictive(inputs), expected)

    def test_draws_are_stacked_and_depend_on_the_seed_alone(self) -> None:
        method, inputs = self.trained("images"), self.rows("images").inputs
        draws = method.predictive(inputs)
        shape = (method.available_samples, NUM_ROWS, 3)
        assert draws.shape == shape, f"draws of shape {tuple(draws.shape)}, expected {shape}"
        assert draws.isfinite().all()
        torch.manual_seed(99)
        assert torch.equal(method.predictive(inputs), draws), "draws use the global generator"

    def test_one_draw_serves_all_rows_and_sets(self) -> None:
        method, inputs = self.trained(), self.rows().inputs
        inputs = inputs[:1].expand(NUM_ROWS, -1)
        alone = method.predictive(inputs)
        first, second = method.predictive_sets([inputs, inputs], lambda rows: rows)
        assert torch.equal(first, alone), "a set has other draws than it has alone"
        assert torch.equal(second, alone), "the second set has other draws than the first"

    def test_metrics_are_those_of_the_draws_over_all_rows(self) -> None:
        method, rows = self.make(), self.rows()
        (results,) = _trainer(1).test(method, rows, verbose=False)
        method.eval()
        samples = torch.cat([method.predictive(inputs) for inputs, _ in rows], dim=1)
        expected = score(Prediction(method.likelihood, samples, rows.targets))
        assert results.keys() == {f"test/{key}" for key in expected}
        for key, value in expected.items():
            found = results[f"test/{key}"]
            assert math.isclose(found, value, rel_tol=1e-6), f"test/{key}={found}, not {value}"

    def test_int8_computes_what_the_simulation_does(self) -> None:
        method, rows = self.trained("images"), self.rows("images")
        count = method.available_samples
        _check_int8(_calibrated(method.net, rows.inputs), rows.inputs, count)

    def test_it_is_fine_tuned_with_fake_quantization(self) -> None:
        method = self.trained("images").fine_tuning({"name": "adam", "lr": 1e-3}, 1.0)
        trainer = _trainer(2, callbacks=[QuantizationCallback(QuantSpec())])
        trainer.fit(method, self.rows("images"))
        assert torch.isfinite(trainer.callback_metrics["train/loss"])
        inputs = self.rows("images").inputs
        _check_int8(method.net.eval(), inputs, method.available_samples)


class NetContract:
    """Contract of networks: the requested outputs, and support for all conversions.

    Attributes:
        input_shapes: Shapes of a row that the network supports.
        has_dropout: Whether the network has places for MC dropout.

    Examples:
        >>> class TestMLP(NetContract):
        ...     input_shapes = [(3,)]
        ...     def make(self, input_shape, heads):
        ...         return MLP(input_shape, heads, hidden_features=[4])
        >>> TestMLP().test_equal_seeds_make_equal_weights()
    """

    input_shapes: Sequence[Sequence[int]]
    has_dropout: bool = True

    def make(self, input_shape: Sequence[int], heads: Sequence[int]) -> nn.Module:
        """Make a small network.

        Args:
            input_shape: One of `input_shapes`.
            heads: The number of outputs of each head; (1, 1) is regression, (C,) classification.
        """
        raise NotImplementedError

    def test_outputs_are_those_of_all_heads(self) -> None:
        for shape in self.input_shapes:
            for heads in ((10,), (1, 1), (2, 3)):
                out = _made(self.make, shape, heads)(_inputs(shape))
                expected = (8, sum(heads))
                assert out.shape == expected, (
                    f"outputs of shape {tuple(out.shape)} for {heads=}, expected {expected}"
                )
                assert out.isfinite().all()

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        for shape in self.input_shapes:
            net, x = _made(self.make, shape), _inputs(shape)
            with torch.no_grad():
                torch.testing.assert_close(net(x[:1]), net(x)[:1])

    def test_equal_seeds_make_equal_weights(self) -> None:
        for shape in self.input_shapes:
            first, second = (_weights(_made(self.make, shape)) for _ in range(2))
            assert torch.equal(first, second), "weights do not depend on torch's generator alone"

    def test_every_parameter_gets_a_gradient(self) -> None:
        for shape in self.input_shapes:
            net = _made(self.make, shape).train()
            net(_inputs(shape)).square().sum().backward()
            idle = [name for name, param in net.named_parameters() if param.grad is None]
            assert not idle, f"no gradient reaches {', '.join(idle)}"

    def test_without_rounding_a_quantized_network_computes_what_it_did(self) -> None:
        for shape in self.input_shapes:
            net, x = _made(self.make, shape), _inputs(shape)
            prepared = _calibrated(deepcopy(net), x)
            enable(prepared, False)
            with torch.no_grad():
                torch.testing.assert_close(prepared(x), net(x), rtol=1e-4, atol=1e-5)

    def test_every_conversion_takes_it_and_int8_computes_what_the_simulation_does(self) -> None:
        conversions: dict[str, Callable[[nn.Module], nn.Module]] = {
            "none": lambda net: net,
            "to_bayes": lambda net: to_bayes(net, prior_std=0.3, init_rho=-5.0),
            "ensemble": _ensemble,
        }
        if self.has_dropout:
            conversions["to_mcdropout"] = lambda net: to_mcdropout(net, rate=0.1)
        for shape in self.input_shapes:
            x = _inputs(shape)
            for convert_net in conversions.values():
                net = convert_net(_made(self.make, shape)).eval()
                count = len(net) if isinstance(net, Ensemble) else 2
                draws = predictive(net, x, count)
                assert draws.shape == (count, 8, 4)
                _check_int8(_calibrated(net, x), x, count)


class DataContract:
    """Contract of data sets: complete rows, in disjoint parts that depend on the seed.

    Attributes:
        has_unique_rows: Whether no two rows of the data set are equal.

    Examples:
        >>> from bqnn.data.synthetic import SyntheticData
        >>> class TestSynthetic(DataContract):
        ...     def make(self, **options):
        ...         return SyntheticData(**options)
        >>> TestSynthetic().test_parts_do_not_overlap()
    """

    has_unique_rows: bool = True

    def make(self, **options: Any) -> TensorData:
        """Make the data set, without reading it.

        Args:
            options: `seed`, `batch_size` and `validation_share`, or some of them.
        """
        raise NotImplementedError

    def ready(self, **options: Any) -> TensorData:
        """Read the data set, with a quarter of the training rows for validation."""
        data = self.make(**{"validation_share": 0.25, "seed": 3, **options})
        data.prepare_data()
        data.setup()
        return data

    def test_rows_are_finite_and_have_targets_of_their_kind(self) -> None:
        data = self.ready()
        likelihood = likelihood_from(data.facts())
        for name, rows in _parts(data).items():
            assert len(rows) > 0, f"{name} has no rows"
            inputs, targets = data.normalize(rows.inputs), rows.targets
            assert inputs.dtype == torch.float32, f"{name}: inputs are {inputs.dtype}"
            assert inputs.isfinite().all(), f"{name}: an input is not finite"
            assert targets.dim() == 1, f"{name}: targets have the shape {tuple(targets.shape)}"
            if isinstance(likelihood, Classification):
                num_classes = len(likelihood.class_names)
                assert targets.dtype == torch.int64, f"{name}: targets are {targets.dtype}"
                assert targets.min() >= 0, f"{name}: a target is negative"
                assert targets.max() < num_classes, f"{name}: a target has no class"
            else:
                assert targets.dtype == torch.float32, f"{name}: targets are {targets.dtype}"
                assert targets.isfinite().all(), f"{name}: a target is not finite"

    def test_parts_do_not_overlap(self) -> None:
        data, whole = self.ready(), self.ready(validation_share=0.0)
        sizes = {name: len(rows) for name, rows in _parts(data).items()}
        assert sizes["train"] + sizes["val"] == len(whole.train), "rows were lost, or are in both"
        assert sizes["test"] == len(whole.test), "validation_share changes the test rows"
        if self.has_unique_rows:
            rows = [_bytes(part) for part in _parts(data).values()]
            assert len(set().union(*rows)) == sum(map(len, rows)), "a row is in two parts"

    def test_equal_seeds_split_equally_whatever_the_global_generator_does(self) -> None:
        first = self.ready()
        torch.manual_seed(99)
        again, others = self.ready(), [self.ready(seed=seed) for seed in range(4, 8)]
        for name, rows in _parts(first).items():
            assert torch.equal(rows.inputs, _parts(again)[name].inputs), f"{name} differs"
            assert torch.equal(rows.targets, _parts(again)[name].targets), f"{name} differs"
        if self.has_unique_rows:
            splits = {frozenset(_bytes(_parts(data)["val"])) for data in (first, *others)}
            assert len(splits) > 1, "validation rows do not depend on the seed"

    def test_without_a_validation_share_there_are_no_validation_rows(self) -> None:
        data = self.ready(validation_share=0.0)
        assert data.val is None
        assert data.val_dataloader() == []

    def test_an_impossible_validation_share_is_refused(self) -> None:
        for share in (-0.1, 1.0, 1.5):
            refusal = _refusal(lambda share=share: self.make(validation_share=share))  # type: ignore[misc]
            assert f"validation_share={share}" in refusal, f"{share} is not refused by its name"

    def test_facts_are_those_of_the_rows_and_fit_a_recipe(self) -> None:
        data = self.ready()
        facts = data.facts()
        assert json.loads(json.dumps(facts)) == facts, "facts are not JSON"
        shape = list(data.normalize(data.train.inputs[:1]).shape[1:])
        assert facts["input_shape"] == shape
        assert facts["num_train"] == len(data.train)
        groups = {
            "method": {"name": "pointwise", "optimizer": {"name": "adam"}},
            "net": {"name": "mlp"},
            "task": {"name": "digits", "dataset": "digits"},
        }
        check_recipe(
            {"version": 1, "stage": "float", "seed": 0, **groups, "facts": data.recipe_facts()}
        )

    def test_further_calls_of_setup_read_nothing(self) -> None:
        data = self.ready()
        train = data.train
        data.prepare_data()
        data.setup("test")
        assert data.train is train

    def test_an_epoch_has_every_row_once_and_evaluation_is_one_batch(self) -> None:
        data = self.ready(batch_size=5)
        targets = torch.cat([targets for _, targets in data.train_dataloader()])
        assert torch.equal(targets.sort().values, data.train.targets.sort().values)
        assert data.val is not None
        evaluations: list[tuple[Any, Rows]]
        evaluations = [(data.val_dataloader(), data.val), (data.test_dataloader(), data.test)]
        for loader, rows in evaluations:
            (batch,) = loader
            assert torch.equal(batch[0], rows.inputs)
            assert torch.equal(batch[1], rows.targets)

    def test_inputs_are_normalized_and_augmented_row_by_row(self) -> None:
        data = self.ready()
        inputs = data.train.inputs[:3]
        normalized = data.normalize(inputs)
        torch.testing.assert_close(data.normalize(inputs[:1]), normalized[:1])
        augmented = data.augment(inputs)
        assert augmented.shape == inputs.shape
        assert augmented.dtype == inputs.dtype


class _StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def _trainer(max_epochs: int, **options: Any) -> pl.Trainer:
    """Return a trainer on the CPU that writes nothing."""
    return pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        **options,
    )


def _refusal(call: Callable[[], object]) -> str:
    """Return the message of the ValueError of a call, or an empty string without an error."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def _weights(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def _inputs(shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, *shape, generator=generator)


def _made(
    make: Callable[[Sequence[int], Sequence[int]], nn.Module],
    shape: Sequence[int],
    heads: Sequence[int] = (4,),
) -> nn.Module:
    torch.manual_seed(0)
    return make(shape, heads).eval()


def _ensemble(net: nn.Module) -> nn.Module:
    ensemble = Ensemble(net, num_members=2)
    for _ in range(2):
        for param in ensemble.current.parameters():
            param.data.mul_(1.1)
        ensemble.collect()
    return ensemble


def _calibrated(net: nn.Module, inputs: Tensor) -> nn.Module:
    """Quantize a network by calibration, as `quantize.py` does."""
    module = pl.LightningModule()
    module.net = net
    quantize_module(module, QuantSpec(), "ptq")
    return calibrate(module.net, [inputs]).eval()


def _check_int8(net: nn.Module, inputs: Tensor, num_samples: int) -> None:
    """Check that a calibrated network computes the same in int8; layers are compared, too."""
    if inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    integer = convert(deepcopy(net), QuantSpec().engine, probe=inputs)
    expected, found = (predictive(each, inputs, num_samples) for each in (net, integer))
    torch.testing.assert_close(found, expected)


def _parts(data: TensorData) -> dict[str, Rows]:
    assert data.val is not None
    return {"train": data.train, "val": data.val, "test": data.test}


def _bytes(rows: Rows) -> list[bytes]:
    """Return each row with its target as bytes."""
    return [
        inputs.tobytes() + target.tobytes()
        for inputs, target in zip(rows.inputs.numpy(), rows.targets.numpy(), strict=True)
    ]
