"""What is compared: all methods with the choice among them, numbers of directions, and ways to T without validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.ablations import quality
from benchmarks.studies.ablations.features import curvature
from benchmarks.studies.choice.features import BATCH, Features, Seen, estimator
from benchmarks.studies.common import scores
from benchmarks.studies.common.baselines import N_SAMPLES

Found = dict[str, Any]
# Class probabilities of each set of images by its name.
Probabilities = dict[str, Tensor]
USUAL_RANK = 20
RANKS = (USUAL_RANK, 50, 100, 200)
# On wider grids than those of the ablations: a network with hardly an error needs hardly any variance.
WIDE = {"temperature": [10.0**e for e in range(-6, 7)], "logit_scale": [0.5, 0.71, 1.0, 1.41, 2.0]}
TUNED = {"T": {"temperature": WIDE["temperature"]}, "T, s": WIDE}
VARIANCES = {"constant variance": "constant", "last-layer variance": "last_layer"}
WITHOUT_VARIANCE = ("MAP", "temperature scaling", "vector scaling")
PREDICTED = ("temperature", "logit_scale", "class_scales", "class_biases")


def others(features: Features) -> dict[str, Seen]:
    """Return the test images, and those of other sets."""
    return {name: seen for name, seen in features.sets.items() if name not in ("curvature", "validation")}


@torch.no_grad()
def predicted(la: Any, seen: Seen) -> Tensor:
    """Return class probabilities (N, C) with the setting that the estimator has."""
    # The features of the directions in use are all that a call of the model needs.
    packed = seen.packed.split(BATCH)
    return torch.cat([la(part, link_approx="mc", n_samples=N_SAMPLES) for part in packed])


def with_method(la: Any, name: str, setting: Any) -> Any:
    """Give an estimator a method that a search has tuned, by its name there."""
    la.variance = "none" if name in WITHOUT_VARIANCE else VARIANCES.get(name, "ella")
    for parameter in PREDICTED:
        setattr(la, parameter, getattr(setting, parameter))
    return la


def of_methods(la: Any, result: Any, features: Features) -> dict[str, Probabilities]:
    """Return the probabilities of each method of a search."""
    found = {}
    for name, method in result.baselines.items():
        with_method(la, name, method.setting)
        found[name] = {of: predicted(la, seen) for of, seen in others(features).items()}
    return found


def leading(features: Features, rank: int) -> Features:
    """Return the features along the leading directions."""
    sets = {
        name: Seen(seen.f, seen.z, seen.phi[..., :rank], seen.y, seen.trace)
        for name, seen in features.sets.items()
    }
    return Features(sets, features.n_train, *list(vars(features).values())[2:])


def chosen(features: Features, seed: int, of: Seen, training: Seen) -> tuple[Any, Any]:
    """Return an estimator that chose a method on some images, and the result."""
    la = estimator(training, features.n_train, of.phi.shape[-1], seed)
    return la, la.optimize_hyperparameters(of.loader(), "auto", n_samples=N_SAMPLES)


def choice(features: Features, seed: int) -> tuple[Found, dict[str, Probabilities]]:
    """Score all methods, tuned on the validation images, and the one that is chosen; and return their probabilities."""
    features = leading(features, USUAL_RANK)
    la, result = chosen(features, seed, features.sets["validation"], features.sets["curvature"])
    found = of_methods(la, result, features)
    rows = scored({**found, "auto": found[result.chosen]}, features)
    best = min(found, key=lambda name: rows[name]["nll"])
    y = features.sets["test"].y
    for name, row in rows.items():
        p = (found[result.chosen] if name == "auto" else found[name])["test"]
        row["minus"] = {
            of: scores.difference(p, found[which]["test"], y)
            for of, which in {
                "best": best,
                "MAP": "MAP",
                "temperature scaling": "temperature scaling",
            }.items()
        }
    held_out = {
        name: {"score": one.score, "difference": one.difference, "standard_error": one.standard_error}
        for name, one in result.held_out.items()
    }
    about = {"chosen": result.chosen, "best": best, "reason": result.reason, "held_out": held_out}
    return {**about, "methods": rows}, found


def scored(found: dict[str, Probabilities], features: Features) -> dict[str, Found]:
    """Return the scores of each method."""
    y = features.sets["test"].y
    return {name: scores.of_probabilities(p["test"], y, _without_test(p)) for name, p in found.items()}


def _without_test(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in found.items() if name != "test"}


def ranks_of(features: Features) -> list[int]:
    """Return the numbers of directions that there are features of."""
    most = len(features.retained)
    return [k for k in RANKS if k <= most]


def ranks(features: Features) -> list[Found]:
    """Tune T, and T and s, for each number of directions, and score probabilities and novelty."""
    rows, of_usual = [], dict[str, Tensor]()
    for rank in ranks_of(features):
        sets = {name: quality.Seen(s.phi[..., :rank], s.f, s.y) for name, s in features.sets.items()}
        of_curvature, validation = sets.pop("curvature"), sets.pop("validation")
        G = curvature(of_curvature.phi, of_curvature.f) * (features.n_train / len(of_curvature.y))
        posterior = quality.Posterior.of(G)
        row: Found = {"K": rank, "retained": float(features.retained[rank - 1]), "methods": {}}
        for name, grids in TUNED.items():
            best = quality.tuned(posterior, validation, grids)
            p = {of: posterior.predictor(seen)(best) for of, seen in sets.items()}
            of_usual.setdefault(name, p["test"])  # the first rank is the usual one
            row["methods"][name] = {
                **scored({name: p}, features)[name],
                "temperature": best.temperature,
                "logit_scale": best.logit_scale,
                "minus": scores.difference(p["test"], of_usual[name], sets["test"].y),
            }
        row["novelty"] = novelty({**p, "validation": posterior.predictor(validation)(best)}, features, rank)
        rows.append(row)
    return rows


def novelty(p: Probabilities, features: Features, rank: int) -> Found:
    """Return how well novelty tells other images from test images, with what is usual among the validation images."""
    pairs = {
        name: torch.stack([scores.entropy(values), features.sets[name].share(rank)], 1)
        for name, values in p.items()
    }
    usual = pairs.pop("validation").mT.sort(1).values
    found = {}
    for name, pair in pairs.items():
        below = torch.searchsorted(usual, pair.mT.contiguous(), right=True)
        normal = torch.special.ndtri((below.double() + 0.5) / (usual.shape[1] + 1))
        found[name] = normal[0] + normal[1] / 2  # as novelty() has it
    inside = found.pop("test")
    return {name: scores.auroc(inside, outside) for name, outside in found.items()}


def defaults(features: Features, seed: int, usual: dict[str, Probabilities]) -> dict[str, Found]:
    """Score ways to T that see no validation data, and compare them with MAP, and with tuning on validation data."""
    y = features.sets["test"].y
    found = dict(without_validation(leading(features, USUAL_RANK), seed))
    of_validation = {
        f"validation data: {name}": usual[name]["test"]
        for name in ("temperature scaling", "ELLA (T)", "ELLA (T, s)")
    }
    return {
        name: {
            "nll": float(scores.nll(p, y).mean()),
            "ece": scores.calibration_error(p, y),
            "minus": scores.difference(p, usual["MAP"]["test"], y),
        }
        for name, p in {"MAP": usual["MAP"]["test"], **found, **of_validation}.items()
    }


def without_validation(features: Features, seed: int) -> Iterable[tuple[str, Tensor]]:
    """Yield the probabilities of the test images by each way, with its name."""
    training, test = features.sets["curvature"], features.sets["test"]
    la = estimator(training, features.n_train, USUAL_RANK, seed)
    yield "T = 1", predicted(la, test)
    # The model of features has its weights at 0: a prior mean as far away has the same evidence.
    la.prior_mean = math.sqrt(features.squared_norm / USUAL_RANK)
    la.optimize_prior_precision()
    yield "evidence", predicted(la, test)
    for name, rule in RULES.items():
        la = estimator(training, features.n_train, USUAL_RANK, seed)
        la.temperature = rule(la, features)
        yield name, predicted(la, test)
    half = len(training.y) // 2
    la, result = chosen(features, seed, training[half:], training[:half])
    yield "training data held out: auto", predicted(la, test)
    for name in ("temperature scaling", "ELLA (T)", "ELLA (T, s)"):
        with_method(la, name, result.baselines[name].setting)
        yield f"training data held out: {name}", predicted(la, test)


def _of_trace(la: Any, features: Features) -> float:
    """Widen the variance of the span to that of all directions: T is one over the share of the trace that is retained."""
    return 1 / float(features.retained[USUAL_RANK - 1])


def _of_size(la: Any, features: Features) -> float:
    """Give the average training input a variance of about 1 in units of its curvature: T = N / K."""
    return features.n_train / USUAL_RANK


RULES: dict[str, Callable[[Any, Features], float]] = {
    "T = 1 / retained trace": _of_trace,
    "T = N / K": _of_size,
}
