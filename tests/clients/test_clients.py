"""Libraries that use laplace-torch or its predictions, given ELLA by nothing but the name of its structure.

Deselected by default: ``make test-clients`` installs them. What of their calls costs little is tested without them in
tests/host/test_clones.py and test_client_calls.py.
"""

from __future__ import annotations

import warnings

import laplace
import numpy as np
import pytest
import torch
from helpers import C, D, H, inputs, loader, mlp, targets
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch import nn

from laplace_ella import ELLALaplace, NystromGGN

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # the packages' own warnings

F32 = torch.float32
N_TRAIN, N_TEST = 61, 23


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Trainers write their logs where they are."""
    monkeypatch.chdir(tmp_path)


def network(n_outputs=C):
    return mlp(n_outputs, dtype=F32)


def data_of(likelihood, n=N_TRAIN, seed=1, n_outputs=C):
    x = inputs(n, seed, F32)
    return x, targets(likelihood, n, n_outputs, seed + 1, F32)


def direct(likelihood, model, data, **options):
    la = ELLALaplace(model, likelihood, **options)
    la.fit(loader(*data, batch_size=17))
    return la


# ------------------------------------------------------------------ torch-uncertainty


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("tuned", [True, False])
def test_torch_uncertainty_wraps_it(task, tuned):
    from torch_uncertainty.post_processing import LaplaceApprox

    data, x = data_of(task), inputs(N_TEST, 5, F32)
    approx = LaplaceApprox(
        task, network(), weight_subset="all", hessian_struct="ella", optimize_prior_precision=tuned
    )
    assert isinstance(approx.la, ELLALaplace)
    approx.fit(loader(*data, batch_size=17))
    la = direct(task, network(), data)
    if tuned:
        la.optimize_prior_precision("glm", "marglik")
    expected = la(x)
    assert torch.equal(approx(x), expected if task == "classification" else expected[0])
    assert torch.equal(approx.la.prior_precision, la.prior_precision)


def test_torch_uncertainty_tests_it_in_its_routine():
    from lightning import LightningDataModule
    from torch_uncertainty import TUTrainer
    from torch_uncertainty.post_processing import LaplaceApprox
    from torch_uncertainty.routines import ClassificationRoutine

    data, (x, y) = data_of("classification"), data_of("classification", N_TEST, 5)

    class Module(LightningDataModule):
        training_task = "classification"
        eval_ood = eval_shift = False

        def test_dataloader(self):
            return [loader(x, y)]

        def postprocess_dataloader(self):
            return loader(*data, batch_size=17)

    routine = ClassificationRoutine(
        network(),
        num_classes=C,
        loss=nn.CrossEntropyLoss(),
        post_processing=LaplaceApprox("classification", weight_subset="all", hessian_struct="ella"),
    )
    trainer = TUTrainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    found = trainer.test(routine, datamodule=Module(), verbose=False)[0]
    la = direct("classification", network(), data)
    la.optimize_prior_precision("glm", "marglik")
    nll = nn.functional.nll_loss(la(x).log(), y).item()
    values = {name: value for name, value in found.items() if "NLL" in name}
    assert any(value == pytest.approx(nll, rel=1e-4) for value in values.values()), found


# ------------------------------------------------------------------ lightning-uq-box


def uq_module(data, test):
    from lightning import LightningDataModule

    def collated(rows):
        x, y = zip(*rows)
        return {"input": torch.stack(x), "target": torch.stack(y)}

    class Module(LightningDataModule):
        def train_dataloader(self):
            return loader(*data, batch_size=17)

        def test_dataloader(self):
            return loader(*test, collate_fn=collated)

    return Module()


def run_of(wrapper, module):
    from lightning import Trainer

    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    return trainer.test(wrapper, datamodule=module, verbose=False)[0]


@pytest.mark.parametrize("backend", [None, CurvlinopsGGN, BackPackGGN, NystromGGN])
def test_lightning_uq_box_rebuilds_and_tests_a_classifier(backend):
    from lightning_uq_box.uq_methods import LaplaceClassification

    data, test = data_of("classification"), data_of("classification", N_TEST, 5)
    la = laplace.Laplace(network(), "classification", "all", "ella", seed=3, backend=backend)
    wrapper = LaplaceClassification(la)
    rebuilt = wrapper.laplace_model
    assert type(rebuilt) is ELLALaplace
    assert rebuilt is not la
    assert (rebuilt.seed, type(rebuilt.backend)) == (3, type(la.backend))
    assert rebuilt.temperature_fixed is False
    found = run_of(wrapper, uq_module(data, test))
    expected = direct("classification", network(), data, seed=3, backend=backend)(test[0])
    torch.testing.assert_close(wrapper.predict_step(test[0])["pred"], expected)
    accuracy = (expected.argmax(1) == test[1]).double().mean().item()
    assert found["testAcc"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("num_samples", [None, 50])
def test_lightning_uq_box_tunes_and_tests_a_regression(num_samples):
    from lightning_uq_box.uq_methods import LaplaceRegression

    data, test = data_of("regression", n_outputs=1), data_of("regression", N_TEST, 5, n_outputs=1)
    la = laplace.Laplace(network(1), "regression", "all", "ella", sigma_noise=0.8)
    wrapper = LaplaceRegression(
        la, num_samples=num_samples, tune_sigma_noise=True, n_epochs_tuning=20, tuning_lr=0.1
    )
    found = run_of(wrapper, uq_module(data, test))
    tuned = wrapper.laplace_model
    same = direct("regression", network(1), data, sigma_noise=tuned.sigma_noise.detach())
    same.prior_precision = tuned.prior_precision.detach()
    assert tuned.sigma_noise.item() != pytest.approx(0.8)
    mean, variance = same(test[0])
    predicted = wrapper.predict_step(test[0])
    if num_samples is None:
        torch.testing.assert_close(predicted["pred"], mean[:, 0])
        torch.testing.assert_close(predicted["epistemic_uct"].detach(), variance.flatten().sqrt())
    assert predicted["pred_uct"].shape == (N_TEST,)
    rmse = (mean - test[1]).square().mean().sqrt().item()
    assert found["testRMSE"] == pytest.approx(rmse, rel=0.3 if num_samples else 1e-4)


# ------------------------------------------------------------------ BoTorch


def botorch_surrogate():
    """Return the surrogate of laplace-bayesopt, BoTorch's model of a laplace-torch posterior."""
    from laplace_bayesopt.botorch import LaplaceBoTorch

    x = torch.rand(N_TRAIN, D, generator=torch.Generator().manual_seed(0))
    y = (x * 3).sin().sum(1, keepdim=True)
    return LaplaceBoTorch(
        lambda: nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 1)),
        x,
        y,
        hess_factorization="ella",
        n_epochs=5,
        posthoc_marglik_iters=10,
        noise_var=0.01,
    )


