"""The methods in a Trainer: losses, members and checkpoints."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn
from torchmetrics import Metric

from bqnn.data.loader import TensorLoader
from bqnn.inference.convergence import effective_sample_size, split_rhat
from bqnn.inference.likelihoods import Regression
from bqnn.inference.predictions import Prediction, score
from bqnn.layers.bayes import GaussianWeight, kl_divergence
from bqnn.methods import (
    METHODS,
    BayesByBackprop,
    MCDropoutMethod,
    Method,
    Pointwise,
    SGHMCEnsemble,
)
from bqnn.nets import ResNet
from bqnn.quant.callback import QuantizationCallback
from bqnn.quant.spec import QuantSpec
from tests.bare_trainer import bare_trainer
from tests.small_methods import (
    NUM_ROWS,
    OPTIONS,
    image_method,
    images,
    mlp,
    table,
    table_method,
    with_other_weights,
)


def trainer(max_epochs: int = 1, **options: Any) -> pl.Trainer:
    return bare_trainer(max_epochs, num_sanity_val_steps=0, inference_mode=False, **options)


class AtEpochEnd(pl.Callback):
    """Records what `look` returns for the method at the end of every epoch."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append(self.look(pl_module))


def weights_of(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


# ---- every method


def test_training_metrics_are_averages_over_rows_not_batches():
    torch.manual_seed(0)
    rows = TensorLoader(torch.randn(5, 3), torch.randn(5), batch_size=4)  # batches of 4 and 1
    method = table_method("pointwise", optimizer={"name": "sgd", "lr": 1e-30})
    fit = trainer()
    fit.fit(method, rows)
    with torch.no_grad():
        expected = method.likelihood.loss(method(rows.inputs), rows.targets)
    torch.testing.assert_close(fit.callback_metrics["train/nll"], expected)


def test_metrics_of_validation_and_test_keep_the_range_and_the_digits_of_float64():
    rows = table()
    rows.targets[3] = 1e30  # of which the square is no float32
    method = table_method("pointwise", optimizer={"name": "sgd", "lr": 1e-30})
    fit = trainer()
    fit.fit(method, table(), rows)
    method.eval()
    whole = TensorLoader(rows.inputs, rows.targets, batch_size=NUM_ROWS)
    samples = method.predictive(rows.inputs)
    expected = score(Prediction(method.likelihood, samples, rows.targets))
    assert expected["nll"] > 1e50
    for split, run in (("val", fit.validate), ("test", fit.test)):
        (found,) = run(method, whole, verbose=False)
        assert found == {f"{split}/{name}": value for name, value in expected.items()}


@pytest.mark.parametrize("monitored", ["train/loss", "val/nll"])
def test_metrics_are_there_for_callbacks_of_lightning(monitored):
    method = table_method("pointwise", optimizer={"name": "sgd", "lr": 1e-30})
    stopping = EarlyStopping(monitored, patience=1)
    fit = trainer(max_epochs=5, callbacks=[stopping])
    fit.fit(method, table(), table())
    assert fit.current_epoch == 2  # that of the first was not improved
    assert {"train/loss", "train/nll", "train/lr", "val/rmse"} <= fit.logged_metrics.keys()


def test_validation_draws_fewer_samples_while_training_than_after(monkeypatch):
    method = table_method("bbb", num_samples=7, val_samples=2)
    drawn = []
    plain = method.predictive

    def counting(x: Tensor, num_samples: int | None = None) -> Tensor:
        samples = plain(x, num_samples)
        drawn.append(len(samples))
        return samples

    monkeypatch.setattr(method, "predictive", counting)
    trainer().fit(method, table(), table())
    trainer().validate(method, table(), verbose=False)
    trainer().test(method, table(), verbose=False)
    assert drawn == [2] * 3 + [7] * 3 + [7] * 3


class At(pl.Callback):
    """Calls a function with the method before the batch of a global step."""

    def __init__(self, step: int, act: Callable[[Any], object]) -> None:
        self.step = step
        self.act = act

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(module)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(name):
    method = table_method(name)
    network = {
        "sghmc": lambda net: net.current,
        "ensemble": lambda net: net.members[1],
    }.get(name, lambda net: net)(method.net)
    said = r"loss is nan at step 5 \(epoch 1, batch 2\).*; net\..*output\.heads\.0\.linear\.bias"
    spoil = At(5, lambda _: nn.init.constant_(network.output.heads[0].linear.bias, torch.nan))
    with pytest.raises(FloatingPointError, match=said):
        trainer(max_epochs=3, callbacks=[spoil]).fit(method, table())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_not_finite_stops_the_run_with_its_parameter(name, value):
    method = table_method(name)
    wanted = {
        "bbb": "net.features.2.rho",
        "sghmc": "net.current.features.2.weight",
        "swag": "net.features.2.mean",
        "laplace": "net.features.2.mean",
        "ensemble": "net.members.1.features.2.weight",
    }.get(name, "net.features.2.weight")
    before = []

    def spoil(module: Method) -> None:
        before.append(weights_of(module.net).clone())
        param = dict(module.named_parameters())[wanted]
        param.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), value))

    said = rf"gradient of {wanted} has a norm of (inf|nan) while the loss is .*step 4 \(epoch 1"
    with pytest.raises(FloatingPointError, match=said):
        trainer(max_epochs=3, callbacks=[At(4, spoil)]).fit(method, table())
    assert torch.equal(weights_of(method.net)[: len(before[0])], before[0])  # no step was made


