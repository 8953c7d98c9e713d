"""All the numbers that an estimator gives, by public names."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from unchanged_models import N_VAL, B, K, N, quiet, uniform

import laplace_ella

LINKS = ("probit", "mc", "bridge", "bridge_norm")
RESIDUALS = ("none", "isotropic", "exact")
Numbers = dict[str, Any]


def generator():
    return torch.Generator().manual_seed(17)


def numbers_of(c):
    """Return everything by name. Names that start with "seeded" depend on torch's random streams too."""
    la = c.fitted()
    found = {}
    parts = [of_fit, of_posterior, of_predictions, of_samples, of_evidence, of_prior_tuning, of_joint_tuning]
    parts += [of_early_stopping, of_more_data, of_novelty, of_backprop, of_backends, of_words]
    with quiet():
        for part in parts:
            for name, value in part(c, deepcopy(la)).items():
                first, _, rest = name.partition(" ")
                key = (
                    f"seeded {part.__name__[3:]} {rest}"
                    if first == "seeded"
                    else f"{part.__name__[3:]} {name}"
                )
                found[key] = value
    return found


def of_fit(c, la):
    basis = la.basis
    phi, f = la.backend.jacobians(c.x())
    snapshots = {f"snapshot {n}": G for n, G in la.snapshots}
    return {
        "H": la.H,
        "eigenvalues": basis.eigenvalues,
        "spectrum": basis.spectrum / basis.trace,
        "trace": basis.trace,
        "retained": basis.retained,
        "rank": basis.rank,
        "landmarks": basis.n_landmarks,
        "loss": la.loss,
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.n_params, la.n_layers],
        "mean": la.mean,
        "history": la.fit_history_["processed_examples"],
        **snapshots,
        **{f"direction {k}": v for k, v in basis.directions.items()},
        "features": phi,
        "outputs": f,
    }


def of_posterior(c, la):
    phi, _ = la.backend.jacobians(c.x())
    return {
        "precision": la.posterior_precision,
        "scale": la.posterior_scale,
        "covariance": la.posterior_covariance,
        "functional variance": la.functional_variance(phi),
        "functional covariance": la.functional_covariance(phi),
        "residual variance": la.residual_variance,
        "hyperparameters": [float(la.temperature), float(la.sigma_noise), la.logit_scale, la.residual_scale],
        "prior": la.prior_precision,
        "share outside": la.residual_share(c.x()),
        "captured trace": la.approximation_error(c.x()).captured_trace,
        "covariance error": la.approximation_error(c.x(), c.batches(1, N)).covariance_error,
    }


def residuals(la):
    """Give an estimator with a scalar prior every residual in turn."""
    for residual in RESIDUALS if la.prior_precision.numel() == 1 else ("none",):
        la.residual = residual
        yield residual


def of_predictions(c, la):
    found = {}
    for residual in residuals(la):
        if c.likelihood in ("regression", "reward_modeling"):
            for flags in ({}, {"joint": True}, {"diagonal_output": True}):
                mean, spread = la(c.x(), **flags)
                name = f"{residual} {''.join(flags)}"
                found |= {f"{name} mean": mean, f"{name} spread": spread}
        for link in links(c):
            seeded = "seeded " if link == "mc" else ""
            x = c.x() if c.prediction_inputs is None else c.inputs(58, B)
            found[f"{seeded}{residual} {link}"] = la(x, link_approx=link, n_samples=30, fitting=True)
        if links(c):
            found[f"seeded {residual} mc diagonal"] = la(
                x, link_approx="mc", diagonal_output=True, n_samples=30, fitting=True
            )
            found[f"seeded {residual} mc generator"] = la(
                x, link_approx="mc", n_samples=30, fitting=True, generator=generator()
            )
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def links(c):
    """Return the links that a likelihood has."""
    return {"regression": (), "bernoulli": ("probit", "mc")}.get(c.likelihood, LINKS)


