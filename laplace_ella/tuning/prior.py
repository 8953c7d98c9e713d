r"""Tuning of the prior precision, and of the temperature with it, by grid search from one pass over validation data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import copied
from ..data.checks import check_choice, check_size, integer, positive_number
from ..data.loading import check_loader, check_some
from ..data.stream import Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..posterior.checks import as_prior, check_link, check_prediction, check_prior_precision
from ..posterior.likelihoods import Likelihood, Prediction, name_of
from ..posterior.links import LINKS
from ..posterior.posterior import Posterior
from ..posterior.sampling import Draws, averaged, outputs_at, scored, weight_offsets
from ..posterior.setting import Setting
from ..posterior.targets import check_unweighted, checked_targets, scored_rows
from .candidates import link_of, predictor_of, require_same_search, scorer_of
from .checks import check_interval, check_loss
from .scoring import Loss, score
from .search import FLAT, TEMPERATURES, Search, grid_search

_FLAT_LOSS = (
    "The loss is the same for every setting on the grid, so the setting is left as it was. "
    "A loss of the mean alone does not depend on prior and temperature."
)
# What a search needs: the score of a setting, that of the network itself, and the root mean square of its errors.
Scores = tuple[Callable[[Setting], float], Callable[[], float], Callable[[], float]]


@dataclass(frozen=True)
class PriorSearch:
    """A grid search over prior precisions.

    Attributes
    ----------
    priors : list of float
    pred_type : {"glm", "nn"}
    link : str
    n_samples : int
    loss : torchmetrics.Metric or callable, optional
    """

    priors: list[float]
    pred_type: str
    link: str
    n_samples: int
    loss: Loss | None = None


def checked_evidence(
    n_steps: Any, lr: Any, init: Any, structure: Any, n_layers: int, n_params: int, device: torch.device
) -> tuple[int, float, Tensor, str]:
    """Return the options by which the evidence is maximised, for laplace-torch.

    Raises
    ------
    ValueError
    """
    check_choice("prior_structure", structure, ("scalar", "layerwise", "diag"))
    steps, rate = integer("n_steps", n_steps, "an integer, 0 or more", 0), positive_number("lr", lr)
    start = as_prior(init)
    check_prior_precision("init_prior_prec", start, n_layers, n_params)
    if not isinstance(start, Tensor):
        start = torch.tensor(start, dtype=torch.float32, device=device)
    return steps, rate, start, structure


def checked_search(
    method: str, interval: Sequence[Any], options: Sequence[Any], val_loader: Any, likelihood: Likelihood
) -> PriorSearch:
    """Return a grid search; with ``method="marglik"``, what is given for one is checked, and not used.

    Parameters
    ----------
    interval : (low, high, base, size)
    options : (pred_type, link, n_samples, loss)

    Raises
    ------
    ValueError
    """
    (low, high, base, size), (pred_type, link, n_samples, loss) = interval, options
    is_used = method == "gridsearch"
    check_size("grid_size", size, optional=False)
    check_choice("link_approx", link, LINKS)
    low, high, base = check_interval(low, high, base, size, is_used)
    if val_loader is not None:
        check_loader("val_loader", val_loader)
    pred_type = check_prediction(pred_type, link if is_used else "mc", n_samples)
    if is_used:
        check_link(likelihood, link)
        check_loss(loss)
        if val_loader is None:
            raise ValueError("method='gridsearch' scores on validation data: pass val_loader=...; got None.")
    grid = torch.logspace(low, high, int(size), base=base, dtype=torch.float32, device="cpu").tolist()
    return PriorSearch(grid, pred_type, name_of(link), int(n_samples), loss)


def tuned_prior(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: PriorSearch
) -> tuple[dict[str, Any], list[str]]:
    """Return the best prior precision, and temperature unless that is fixed; and what is to be said.

    Raises
    ------
    ValueError
        If no candidate has a finite loss.
    """
    posterior = posterior.with_variance("ella")
    options: dict[str, Any] = {
        "grid": search.priors,
        "pred_type": search.pred_type,
        "link_approx": search.link,
    }
    options |= {"n_samples": search.n_samples, "temperature_fixed": posterior.temperature_fixed}
    require_same_search(posterior, ranks, "optimize_prior_precision()", **options)
    scores = _nn_scores if search.pred_type == "nn" else _glm_scores
    evaluate, score_of_map, rms_error = scores(posterior, engine, stream, ranks, search)
    found = Search(evaluate)
    grid_search(found, posterior.plain, search.priors, not posterior.temperature_fixed, stream.progress)
    skipped = found.conclude()
    if found.is_flat():
        return {}, [*filter(None, [skipped]), _FLAT_LOSS]
    best, remarks = _chosen(found, posterior, search.priors, score_of_map, rms_error)
    new = best.rounded(posterior.setting)
    values = {"temperature": new.temperature, "prior_precision": new.prior_precision}
    changes: dict[str, Any] = {
        "setting": values,
        "variance": "ella",
        "prior_before": posterior.prior_replaced_by(best.prior_precision),
    }
    if search.pred_type == "glm" and posterior.likelihood.has_probabilities:
        changes["link"] = search.link
    return changes, list(filter(None, [skipped, *remarks]))


def replaced(before: Posterior, after: Posterior) -> dict[str, Any]:
    """Return what changes when the evidence has chosen another prior precision."""
    new = after.setting.prior_precision
    found = float(new) if new.numel() == 1 else None
    return {"setting": {"prior_precision": new}, "prior_before": before.prior_replaced_by(found)}


def _chosen(
    found: Search,
    posterior: Posterior,
    priors: Sequence[float],
    score_of_map: Callable[[], float],
    rms_error: Callable[[], float],
) -> tuple[Setting, list[str]]:
    """Return the setting to use, and what is to be said of it.

    Where no setting is better than the network itself, that of the smallest variance is used, unless the present one is as
    good.
    """
    best, lowest = found.best, found.table[found.best]
    edge = found.edge("prior_precision", sorted(priors))
    if edge:
        edge = f"{edge} Widen it with log_prior_prec_min or log_prior_prec_max."
    if posterior.temperature_fixed:
        return best, [edge]
    map_score = score_of_map()
    if lowest < map_score - FLAT * abs(map_score):
        return best, [edge, found.edge("temperature", TEMPERATURES)]
    now = posterior.plain
    as_good = now.prior_precision is not None and found(now) - lowest <= FLAT * abs(lowest)
    used = now if as_good else best.at(temperature=TEMPERATURES[0], prior_precision=max(priors))
    scaled = f", its logits scaled by {now.logit_scale:.4g}" if now.logit_scale != 1 else ""
    remark = (
        f"No setting predicts better than the network itself{scaled} (MAP: {map_score:.5g}, the best setting: "
        f"{lowest:.5g}); {'nothing is changed' if as_good else 'the setting of the smallest variance is used'}."
    )
    return used, [remark, _remark_on_noise(posterior, rms_error)]


def _remark_on_noise(posterior: Posterior, rms_error: Callable[[], float]) -> str:
    """Name a noise that leaves no room for more variance."""
    sigma = float(posterior.setting.sigma_noise)
    if not posterior.likelihood.has_noise or (error := rms_error()) >= sigma:
        return ""
    return (
        f"sigma_noise = {sigma:.4g} alone is more than the network's errors on these data, whose root mean square is "
        f"{error:.4g}, so that no variance helps. Assign la.sigma_noise, or tune it with the temperature: "
        'optimize_hyperparameters(val_loader, ["temperature", "sigma_noise"]).'
    )


def _rms_error(pairs: Iterable[tuple[Tensor, Tensor]], likelihood: Likelihood, ranks: Ranks) -> float:
    """Return the root mean square of the differences of outputs and targets of all ranks, in units of the noise's ratios."""
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for f, y in pairs:
        ratios = likelihood.noise(torch.ones((), dtype=torch.float64, device=f.device))
        error = ((f.double() - y.double()) / ratios).square()
        sums += torch.tensor([float(error.sum()), error.numel()], dtype=torch.float64, device="cpu")
    total, n = ranks.total(sums).tolist()
    return (total / n) ** 0.5