def spoil_loss(method: Method) -> None:
    nn.init.constant_(method.net.output.heads[0].linear.bias, torch.nan)


def spoil_gradient(method: Method) -> None:
    method.net.output.heads[0].linear.bias.register_hook(lambda grad: grad * torch.nan)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(spoil_loss, "the loss is nan"), (spoil_gradient, r"gradient of net\..*bias has a norm")],
)
@pytest.mark.parametrize(("step", "batch"), [(2, 0), (3, 2)])
def test_steps_of_several_batches_are_watched_by_step_and_batch(spoil, said, step, batch):
    # three batches an epoch, two to a step: steps 2 and 3 of epoch 1 start at batches 0 and 2
    ends_with = {0: 0 if spoil is spoil_loss else 1, 2: 2}[batch]
    callback = At(step, spoil)
    fit = trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[callback])
    with pytest.raises(
        FloatingPointError, match=rf"{said}.* step {step} \(epoch 1, batch {ends_with}\)"
    ):
        fit.fit(table_method("pointwise"), table())


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        # lr (1 + cos(pi t / T)) / 2; three batches an epoch
        ("cosine", {"max_steps": 6}, [0.1, 0.05]),
        ("cosine", {"accumulate_grad_batches": 2, "max_steps": 4}, [0.1, 0.05]),
        ("cosine_by_step", {"accumulate_grad_batches": 3}, [0.1, 0.0853553391, 0.05, 0.0146446609]),
    ],
)
def test_the_rate_ends_at_0_with_the_last_step(schedule, options, expected):
    logged = LoggedRate()
    method = table_method("pointwise", schedule=schedule, optimizer={"name": "sgd", "lr": 0.1})
    fit = trainer(max_epochs=4, callbacks=[logged], check_val_every_n_epoch=1, **options)
    fit.fit(method, table())
    assert logged.rates == pytest.approx(expected)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_trainer_that_overfits_is_refused(name):
    with pytest.raises(ValueError, match=r"^overfit_batches=2: .* choose limit_train"):
        trainer(overfit_batches=2).fit(table_method(name), table())


def test_fine_tuned_members_are_watched_too():
    method = table_method("sghmc", num_members=2)
    trainer(max_epochs=2).fit(method, table())
    method = method.fine_tuning({"name": "adam", "lr": 1e-3}, prior_weight=1.0)
    param = dict(method.named_parameters())["net.members.1.output.heads.0.linear.bias"]
    spoil = At(2, lambda _: param.register_hook(lambda grad: grad * torch.inf))
    with pytest.raises(
        FloatingPointError, match=r"members\.1\.output\.heads\.0\.linear\.bias .* step 2"
    ):
        trainer(max_epochs=3, callbacks=[spoil]).fit(method, table())


