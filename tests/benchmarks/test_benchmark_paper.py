"""``benchmarks/paper.py`` on made-up data in the layouts of the original: CIFAR-10's batches, ImageNet's folders."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="paper.py reads its data with torchvision")
Image = pytest.importorskip("PIL.Image", reason="paper.py reads its data with pillow")

ROOT = Path(__file__).parents[2]
CLASSES = ("n01", "n02", "n03")
N_TEST, SUBSAMPLE = 60, 40


@pytest.fixture
def modules(monkeypatch):
    """Modules of benchmarks/ by their names."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module


@pytest.fixture
def paper(modules):
    return modules("paper")


def built(n_outputs: int):
    """Return what builds a tiny network for 32 x 32 images."""

    def build(download: bool) -> nn.Module:
        assert not download
        torch.manual_seed(0)
        features = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4), nn.Tanh())
        return nn.Sequential(features, nn.Linear(4, n_outputs))

    return build


@pytest.fixture
def cifar_root(tmp_path, monkeypatch) -> Path:
    """CIFAR-10's python version with random pixels; its checksums cannot match."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        n = N_TEST if name == "test_batch" else 30
        batch = {
            "data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
            "labels": [*range(10)] * (n // 10),
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    return folder.parent


@pytest.fixture
def imagenet_root(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("val", 20)):
        for name in CLASSES:
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(256, size=(16, 20, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "imagenet"


@pytest.fixture
def jpeg_folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "jpeg").mkdir()
    for part, n in (("train10k", 120), ("test", N_TEST)):
        files = []
        for _ in range(n):
            files.append(io.BytesIO())
            pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(files[-1], "JPEG")
        offset = np.cumsum([0, *(len(file.getvalue()) for file in files)])
        jpeg = np.frombuffer(b"".join(file.getvalue() for file in files), np.uint8)
        label = np.arange(n) % 10
        np.savez(tmp_path / "jpeg" / f"cifar10_jpeg_{part}.npz", jpeg=jpeg, offset=offset, label=label)
    return tmp_path / "jpeg"


@pytest.fixture
def use_tiny(modules, monkeypatch):
    """Let a kind of data have one tiny network, with weights in a file."""
    networks, options = modules("paper_networks"), modules("paper_options")

    def use(kind: str, name: str, n_outputs: int, path: Path, **changes) -> Path:
        published = {**networks.CIFAR, **networks.IMAGENET}[name]
        own = replace(published, build=built(n_outputs), n_outputs=n_outputs, **changes)
        smaller = replace(options.KINDS[kind], networks={name: own}, workers=0)
        monkeypatch.setitem(options.KINDS, kind, smaller)
        torch.save(own.build(False).state_dict(), path)
        return path

    return use


def run(paper, capsys, *arguments: str | Path, n_seeds: int = 1) -> dict:
    out = Path(arguments[-1])
    threads = str(torch.get_num_threads())
    paper.main(["--threads", threads, *map(str, arguments[:-1]), "--out", str(out)])
    assert "ELLA (T, s)" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [seed["seed"] for seed in found["seeds"]] == list(range(n_seeds))
    return found


def check(found: dict, paper, n_tuned_on: int) -> None:
    seed = found["seeds"][0]
    assert set(seed["tuned_on"]) == {paper.HELD_OUT, paper.TEST}
    for on, part in seed["tuned_on"].items():
        rows = part["methods"]
        assert set(rows) == {*paper.SIMPLE, paper.STOPPED, *paper.SEARCHES}
        assert all(0 < row["nll"] < 100 and 0 <= row["accuracy"] <= 1 for row in rows.values())
        assert part["validation"] == (SUBSAMPLE if on == paper.HELD_OUT else n_tuned_on)
        stopped = rows[paper.STOPPED]
        assert stopped["n_curvature"] in stopped["history"]["processed_examples"]
        assert stopped["validation_nll"] == min(stopped["history"]["val_nll"])
    held_out, of_test = (seed["tuned_on"][on] for on in (paper.HELD_OUT, paper.TEST))
    assert (held_out["test"], of_test["test"]) == (SUBSAMPLE, SUBSAMPLE - n_tuned_on)


def test_cifar10_end_to_end(paper, use_tiny, cifar_root, tmp_path, capsys):
    weights = use_tiny("cifar_root", "resnet44", 10, tmp_path / "resnet44.pt")
    options = [
        "--cifar-root",
        cifar_root,
        "--weights",
        weights,
        "--subsample",
        SUBSAMPLE,
        "--batch-size",
        "7",
    ]
    found = run(paper, capsys, *options, tmp_path / "found.json")
    check(found, paper, SUBSAMPLE // 2)
    assert found["environment"]["images"] == "CIFAR-10"
    assert found["n_total"] == 150
    of_t = found["seeds"][0]["tuned_on"][paper.TEST]["methods"]["ELLA (T)"]
    assert of_t["parameters"]["prior_precision"] == 25


def test_jpeg_end_to_end_and_on_the_page(modules, paper, use_tiny, jpeg_folder, tmp_path, capsys):
    """Weights lie beside the images; the tables take what was found, and say what was not run."""
    use_tiny("data", "resnet20", 10, jpeg_folder / "cifar10_resnet20.pt")
    (tmp_path / "results").mkdir()
    options = ["--data", jpeg_folder, "--subsample", SUBSAMPLE, "--seeds", "2", "--batch-size", "10"]
    found = run(paper, capsys, *options, tmp_path / "results" / "paper_cifar10-jpeg.json", n_seeds=2)
    check(found, paper, SUBSAMPLE // 2)
    assert found["n_total"] == 50_000
    (tmp_path / "results" / "paper_cifar10_resnet32.json").write_text(json.dumps(found))
    report = modules("paper_report")
    runs = report.read(tmp_path / "results")
    tables = {name: write(runs) for name, write in report.TABLES.items()}
    assert "±" in tables["jpeg test"]
    assert tables["cifar10"].count(report.NOT_RUN) == 3 * len(report.OURS)
    assert tables["imagenet"].count(report.NOT_RUN) == 4 * len(report.OURS)
    assert "cifar10_resnet32" in tables["fair"]
    assert "**" in tables["jpeg stopping"]
    assert report.with_tables(report.PAGE.read_text(), {}, report.TABLES, "paper_report.py")


def test_imagenet_end_to_end(modules, paper, use_tiny, imagenet_root, tmp_path, capsys):
    pytest.importorskip("timm", reason="ImageNet's networks and transforms are timm's")
    transforms = modules("paper_networks").crops(0.5)
    folder = tmp_path / "weights"
    folder.mkdir()
    use_tiny("imagenet_root", "resnet18", 3, folder / "my_resnet18.pth", transforms=resized(transforms))
    options = ["--imagenet-root", imagenet_root, "--weights", folder, "--subsample", SUBSAMPLE]
    found = run(paper, capsys, *options, tmp_path / "found.json")
    check(found, paper, SUBSAMPLE // 2)
    assert found["ella"]["prior_precision"] == 100


def resized(transforms):
    def both(model):
        from torchvision.transforms import Compose, Resize

        return tuple(Compose([Resize((32, 32)), transform]) for transform in transforms(model))

    return both


def test_transforms_of_timm_are_the_models_own(modules):
    timm = pytest.importorskip("timm", reason="ImageNet's networks and transforms are timm's")
    networks = modules("paper_networks")
    model = timm.create_model(networks.TIMM["resnet18"], pretrained=False)
    plain, cropped = networks.timm_transforms(model)
    picture = Image.fromarray(np.full((300, 400, 3), 255, np.uint8))
    expected = torch.tensor([(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    torch.testing.assert_close(plain(picture), expected[:, None, None].expand(3, 224, 224))
    assert cropped(picture).shape == (3, 224, 224)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "vit_base_patch16_224"])
def test_timm_knows_the_names(modules, name):
    timm = pytest.importorskip("timm", reason="ImageNet's networks and transforms are timm's")
    assert timm.get_pretrained_cfg(modules("paper_networks").TIMM[name]) is not None


def test_random_crops_are_the_same_at_every_pass(modules):
    data = modules("paper_data")
    _, cropped = modules("paper_networks").crops(0.5)(nn.Identity())
    pixels = np.random.default_rng(0).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    held_out = data.Transformed(data.Pictures(pixels, range(5)), cropped, torch.tensor([3, 1]))
    before = torch.get_rng_state()
    first, second = [held_out[i] for i in (0, 1)], [held_out[i] for i in (0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert [label for _, label in first] == [3, 1]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second))
    assert not torch.equal(first[0][0], data.Transformed(held_out.base, cropped, torch.tensor([2]))[0][0])


def test_early_stopping_is_that_of_fit(paper):
    """Without another pass, the same n and the same setting as ``fit(val_loader=...)``."""
    from laplace_ella import Laplace

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 5, generator=generator), torch.randint(3, (90,), generator=generator)
    train, val = ([(x[part], y[part])] for part in (slice(60), slice(60, 90)))
    torch.manual_seed(0)
    model = nn.Linear(5, 3).eval()
    options = {"subsample_size": 30, "n_eigenvalues": 5, "curvature_size": 50, "prior_precision": 25.0}
    fits = [Laplace(model, "classification", "all", "ella", **options) for _ in range(2)]
    batches = [(a[i : i + 10], b[i : i + 10]) for a, b in train for i in range(0, 60, 10)]
    fits[0].fit(batches, val_loader=val, val_steps=1, link_approx="mc", n_total=600)
    fits[1].fit(batches, val_steps=1, n_total=600)
    paper.stopped(fits[1], val)
    assert fits[0].n_curvature == fits[1].n_curvature
    assert fits[0].fit_history_ == fits[1].fit_history_
    assert fits[0].temperature == fits[1].temperature
    torch.testing.assert_close(fits[0].posterior_precision, fits[1].posterior_precision)


def refusal(paper, capsys, *arguments: str | Path) -> str:
    with pytest.raises(SystemExit):
        paper.parse([str(argument) for argument in arguments], "")
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--cifar-root --imagenet-root --data"),
        (["--cifar-root", "a", "--data", "b"], "not allowed with"),
        (["--cifar-root", "nowhere"], "nowhere: no such folder. Pass the folder that holds the data"),
        (["--imagenet-root", "nowhere"], "nowhere: no such folder"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--cifar-root", ".", "--network", "vgg"], "Choose resnet20, resnet32, resnet44, resnet56, or all"),
        (["--data", ".", "--network", "resnet56"], "does not go with --data"),
        (["--cifar-root", ".", "--network", "all", "--out", "x"], "--out names the file of one network"),
        (["--cifar-root", ".", "--subsample", "5"], "at least 40; got 5"),
        (["--cifar-root", ".", "--seeds", "0"], "at least 1; got '0'"),
        (["--cifar-root", ".", "--batch-size", "ten"], "whole number of at least 1; got 'ten'"),
        (["--cifar-root", ".", "--device", "meta"], "must be cpu or cuda; got meta"),
    ],
)
def test_options_that_do_not_go_together(paper, capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    text = refusal(paper, capsys, *arguments)
    assert all(word in text for word in words.split(" --"))


def test_wrong_layouts(paper, capsys, tmp_path, cifar_root, monkeypatch):
    pytest.importorskip("timm", reason="ImageNet's networks and transforms are timm's")
    (tmp_path / "other").mkdir()
    assert "it holds nothing" in refusal(paper, capsys, "--cifar-root", tmp_path / "other")
    inner = cifar_root / "cifar-10-batches-py"
    assert "Pass its parent" in refusal(paper, capsys, "--cifar-root", inner)
    assert "folders train and val" in refusal(paper, capsys, "--imagenet-root", tmp_path / "other")
    assert "cifar10_jpeg_train10k.npz" in refusal(paper, capsys, "--data", tmp_path / "other")
    for name in ("train", "val"):
        (tmp_path / "other" / name).mkdir()
    assert "a folder of images for each class" in refusal(
        paper, capsys, "--imagenet-root", tmp_path / "other"
    )
    monkeypatch.undo()
    (inner / "test_batch").unlink()
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    assert "incomplete or damaged" in refusal(paper, capsys, "--cifar-root", cifar_root)


def test_classes_and_counts(paper, capsys, imagenet_root, cifar_root):
    pytest.importorskip("timm", reason="ImageNet's networks and transforms are timm's")
    text = refusal(paper, capsys, "--imagenet-root", imagenet_root)
    assert "1000 classes apart" in text
    assert "3 class folders in train and 3 in val, 3 with the same name" in text
    text = refusal(paper, capsys, "--cifar-root", cifar_root)
    assert "50000 training images are needed, and CIFAR-10 has 150 here" in text
    assert "--subsample 75" in text


def test_weights(modules, paper, capsys, cifar_root, tmp_path):
    options = ["--cifar-root", cifar_root, "--subsample", SUBSAMPLE]
    file = "cifar10_resnet20-4118986f.pt"
    text = refusal(paper, capsys, *options)
    assert file in text
    assert "--weights FILE" in text
    assert "--download" in text
    assert "no such file" in refusal(paper, capsys, *options, "--weights", tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    assert "found: none" in refusal(paper, capsys, *options, "--weights", tmp_path / "empty")
    text = refusal(paper, capsys, *options, "--weights", tmp_path / "empty", "--download")
    assert "exclude each other" in text
    torch.save(modules("problems").PROBLEMS["resnet32"].build(10).state_dict(), tmp_path / "other.pt")
    text = refusal(paper, capsys, *options, "--weights", tmp_path / "other.pt")
    assert "cannot be read as the weights of resnet20" in text
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Evil()))
    assert "cannot be read" in refusal(paper, capsys, *options, "--weights", tmp_path / "code.pt")
    torch.save(Evil(), tmp_path / "code.pt")
    assert "cannot be read" in refusal(paper, capsys, *options, "--weights", tmp_path / "code.pt")


class Evil:
    """What runs when unpickled; ``weights_only=True`` refuses it."""

    def __reduce__(self):
        return pytest.fail, ("a file of weights ran code",)


def test_downloads_are_asked_for(modules, monkeypatch):
    """With --download, and only then, weights come from the URL of their authors."""
    networks = modules("paper_networks")
    asked = []

    def fetch(url, map_location, weights_only):
        asked.append((url, weights_only))
        return modules("problems").PROBLEMS["resnet20"].build(10).state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    network = networks.CIFAR["resnet20"]
    networks.loaded(network, networks.weights_file(network, None, True))
    assert asked == [(network.source, True)]


def test_missing_packages(modules):
    with pytest.raises(ValueError, match="pip install no_such_package"):
        modules("paper_networks").require("torch", "no_such_package")