def _glm_scores(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: PriorSearch
) -> Scores:
    scorer = scorer_of(posterior, engine, stream, ranks, search.loss)
    predictor = predictor_of(posterior, link_of(posterior, search.link, search.n_samples, search.loss))
    outputs = ((block.linearised.f, block.targets) for block in scorer.data)
    error = partial(_rms_error, outputs, posterior.likelihood, ranks)
    return partial(scorer, predictor), partial(scorer, scorer.of_map, posterior.plain), error


def _nn_scores(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: PriorSearch
) -> Scores:
    """Score settings by networks with sampled weights, which run for each of them."""
    likelihood, kept = posterior.likelihood, []
    with ranks.together("the validation data"):
        for batch in stream.batches("Validation data"):
            f = engine.forward(batch.x)
            flat_f, name = f.flatten(0, -2), f"validation {batch.name}"
            check_unweighted(batch.weights, name)
            y = checked_targets(likelihood, batch.y, flat_f, engine.axes_of(f), name)
            rows = scored_rows(likelihood, batch.y)
            rows = (
                torch.ones(len(y), dtype=torch.bool, device=y.device) if rows is None else rows.to(y.device)
            )
            # These are copies, as a loader may fill its buffers again.
            kept.append((copied(batch.x), rows, flat_f[rows], y[rows]))
    check_some(ranks.greatest(len(kept), "the validation data"), "validation loader")
    noise_variance = posterior.setting.sigma_noise.double().square()

    of_samples, of_map = scored, likelihood.certain
    if search.loss is not None and not likelihood.has_probabilities:
        of_samples, of_map = averaged, likelihood.conditional_moments

    def scored_all(pairs: Callable[[], Iterator[tuple[Prediction, Tensor]]]) -> float:
        return score(pairs, likelihood, search.loss, noise_variance, ranks, engine.device)

    @torch.no_grad()
    def evaluate(setting: Setting) -> float:
        candidate = posterior.at(setting)

        def predictions() -> Iterator[tuple[Prediction, Tensor]]:
            # All candidates get the same noise, so that the best is not the luckiest.
            generator = torch.Generator(engine.device).manual_seed(posterior.seed)
            offsets = weight_offsets(candidate, Draws(search.n_samples, generator))
            return (
                (of_samples(outputs_at(engine, offsets, x)[:, rows], likelihood), y) for x, rows, _, y in kept
            )

        return scored_all(predictions)

    def score_of_map() -> float:
        return scored_all(lambda: ((of_map(f), y) for _, _, f, y in kept))

    return evaluate, score_of_map, lambda: _rms_error(((f, y) for _, _, f, y in kept), likelihood, ranks)


@contextmanager
def quiet_host() -> Iterator[None]:
    """Silence laplace-torch's reminder of the link, which the evidence does not use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "By default `link_approx`")
        yield


def remarks_on_evidence(posterior: Posterior) -> list[str]:
    """Return what is to be said after the evidence was maximised."""
    if posterior.variance != "ella":
        other = f"Predictions are those of variance={posterior.variance!r}, which have no prior"
        ella = "Tune ELLA with optimize_hyperparameters(val_loader) to predict with it"
        return [f"{other}: its precision is changed, and they are not. {ella}."]
    if posterior.temperature_fixed:
        return []
    stays = f"the temperature stays {posterior.setting.temperature:.4g}"
    both = "use method='gridsearch' with a val_loader to tune both"
    alone = "Without validation data, optimize_hyperparameters(some_of_train, ['temperature']) is the next best (docs/choosing.md)"
    return [
        f"The evidence tunes the prior only: {stays}. Assign temperature=1.0 for the posterior it is of, or {both}. {alone}."
    ]
