"""Corrupted images are in range, drawn by seed and further away the worse; mixtures count what they should."""

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

from benchmarks.studies.shift import corruptions, run, summary

KINDS = ("rotation", "blur", "Gaussian noise", "JPEG", "contrast", "brightness")
SEVERITIES = (1, 2, 3, 4, 5)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def pixels(request):
    """Seven digits of 29 rows and 31 columns; coloured ones on a light ground."""
    digits = torch.tensor(load_digits().images[:7], dtype=torch.float32)[:, None] / 16
    grey = interpolate(digits, (29, 31), mode="bilinear").clamp(0, 1)
    return grey if request.param == 1 else torch.cat([grey, 1 - grey, 0.2 + 0.5 * grey], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_worse_is_further_away_and_in_range(pixels, kind):
    before, distances = pixels.clone(), []
    for severity in SEVERITIES:
        found, again, other = (corruptions.corrupted(pixels, kind, severity, seed) for seed in (0, 0, 1))
        assert (found.shape, found.dtype) == (pixels.shape, pixels.dtype)
        assert 0 <= found.min() <= found.max() <= 1
        assert torch.equal(found, again)
        assert torch.equal(found, other) == (kind not in ("rotation", "Gaussian noise"))
        distances.append(float((found - pixels).norm()))
    assert torch.equal(pixels, before)
    assert distances[0] > 0
    assert distances == sorted(set(distances))


def test_a_quarter_turn_moves_pixels_to_where_they_belong():
    x = torch.rand(7, 3, 11, 11, generator=torch.Generator().manual_seed(0))
    found = corruptions.rotation(x, 90, torch.Generator().manual_seed(0))
    turns = [torch.rot90(x, k, (-2, -1)) for k in (1, -1)]
    off, sides = torch.stack([(turn - found).abs().amax((1, 2, 3)) for turn in turns]).min(0)
    assert off.max() < 1e-5
    assert set(sides.tolist()) == {0, 1}


def test_contrast_and_brightness_by_hand():
    x = torch.tensor([0.2, 0.6]).reshape(1, 1, 1, 2)
    for kind, severity, expected in (("contrast", 3, [0.27, 0.53]), ("brightness", 2, [0.28, 0.68])):
        found = corruptions.corrupted(x, kind, severity, seed=0)
        torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_pixels_are_found_again_and_the_sets_of_a_case():
    """Every kind at every severity and the other data sets, but not the noise of the study of quality."""
    settings = run.SHIFTS["cifar10-jpeg"]
    x = torch.rand(5, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run.unscaled(run.normaliser(settings.mean, settings.std)(x), settings), x)
    x, y = torch.zeros(3, 1, 7, 5), torch.tensor([0, 1, 2])
    data = run.Data((x, y), (x, y), (x, y), {"MNIST": x, "uniform noise": x, "Gaussian noise": x})
    found = run.shifted(data, run.SHIFTS["fashion-cnn"], seed=0, svhn=None).ood
    names = [f"{kind}, severity {severity}" for kind in KINDS for severity in SEVERITIES]
    assert list(found) == ["MNIST", *names]
    assert all(of.shape == x.shape for of in found.values())


def test_accuracy_by_confidence_by_hand():
    """Two test images, one of them right, and one of another kind, which is never right."""
    p = torch.tensor([[0.92, 0.08], [0.63, 0.37]])
    outside = torch.tensor([[0.22, 0.78]])
    found = run.by_confidence(p, torch.tensor([0, 1]), outside)
    at = dict(zip(found["confidence"], zip(found["kept"], found["accuracy"])))
    assert at[0.0] == pytest.approx((1, 1 / 3))
    assert at[0.65] == pytest.approx((2 / 3, 1 / 2))
    assert at[0.9] == pytest.approx((1 / 3, 1))
    assert at[0.95] == (0, None)


def test_the_calibration_error_of_calibrated_probabilities_is_less_with_more_images():
    p = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert run.ece_of_calibrated(torch.eye(5)) == 0
    assert 0 < 2 * run.ece_of_calibrated(p) < run.ece_of_calibrated(p[:100])


def test_seeds_are_pooled():
    """Two seeds, two kinds at two severities: means, differences to temperature scaling, and one curve."""

    def row(nll, kept, accuracy):
        scores = [[{"nll": nll + kind + severity} for severity in (1, 2)] for kind in (0, 10)]
        mixed = {"MNIST": {"confidence": [0.5, 0.9], "kept": [kept, 0], "accuracy": [accuracy, None]}}
        return {"clean": {"nll": nll}, "corrupted": dict(zip("ab", scores)), "mixed": mixed}

    first = {"MAP": row(3, 0.2, 0.5), "temperature scaling": row(1, 1, 1)}
    second = {"MAP": row(5, 0.6, 0.25), "temperature scaling": row(2, 1, 1)}
    levels = {key: {"levels": [1, 2]} for key in "ab"}
    found = {"seeds": [{"methods": first}, {"methods": second}], "levels": levels}
    assert summary.means(found, "MAP", "nll") == [4, 10, 11]
    assert summary.per_kind(found, "MAP", "nll") == [[4], [5, 15], [6, 16]]
    assert summary.gaps(found, "MAP") == [(2.5, 0.5)] * 3
    assert summary.gaps_of_kind(found, "MAP", "b") == (2.5, 0.5)
    assert summary.gap_over_all(found, "MAP") == (2.5, 0.5)
    assert summary.lower(found, "MAP", "nll") == (0, 4)
    assert summary.severities(found) == ["clean", "severity 1", "severity 2"]
    confidence, accuracy, kept = summary.curve(found, "MAP", "MNIST")
    assert confidence == [0.5, 0.9]
    assert accuracy == [pytest.approx((0.2 * 0.5 + 0.6 * 0.25) / 0.8), None]
    assert kept == pytest.approx([0.4, 0])


@pytest.mark.parametrize(("shape", "file"), [((3, 32, 32), True), ((1, 28, 28), False)])
def test_svhn_is_read_as_torchvision_has_it(monkeypatch, tmp_path, shape, file):
    from torchvision.datasets import SVHN

    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": x, "y": np.arange(1, 6)[:, None]})
    path = tmp_path / "test_32x32.mat" if file else tmp_path
    with pytest.raises(SystemExit, match="Pass --svhn ROOT"):  # a made-up file fails the check sum
        run.svhn_images(path, shape)
    monkeypatch.setitem(SVHN.split_list, "test", ["", "test_32x32.mat", None])
    found = run.svhn_images(path, shape)
    assert found.shape == (5, *shape)
    assert 0 <= found.min() < found.max() <= 1
    if shape[0] == 3:
        torch.testing.assert_close(found[4, 1], torch.from_numpy(x[:, :, 1, 4]) / 255)
    images, y = torch.zeros(3, *shape), torch.tensor([0, 1, 2])
    data = run.Data((images, y), (images, y), (images, y), {})
    case = "fashion-cnn" if shape[0] == 1 else "cifar10-jpeg"
    assert run.shifted(data, run.SHIFTS[case], seed=0, svhn=path).ood["SVHN"].shape == images.shape