def of_samples(c, la):
    found = {}
    for residual in residuals(la):
        own = {
            "weights": la.sample(3, generator=generator()),
            "functions": la.functional_samples(c.x(), n_samples=3, generator=generator()),
            "independent": la.functional_samples(
                c.x(), n_samples=3, diagonal_output=True, generator=generator()
            ),
            "functions nn": la.functional_samples(c.x(), "nn", n_samples=3, generator=generator()),
            "predictive": la.predictive_samples(c.x(), n_samples=3, generator=generator()),
            "predictive nn": la.predictive_samples(c.x(), "nn", n_samples=3, generator=generator()),
        }
        of_networks = la(c.x(), pred_type="nn", link_approx="mc", n_samples=3, generator=generator())
        own |= {f"nn {i}": value for i, value in enumerate(as_tuple(of_networks))}
        found |= {f"seeded {residual} {k}": v for k, v in own.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        return {**found, "seeded of torch's own generator": la.sample(2)}


def of_evidence(c, la):
    found = {
        "likelihood": la.log_likelihood,
        "scatter": la.scatter,
        "log det ratio": la.log_det_ratio,
        "log det prior": la.log_det_prior_precision,
        "log det posterior": la.log_det_posterior_precision,
        "evidence": la.log_marginal_likelihood(),
    }
    prior = (1.1 * la.prior_precision.detach()).requires_grad_()
    noise = (0.9 * la.sigma_noise.detach()).requires_grad_()
    arguments = (prior, noise) if c.likelihood == "regression" else (prior,)
    evidence = la.log_marginal_likelihood(*arguments)
    gradients = torch.autograd.grad(evidence, arguments)
    return {**found, "elsewhere": evidence, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def as_tuple(prediction):
    return prediction if isinstance(prediction, tuple) else (prediction,)


def tuned(la):
    return [float(la.temperature), float(la.sigma_noise), la.logit_scale, la.residual_scale]


def of_prior_tuning(c, la):
    found = {}
    by_evidence = deepcopy(la)
    structure = {"conv_batchnorm": "layerwise", "partly_frozen": "diag"}.get(c.name, "scalar")
    by_evidence.optimize_prior_precision(n_steps=15, prior_structure=structure, init_prior_prec=0.8)
    found["evidence"] = by_evidence.prior_precision
    val = c.batches(2, N_VAL)
    by_grid = deepcopy(la)
    by_grid.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=7)
    found |= {"grid": by_grid.prior_precision, "grid setting": tuned(by_grid)}
    if c.name == "mlp":
        for name, options in {
            "mc": {"link_approx": "mc"},
            "nn": {"pred_type": "nn", "link_approx": "mc"},
        }.items():
            other = deepcopy(la)
            other.optimize_prior_precision(
                method="gridsearch", val_loader=val, grid_size=2, n_samples=5, **options
            )
            found |= {f"seeded {name}": other.prior_precision, f"seeded {name} setting": tuned(other)}
    return found


def of_joint_tuning(c, la):
    found = {}
    val = c.batches(2, N_VAL)
    for link in ("probit", "mc") if c.name == "mlp" else ("probit",):
        other = deepcopy(la)
        search = {"temperature": [0.1, 1.0, 10.0]} if link == "mc" else c.search
        result = other.optimize_hyperparameters(val, search, link_approx=link, n_samples=16)
        own = {
            "best": [float(v) for v in vars(result.best).values() if v is not None],
            "score": result.score,
            "searched": list(result.searched),
            "first scores": [score for _, score in result.table[:12]],
            "inputs": result.n_inputs,
            "loss": result.loss,
            "applied": result.applied,
            "setting": tuned(other),
            "prior": other.prior_precision,
            "H": other.H,
            "prediction": as_tuple(other(c.x()))[-1],
        }
        for name, baseline in result.baselines.items():
            own |= {f"baseline {name}": baseline is not None}
            if baseline is not None:
                own |= {
                    f"baseline {name} score": baseline.score,
                    f"baseline {name} difference": baseline.difference,
                    f"baseline {name} error": baseline.standard_error,
                    f"baseline {name} parameters": sorted(baseline.parameters),
                    f"baseline {name} values": [float(v) for v in baseline.parameters.values()],
                }
        seeded = "seeded " if link == "mc" else ""
        found |= {f"{seeded}{link} {k}": v for k, v in own.items()}
    return found


def of_early_stopping(c, la):
    la = c.estimator(temperature=None)
    options = {k: v for k, v in c.fit.items() if k != "val_steps"}
    la.fit(c.batches(1, N), val_loader=c.batches(2, N_VAL), val_steps=2, **options)
    return {
        "history": [float(v) for values in la.fit_history_.values() for v in values],
        "n": la.n_curvature,
        "H": la.H,
        "setting": tuned(la),
        "prior": la.prior_precision,
        "evidence": la.log_marginal_likelihood(),
    }


def of_more_data(c, la):
    """Return what override=False, merge, forget, basis=, max_samples and n_total give."""

    def sums(la):
        return {"H": la.H, "loss": la.loss, "counts": [la.n_data, la.n_predictions, la.n_curvature]}

    found = {}
    added = deepcopy(la)
    added.fit(c.batches(3, 13), override=False)
    found |= {f"added {k}": v for k, v in sums(added).items()}
    whole = c.estimator(curvature_size=1000, curvature="exact")
    whole.fit(c.batches(1, N), **c.fit)
    other = c.estimator(curvature_size=1000, curvature="exact")
    other.fit(c.batches(3, 13), basis=whole.basis)
    whole.merge(other)
    found |= {f"merged {k}": v for k, v in sums(whole).items()}
    whole.forget(c.batches(1, N)[:2])
    found |= {f"remaining {k}": v for k, v in sums(whole).items()}
    part = c.estimator()
    part.fit(c.batches(1, N), max_samples=31, n_total=500, **c.fit)
    return {**found, **{f"of a sample {k}": v for k, v in sums(part).items()}}


def of_novelty(c, la):
    if c.likelihood in ("regression", "reward_modeling"):
        return {"uncalibrated": la.novelty(c.x())}
    la.calibrate_novelty(c.batches(4, 3 * N))
    return {"seeded calibrated": la.novelty(c.x())}


def of_backprop(c, la):
    """Return the gradients of predictions in the inputs."""
    x = c.x()
    if isinstance(x, dict):
        return {}
    la = c.fitted(enable_backprop=True, residual="none")
    x.requires_grad_()
    total = sum((i + 1) * (p * uniform(60, *p.shape)).sum() for i, p in enumerate(as_tuple(la(x))))
    return {"gradient": torch.autograd.grad(total, x)[0]}


def of_backends(c, la):
    """Return what the other ways to differentiate the model give."""
    if c.name != "mlp":
        return {}
    own = laplace_ella.ReverseNystromGGN, laplace_ella.BackPackNystromGGN, laplace_ella.AsdlNystromGGN
    changes = [{"backend": backend} for backend in own]
    changes += [{"autodiff": mode} for mode in ("forward", "double", "reverse")]
    found = {}
    for change in changes:
        other = c.fitted(**change)
        name = " ".join(getattr(v, "__name__", v) for v in change.values())
        found |= {f"{name} H": other.H, f"{name} features": other.backend.jacobians(c.x())[0]}
    return found


def of_words(c, la):
    plan = c.estimator(n_eigenvalues=K).plan(c.batches(1, N), verbose=False)
    counts = [plan.n_data, plan.n_outputs, plan.n_params, plan.n_landmarks, plan.rank, plan.n_curvature]
    return {
        "repr": repr(la),
        "repr unfitted": repr(c.estimator()),
        "arguments": list(la.get_params()),
        "plan counts": counts,
        "plan mode": plan.mode,
        "plan stages": [stage.name for stage in plan.stages],
        "plan forwards": [float(stage.forwards) for stage in plan.stages],
        "plan bytes": [stage.n_bytes for stage in plan.stages],
        "plan budget": plan.budget,
    }


def of_small(la):
    """Return what a loaded state has to give."""
    x = uniform(84, 3, 2)
    return {
        "probit": la(x),
        "bridge": la(x, link_approx="bridge"),
        "share outside": la.residual_share(x),
        "evidence": la.log_marginal_likelihood(),
        "H": la.H,
        "loss": la.loss,
        "hyperparameters": [float(la.temperature), float(la.prior_precision), la.residual_scale],
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.subsample_size],
        "residual": la.residual,
        "repr": repr(la),
        "seeded novelty": la.novelty(x),
        "history": la.fit_history_["processed_examples"],
    }