class LoggedRate(pl.Callback):
    """Records the learning rate that each epoch logs."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch > 0:  # what the epoch before has logged
            self.rates.append(float(trainer.callback_metrics["train/lr"]))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(float(trainer.callback_metrics["train/lr"]))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # lr (1 + cos(pi t / 4)) / 2 in the epochs t = 0, 1, 2, 3
        ("cosine", [0.1, 0.0853553391, 0.05, 0.0146446609]),
        ("constant", [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_the_rate_that_an_epoch_logs_is_the_one_it_was_trained_with(schedule, expected):
    logged = LoggedRate()
    method = table_method("pointwise", schedule=schedule, optimizer={"name": "sgd", "lr": 0.1})
    trainer(max_epochs=4, callbacks=[logged]).fit(method, table())
    assert logged.rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"beta": -1.0}, r"beta=-1\.0"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"init_delta": 0.0}, r"init_delta=0\.0"),
    ],
)
def test_a_bad_number_is_refused_by_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        table_method("bbb", **changes)


def test_bad_numbers_of_the_other_methods_are_refused_too():
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        table_method("mcdropout", rate=1.0)
    with pytest.raises(ValueError, match="burn_in=-1"):
        table_method("sghmc", burn_in=-1)
    with pytest.raises(ValueError, match="collect_every=0"):
        table_method("sghmc", collect_every=0)


# ---- Bayes-by-backprop


class Recorded(BayesByBackprop):
    """Records the terms of every training step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.terms: list[dict[str, Tensor | float]] = []

    def loss_terms(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor | float]:
        self.terms.append(super().loss_terms(inputs, targets))
        return self.terms[-1]


def recorded(max_epochs: int, accumulate_grad_batches: int = 1, **changes: Any) -> Recorded:
    options = {"num_train": NUM_ROWS, "seed": 0, **OPTIONS["bbb"], **changes}
    method = Recorded(mlp(), Regression(0.0, 1.0), **options)
    fit = trainer(max_epochs=max_epochs, accumulate_grad_batches=accumulate_grad_batches)
    fit.fit(method, table())
    return method


def test_loss_is_the_mean_nll_plus_beta_times_the_kl_over_the_rows_trained_on():
    method = table_method("bbb", num_train=1234, beta=0.7)
    inputs, targets = torch.randn(4, 3), torch.randn(4)
    with torch.random.fork_rng():
        nll = method.likelihood.loss(method(inputs), targets)
    kl = kl_divergence(method.net)
    terms = method.loss_terms(inputs, targets)
    torch.testing.assert_close(terms["loss"], nll + 0.7 * kl / 1234)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["kl"], kl)
    assert terms["beta"] == 0.7


@pytest.mark.parametrize("accumulated", [1, 2, 3, 5])
def test_beta_grows_linearly_in_batches_and_is_constant_after(accumulated):
    # three batches an epoch
    method = recorded(4, accumulate_grad_batches=accumulated, beta=0.6, warmup_epochs=2)
    betas = [terms["beta"] for terms in method.terms]
    assert betas == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5] + [0.6] * 6)
    for terms in method.terms:
        expected = terms["nll"] + terms["beta"] * terms["kl"] / NUM_ROWS
        torch.testing.assert_close(terms["loss"], expected)


def test_without_warm_up_beta_is_there_from_the_first_step():
    assert [terms["beta"] for terms in recorded(max_epochs=1).terms] == [0.5] * 3


def small_resnet() -> nn.Module:
    return ResNet([1, 8, 8], [3], width=4, blocks_per_stage=(1, 1))