def test_botorch_has_a_joint_posterior_with_gradients():
    surrogate = botorch_surrogate()
    assert isinstance(surrogate.bnn, ELLALaplace)
    x = torch.rand(7, 3, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    posterior = surrogate.posterior(x)
    mean, covariance = surrogate.bnn(x[2], joint=True)
    torch.testing.assert_close(posterior.mean[2, :, 0], mean)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix[2], covariance + 0.01 * torch.eye(3), rtol=1e-4, atol=1e-6
    )
    samples = posterior.rsample(torch.Size([5]))
    assert samples.shape == (5, 7, 3, 1)
    assert torch.autograd.grad(samples.sum() + posterior.variance.sum(), x)[0].abs().sum() > 0


def test_botorch_optimizes_acquisitions_and_adds_observations():
    from botorch.acquisition import LogExpectedImprovement
    from botorch.acquisition.logei import qLogExpectedImprovement
    from botorch.optim import optimize_acqf
    from botorch.sampling import SobolQMCNormalSampler

    surrogate = botorch_surrogate()
    bounds, best = torch.tensor([[0.0] * D, [1.0] * D]), surrogate.train_Y.max()
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    for q, acquisition in (
        (1, LogExpectedImprovement(surrogate, best)),
        (2, qLogExpectedImprovement(surrogate, best, sampler)),
    ):
        random = torch.rand(20, q, D, generator=torch.Generator().manual_seed(2))
        found, value = optimize_acqf(
            acquisition, bounds, q=q, num_restarts=2, raw_samples=8, options={"maxiter": 10}
        )
        assert found.shape == (q, D)
        assert value > acquisition(random).mean()
    more = surrogate.condition_on_observations(found, surrogate.train_Y[:2])
    assert more.bnn.n_data == N_TRAIN + 2


