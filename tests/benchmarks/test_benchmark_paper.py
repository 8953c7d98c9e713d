"""The study of the paper's settings on made-up data: it runs from end to end, stops where ``fit`` does, trusts no file."""

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="the study reads its data with torchvision")
Image = pytest.importorskip("PIL.Image", reason="the study reads its data with pillow")

from benchmarks.report import with_tables  # noqa: E402
from benchmarks.studies.paper import data, networks, options, report, run  # noqa: E402

N_TEST, SUBSAMPLE = 60, 40


def built(download):
    """Return a tiny network for 32 x 32 images."""
    assert not download
    torch.manual_seed(0)
    features = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4), nn.Tanh())
    return nn.Sequential(features, nn.Linear(4, 10))


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """CIFAR-10's python version with random pixels; its checksums cannot match."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        n = N_TEST if name == "test_batch" else 30
        pixels = rng.integers(256, size=(n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [*range(10)] * (n // 10)}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    return folder.parent


@pytest.fixture
def jpeg_folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "jpeg").mkdir()
    for part, n in (("train10k", 120), ("test", N_TEST)):
        files = [io.BytesIO() for _ in range(n)]
        for file in files:
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
        offset = np.cumsum([0, *(len(file.getvalue()) for file in files)])
        jpeg = np.frombuffer(b"".join(file.getvalue() for file in files), np.uint8)
        label = np.arange(n) % 10
        np.savez(tmp_path / "jpeg" / f"cifar10_jpeg_{part}.npz", jpeg=jpeg, offset=offset, label=label)
    return tmp_path / "jpeg"


@pytest.fixture
def use_tiny(monkeypatch):
    """Let a kind of data have one tiny network, with weights in a file."""

    def use(kind, path):
        own = replace(networks.CIFAR["resnet20"], build=built)
        smaller = replace(options.KINDS[kind], networks={"resnet20": own}, workers=0)
        monkeypatch.setitem(options.KINDS, kind, smaller)
        torch.save(built(False).state_dict(), path)
        return path

    return use


def found_by(out, *arguments):
    common = ["--threads", str(torch.get_num_threads()), "--subsample", str(SUBSAMPLE), "--out", str(out)]
    run.main([*map(str, arguments), *common])
    found = json.loads(out.read_text())
    tuned_on = found["seeds"][0]["tuned_on"]
    assert set(tuned_on) == {run.HELD_OUT, run.TEST}
    for part in tuned_on.values():
        assert set(part["methods"]) == {*run.SIMPLE, run.STOPPED, *run.SEARCHES}
        assert all(0 < row["nll"] < 100 and 0 <= row["accuracy"] <= 1 for row in part["methods"].values())
        stopped = part["methods"][run.STOPPED]
        assert stopped["n_curvature"] in stopped["history"]["processed_examples"]
        assert stopped["validation_nll"] == min(stopped["history"]["val_nll"])
    assert [tuned_on[on]["test"] for on in (run.HELD_OUT, run.TEST)] == [SUBSAMPLE, SUBSAMPLE // 2]
    return found


def test_cifar10_end_to_end(use_tiny, cifar_root, tmp_path):
    weights = use_tiny("cifar_root", tmp_path / "resnet20.pt")
    arguments = ("--cifar-root", cifar_root, "--weights", weights, "--batch-size", 7)
    found = found_by(tmp_path / "found.json", *arguments)
    assert (found["environment"]["images"], found["n_total"]) == ("CIFAR-10", 150)
    of_t = found["seeds"][0]["tuned_on"][run.TEST]["methods"]["ELLA (T)"]
    assert of_t["parameters"]["prior_precision"] == networks.CIFAR["resnet20"].prior_precision


def test_jpeg_end_to_end_and_on_the_page(use_tiny, jpeg_folder, tmp_path):
    """Weights lie beside the images; the tables take what was found, and say what was not run."""
    use_tiny("data", jpeg_folder / "cifar10_resnet20.pt")
    found = found_by(tmp_path / "found.json", "--data", jpeg_folder, "--seeds", 2, "--batch-size", 10)
    runs = {report.JPEG: found, "cifar10_resnet32": found}
    tables = {name: write(runs) for name, write in report.TABLES.items()}
    assert "±" in tables["jpeg test"]
    assert tables["cifar10"].count(report.NOT_RUN) == 3 * len(report.OURS)
    assert tables["imagenet"].count(report.NOT_RUN) == 4 * len(report.OURS)
    assert "cifar10_resnet32" in tables["fair"]
    assert "**" in tables["jpeg stopping"]
    assert with_tables(report.PAGE.read_text(), {}, report.TABLES, "studies/paper/report.py")


def test_random_crops_are_the_same_at_every_pass():
    _, cropped = networks.crops(0.5)(nn.Identity())
    pixels = np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    held_out = data.Transformed(data.Pictures(pixels, range(5)), cropped, torch.tensor([3, 1]))
    before = torch.get_rng_state()
    first, second = [held_out[i] for i in (0, 1)], [held_out[i] for i in (0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert [label for _, label in first] == [3, 1]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second))
    assert not torch.equal(first[0][0], data.Transformed(held_out.base, cropped, torch.tensor([2]))[0][0])


def test_early_stopping_is_that_of_fit():
    """Without another pass, the same n and the same setting as ``fit(val_loader=...)``."""
    from laplace_ella import Laplace

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 5, generator=generator), torch.randint(3, (90,), generator=generator)
    batches, val = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 60, 10)], [(x[60:], y[60:])]
    torch.manual_seed(0)
    model = nn.Linear(5, 3).eval()
    sizes = {"subsample_size": 30, "n_eigenvalues": 5, "curvature_size": 50, "prior_precision": 25.0}
    fits = [Laplace(model, "classification", "all", "ella", **sizes) for _ in range(2)]
    fits[0].fit(batches, val_loader=val, val_steps=1, link_approx="mc", n_total=600)
    fits[1].fit(batches, val_steps=1, n_total=600)
    found = run.stopped(fits[1], val)
    assert found["n_curvature"] == fits[0].n_curvature
    assert found["history"]["processed_examples"] == fits[0].fit_history_["processed_examples"]
    assert found["history"]["val_nll"] == pytest.approx(fits[0].fit_history_["val_nll"], rel=1e-5)
    assert fits[0].temperature == fits[1].temperature
    torch.testing.assert_close(fits[0].posterior_precision, fits[1].posterior_precision)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit):
        run.main([*map(str, arguments)])
    return " ".join(capsys.readouterr().err.split())


WRONG = {
    "nowhere": "--cifar-root nowhere: no such folder",
    ". --network vgg": "Choose resnet20, resnet32, resnet44, resnet56, or all",
    ". --network all --out x": "--out names the file of one network",
    ".": "it holds nothing",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_said_before_any_work(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert WRONG[arguments] in refusal(capsys, "--cifar-root", *arguments.split())


class Evil:
    """What runs when unpickled; ``weights_only=True`` refuses it."""

    def __reduce__(self):
        return pytest.fail, ("a file of weights ran code",)


def test_weights_run_no_code_and_are_not_downloaded_unasked(capsys, cifar_root, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: asked.append(kwargs))
    arguments = ["--cifar-root", cifar_root, "--subsample", SUBSAMPLE]
    assert "--download" in refusal(capsys, *arguments)
    torch.save(Evil(), tmp_path / "code.pt")
    assert "cannot be read" in refusal(capsys, *arguments, "--weights", tmp_path / "code.pt")
    assert not asked