def test_means_are_those_of_a_pointwise_state_and_sigma_is_in_proportion():
    torch.manual_seed(5)
    pointwise = image_method("pointwise", net=small_resnet())
    with torch.no_grad():
        pointwise.net.output.heads[0].linear.weight[0, 0] = 0
        for buffer in pointwise.buffers():
            buffer.copy_(torch.full_like(buffer, 3))
    bayes = image_method("bbb", net=small_resnet(), init_delta=0.2)
    bayes.initialize_from(pointwise.state_dict())

    trained, layers = pointwise.state_dict(), 0
    for name, layer in bayes.named_modules():
        if isinstance(layer, GaussianWeight):
            layers += 1
            mean = trained.pop(f"{name}.weight")
            assert torch.equal(layer.mean, mean)
            sigma = (0.2 * mean.abs()).clamp_min(1e-4)
            torch.testing.assert_close(layer.sigma, sigma, rtol=1e-5, atol=0)
    assert layers == 7
    own = bayes.state_dict()
    assert len(trained) == 6 * 5  # what is left is batch norm
    for name, value in trained.items():
        assert torch.equal(own[name], value)


@pytest.mark.parametrize("other", [image_method("pointwise"), table_method("bbb")])
def test_a_state_of_another_network_or_method_is_refused_and_changes_nothing(other):
    bayes = table_method("bbb")
    before = weights_of(bayes)
    with pytest.raises(ValueError, match=r"^state: its network is not this one, they differ in n"):
        bayes.initialize_from(other.state_dict())
    assert torch.equal(weights_of(bayes), before)


def test_rho_has_its_own_learning_rate_in_the_training_alone():
    method = table_method("bbb", rho_lr=0.25, optimizer={"name": "sgd", "lr": 0.1})
    others, rhos = method.trained_parameters()
    layers = [module for module in method.modules() if isinstance(module, GaussianWeight)]
    assert [id(param) for param in rhos["params"]] == [id(layer.rho) for layer in layers]
    assert len(others["params"]) + len(layers) == len(list(method.parameters()))
    fit = trainer(max_epochs=4)
    fit.fit(method, table())
    starts = [group["initial_lr"] for group in fit.optimizers[0].param_groups]
    assert starts == [0.1, 0.25]
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == pytest.approx([0, 0])
    assert fit.callback_metrics["train/lr"] == pytest.approx(0.0146446609)
    tuning = method.fine_tuning({"name": "adam", "lr": 1e-3}, prior_weight=1.0)
    assert all(isinstance(param, nn.Parameter) for param in tuning.trained_parameters())


def test_rates_of_rho_that_are_none_or_equal_train_the_same():
    states = []
    for rate in (None, 1e-2):
        method = table_method("bbb", rho_lr=rate)  # adam at 1e-2
        trainer(max_epochs=2).fit(method, table())
        states.append(weights_of(method.net))
    assert torch.equal(*states)
    with pytest.raises(ValueError, match=r"^rho_lr=0: choose more than 0"):
        table_method("bbb", rho_lr=0)


def tuned_bayes(max_epochs: int, **changes: Any) -> Method:
    method = table_method("bbb", prior_std=0.1, num_train=100, beta=10.0, **changes)
    trainer(max_epochs=max_epochs).fit(method, table())
    return method


@pytest.mark.parametrize("init_rho", [-9.0, 0.0])
def test_sigma_that_is_on_its_way_at_the_end_is_warned_of_with_a_remedy(init_rho, caplog):
    with caplog.at_level("WARNING", logger="bqnn"):
        tuned_bayes(3, init_rho=init_rho, rho_lr=1e-3)
    (line,) = caplog.messages
    assert "\n" not in line
    assert f"still {'raise' if init_rho < 0 else 'lower'} it (prior_std is 0.1)" in line
    assert "choose a larger rho_lr, or train longer" in line