# ------------------------------------------------------------------ metrics


@pytest.fixture(scope="module")
def classifier():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return direct("classification", network(), data_of("classification"), temperature=10.0)


def test_torchmetrics_takes_predictions_and_tunes(classifier):
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    x, y = data_of("classification", N_TEST, 5)
    p = classifier(x)
    accuracy, error = MulticlassAccuracy(C, average="micro"), MulticlassCalibrationError(C, n_bins=5)
    for part in range(0, N_TEST, 7):
        for metric in (accuracy, error):
            metric.update(classifier(x[part : part + 7]), y[part : part + 7])
    assert accuracy.compute().item() == pytest.approx((p.argmax(1) == y).double().mean().item())
    assert error.compute().item() == pytest.approx(MulticlassCalibrationError(C, n_bins=5)(p, y).item())
    la = direct("classification", network(), data_of("classification"))
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y), loss=error, grid_size=5)
    error.reset()
    error.update(la(x), y)
    assert (
        error.compute()
        <= MulticlassCalibrationError(C, n_bins=5)(
            direct("classification", network(), data_of("classification"))(x), y
        )
        + 1e-6
    )


def test_pytorch_ood_scores_novelty(classifier):
    from pytorch_ood.metrics import AUROC, OODMetrics
    from sklearn.metrics import roc_auc_score

    known, unknown = inputs(N_TEST, 5, F32), 4 * inputs(N_TEST, 6, F32) + 3
    auroc, metrics, scores = AUROC(), OODMetrics(), []
    for x, label in ((known, 1), (unknown, -1)):
        scores.append(classifier.novelty(x))
        for metric in (auroc, metrics):
            metric.update(scores[-1], torch.full((len(x),), label))
    labels = np.repeat([0, 1], N_TEST)
    expected = roc_auc_score(labels, torch.cat(scores).numpy())
    assert expected > 0.5
    assert auroc.compute()["AUROC"] == pytest.approx(expected)
    assert metrics.compute()["AUROC"] == pytest.approx(expected)


def test_scikit_learn_draws_calibration_curves(classifier):
    import matplotlib as mpl
    from sklearn.calibration import CalibrationDisplay, calibration_curve
    from sklearn.metrics import brier_score_loss, log_loss

    mpl.use("agg")
    x, y = data_of("classification", N_TEST, 5)
    p = classifier(x)
    positive = (y == 1).numpy()
    share, predicted = calibration_curve(positive, p[:, 1], n_bins=3, strategy="quantile")
    order = p[:, 1].argsort()
    assert predicted[0] <= p[order, 1].mean().item() <= predicted[-1]
    assert ((share >= 0) & (share <= 1)).all()
    shown = CalibrationDisplay.from_predictions(positive, p[:, 1], n_bins=3, strategy="quantile")
    np.testing.assert_array_equal(shown.prob_true, share)
    assert log_loss(y, p.double()) == pytest.approx(nn.functional.nll_loss(p.log(), y).item(), rel=1e-4)
    squares = (p[:, 1].double() - torch.tensor(positive).double()).square().mean().item()
    assert brier_score_loss(positive, p[:, 1]) == pytest.approx(squares, rel=1e-5)