def test_sigma_that_has_converged_is_not_warned_of_and_does_not_depend_on_its_start(caplog):
    sigmas = []
    with caplog.at_level("WARNING", logger="bqnn"):
        for init_rho in (-7.0, -1.0):
            net = tuned_bayes(150, init_rho=init_rho, rho_lr=0.1).net
            layers = [module for module in net.modules() if isinstance(module, GaussianWeight)]
            sigmas.append(torch.cat([layer.sigma.detach().flatten() for layer in layers]))
    assert caplog.messages == []
    torch.testing.assert_close(*[sigma.median() for sigma in sigmas], rtol=0.1, atol=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_optimizer_trains_rho(optimizer):
    tuned_bayes(1, optimizer={"name": optimizer, "lr": 1e-3})


# ---- MC dropout


def test_evaluation_drops_and_leaves_batch_norm_as_it_was():
    method = image_method("mcdropout", net=small_resnet())
    assert isinstance(method, MCDropoutMethod)
    evaluate = trainer()
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    evaluate.validate(method, images(), verbose=False)
    evaluate.test(method, images(), verbose=False)
    draws = method.eval().predictive(images().inputs, 2)
    assert not torch.equal(draws[0], draws[1])
    assert len(before) == 6 * 3
    for name, buffer in method.named_buffers():
        assert torch.equal(buffer, before[name])
    trainer().fit(method.train(), images())
    moved = [
        name for name, buffer in method.named_buffers() if not torch.equal(buffer, before[name])
    ]
    assert len(moved) == 6 * 3


# ---- pointwise


def test_pointwise_has_one_output_whatever_the_seed_and_the_number_of_samples():
    first, second = (table_method("pointwise", seed=seed, num_samples=20).eval() for seed in (0, 1))
    assert isinstance(first, Pointwise)
    x = table().inputs
    draws = first.predictive(x, 2)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(second.predictive(x), draws[:1])


# ---- SGHMC


def test_members_are_the_weights_at_the_ends_of_the_right_epochs():
    method = table_method("sghmc", burn_in=2, collect_every=3, num_members=5)
    assert isinstance(method, SGHMCEnsemble)
    look = AtEpochEnd(lambda method: weights_of(method.net.current))
    trainer(max_epochs=10, callbacks=[look]).fit(method, table(), table())
    # 3 and 6 epochs after burn-in; the next would be epoch 11
    assert len(method.net) == 2
    assert torch.equal(weights_of(method.net.members[0]), look.seen[5 - 1])
    assert torch.equal(weights_of(method.net.members[1]), look.seen[8 - 1])


@pytest.mark.parametrize(
    ("burn_in", "collect_every", "max_epochs", "expected"),
    [(0, 1, 3, [1, 2, 3]), (0, 2, 5, [2, 4]), (3, 1, 4, [4]), (4, 1, 4, []), (1, 1, 6, [5, 6, 4])],
)
def test_members_count_from_the_end_of_burn_in_and_the_last_are_kept(
    burn_in, collect_every, max_epochs, expected
):
    method = table_method("sghmc", burn_in=burn_in, collect_every=collect_every)
    look = AtEpochEnd(lambda method: weights_of(method.net.current))
    trainer(max_epochs=max_epochs, callbacks=[look]).fit(method, table())
    assert len(method.net) == len(expected)
    for member, epoch in zip(method.net.members, expected, strict=True):
        assert torch.equal(weights_of(member), look.seen[epoch - 1])


class Steps(pl.Callback):
    """Records the step size and the noise of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        (group,) = optimizer.param_groups
        self.seen.append((group["lr"], group["noise"]))


def test_chains_start_from_other_weights_with_an_empty_sampler_and_give_equal_numbers():
    options = {"chain_epochs": 3, "burn_in": 1, "num_members": 4}
    method = table_method("sghmc", **options, optimizer={"name": "sghmc", "lr": 1e-12})
    look = AtEpochEnd(lambda method: weights_of(method.net.current))
    fit = trainer(max_epochs=6, callbacks=[look])
    fit.fit(method, table(), table())
    for epochs, start in ((range(3), mlp()), (range(3, 6), with_other_weights(mlp(), 1))):
        for epoch in epochs:  # the tiny steps leave the weights where the chain starts
            torch.testing.assert_close(look.seen[epoch], weights_of(start), atol=1e-6, rtol=0)
    assert fit.optimizers[0].param_groups[0]["step"] == 3 * 3
    epochs_of_members = [1, 2, 4, 5]
    assert len(method.net) == 4
    for member, epoch in zip(method.net.members, epochs_of_members, strict=True):
        assert torch.equal(weights_of(member), look.seen[epoch])


def test_cycles_set_the_steps_and_the_noise_of_the_sampler():
    steps = Steps()
    options = {"cycle_epochs": 2, "burn_in": 1, "exploration": 0.5, "optimize_epochs": 1}
    method = table_method("sghmc", **options, optimizer={"name": "sghmc", "lr": 0.01})
    trainer(max_epochs=5, callbacks=[steps]).fit(method, table())
    sizes, noise = zip(*steps.seen, strict=True)
    cycle = [0.01 * math.cos(math.pi / 2 * step / 6) for step in range(6)]  # three steps an epoch
    assert sizes == pytest.approx([0.01] * 3 + 2 * cycle)
    assert list(noise) == [False] * 3 + 2 * ([False] * 3 + [True] * 3)
    assert len(method.net) == 2  # the last epoch of each cycle


def test_chains_and_cycles_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"^schedule=cosine: cycle_epochs sets the size"):
        table_method("sghmc", cycle_epochs=2, schedule="cosine")
    options = {"num_train": NUM_ROWS, "seed": 0, **OPTIONS["sghmc"], "chain_epochs": 2}
    method = SGHMCEnsemble(mlp(), Regression(0.0, 1.0), **options)
    with pytest.raises(ValueError, match=r"^chain_epochs=2: each chain needs .* make_net"):
        trainer(max_epochs=4).fit(method, table())
    method = SGHMCEnsemble(mlp(), Regression(0.0, 1.0), **options, make_net=lambda _: mlp())
    quantize = QuantizationCallback(QuantSpec())
    with pytest.raises(ValueError, match=r"^chain_epochs=2: .* train in float, and quantize"):
        trainer(max_epochs=4, callbacks=[quantize]).fit(method, table())


def test_diagnostics_are_those_of_the_validation_nll_of_the_members_by_chain():
    method = table_method("sghmc", chain_epochs=6, burn_in=1, num_members=10, num_samples=10)
    rows = table()
    trainer(max_epochs=12).fit(method, rows)
    method.eval()
    samples = method.predictive(rows.inputs)
    prediction = Prediction(method.likelihood, samples, rows.targets)
    with torch.no_grad():
        nll = torch.stack([
            method.likelihood.loss(member(rows.inputs).double(), rows.targets)
            for member in method.net.members
        ])  # fmt: skip
    draws = nll.reshape(2, 5)
    found = method.diagnostics(prediction)
    assert found["rhat"] == pytest.approx(split_rhat(draws))
    assert found["ess"] == pytest.approx(effective_sample_size(draws))
    few = Prediction(method.likelihood, samples[:3], rows.targets)
    assert method.diagnostics(few) == {}  # chains of 3 members are too short
    assert table_method("bbb").diagnostics(prediction) == {}


def test_sampler_gets_the_rows_and_the_steps_of_burn_in_and_the_current_network_alone():
    method = table_method("sghmc", burn_in=2)
    fit = trainer(max_epochs=4)
    fit.fit(method, table())
    (group,) = fit.optimizers[0].param_groups
    assert group["num_train"] == NUM_ROWS
    assert group["num_burn_in_steps"] == 2 * 3
    assert group["step"] == 4 * 3
    own = [id(parameter) for parameter in method.net.current.parameters()]
    assert [id(parameter) for parameter in group["params"]] == own


@pytest.mark.parametrize(
    ("options", "burn_in", "steps"),
    [
        ({"accumulate_grad_batches": 2}, 2 * 2, 4 * 2),  # three batches an epoch
        ({"accumulate_grad_batches": 5}, 2, 4),
        ({"limit_train_batches": 2}, 2 * 2, 4 * 2),
        ({"max_steps": 7}, 2 * 3, 7),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 2 * 2, 3),
    ],
)
def test_burn_in_is_in_epochs_however_many_steps_they_have(options, burn_in, steps):
    fit = trainer(max_epochs=4, **options)
    fit.fit(table_method("sghmc", burn_in=2), table())
    (group,) = fit.optimizers[0].param_groups
    assert group["num_burn_in_steps"] == burn_in
    assert group["step"] == steps


class SumOfGradients(pl.Callback):
    """Sums the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.steps += 1
        for name, param in module.net.current.named_parameters():
            self.sums[name] = self.sums.get(name, 0) + param.grad


@pytest.mark.parametrize(
    ("batch_size", "options", "num_rows"),
    [
        (4, {}, 12),
        (5, {}, 12),  # 5, 5, 2
        (11, {}, 12),
        (5, {"limit_train_batches": 2}, 10),
        (3, {"accumulate_grad_batches": 4}, 12),
        (5, {"accumulate_grad_batches": 2}, 12),
        (2, {"accumulate_grad_batches": 4}, 12),
        (5, {"accumulate_grad_batches": 8}, 12),
    ],
)
def test_noise_of_the_gradients_that_sghmc_gets_cancels_over_an_epoch(
    batch_size, options, num_rows
):
    method = table_method("sghmc", optimizer={"name": "sghmc", "lr": 1e-12})  # holds the weights
    method.double()
    inputs, targets = table().inputs.double(), table().targets.double()
    seen = SumOfGradients()
    trainer(callbacks=[seen], **options).fit(method, TensorLoader(inputs, targets, batch_size))
    method.zero_grad()
    outputs = method.net.current(inputs[:num_rows])
    method.likelihood.loss(outputs, targets[:num_rows]).backward()
    for name, param in method.net.current.named_parameters():
        torch.testing.assert_close(seen.sums[name] / seen.steps, param.grad, rtol=1e-6, atol=1e-9)


def test_sghmc_refuses_clipped_gradients():
    with pytest.raises(ValueError, match=r"^gradient_clip_val=1\.0: .* a smaller optimizer\.lr"):
        trainer(gradient_clip_val=1.0).fit(table_method("sghmc"), table())


def test_evaluation_uses_the_members_there_are_and_warns_when_there_are_none(caplog):
    method = table_method("sghmc", num_samples=20)
    assert method.available_samples == 1
    with caplog.at_level("WARNING", logger="bqnn"):
        trainer().test(method, table(), verbose=False)
    assert "no member is collected yet" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="bqnn"):
        trainer(max_epochs=2).fit(method, table())
    assert caplog.text == ""
    assert method.available_samples == 2
    assert len(method.eval().predictive(table().inputs)) == 2


def test_a_run_too_short_for_a_member_warns_at_its_start(caplog):
    method = table_method("sghmc", burn_in=2, collect_every=3)
    with caplog.at_level("WARNING", logger="bqnn"):
        trainer(max_epochs=4).fit(method, table())
    assert "first member comes after epoch 5" in caplog.text


def test_fine_tuning_pulls_members_to_the_prior_that_the_sampler_draws() -> None:
    method = image_method("sghmc")
    assert isinstance(method, SGHMCEnsemble)
    tuning = method.fine_tuning({"name": "adam", "lr": 1e-3}, prior_weight=1.0)
    assert len(method.net) == 1
    (member,) = method.net.members
    energy = tuning.prior_energy(member)
    energy.backward()
    for param in member.parameters():
        # The mean of Gamma(10 + n / 2, 10 + |w|^2 / 2), with the sampler's default prior.
        square = float(param.detach().square().sum())
        precision = (10 + param.numel() / 2) / (10 + square / 2)
        assert torch.allclose(param.grad, precision * param.detach(), rtol=1e-5)


def test_metrics_are_no_part_of_the_module():
    """Only the network moves to the device, so a device without float64 can train."""
    method = table_method("pointwise")
    trainer().test(method, table(), verbose=False)
    assert not [module for module in method.modules() if isinstance(module, Metric)]
