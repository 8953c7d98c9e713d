"""All the numbers that an estimator gives, by public names."""

from copy import deepcopy

import torch
from helpers import as_tuple
from torch import Tensor
from unchanged_models import N_VAL, B, K, N, quiet, uniform

from laplace_ella import AsdlNystromGGN, BackPackNystromGGN, ReverseNystromGGN

RESIDUALS = ("none", "isotropic", "exact")
LINKS = ("probit", "mc", "bridge", "bridge_norm")
LINKS_OF = {"classification": LINKS, "reward_modeling": LINKS, "bernoulli": LINKS[:2], "regression": ()}


def generator():
    return torch.Generator().manual_seed(17)


def named(prefix, found):
    """Put a prefix before all names; "seeded" stays in front."""
    return {
        f"seeded {prefix} {k.removeprefix('seeded ')}" if k.startswith("seeded ") else f"{prefix} {k}": v
        for k, v in found.items()
    }


def numbers_of(c):
    """Return everything by name. Names that start with "seeded" depend on torch's random streams too."""
    la, found = c.fitted(), {}
    with quiet():
        for part in PARTS:
            found |= named(part.__name__.removeprefix("of_"), part(c, deepcopy(la)))
    return found


def of_fit(c, la):
    basis = la.basis
    phi, f = la.backend.jacobians(c.x())
    return {
        **{name: getattr(basis, name) for name in ("eigenvalues", "trace", "retained", "rank")},
        "spectrum": basis.spectrum / basis.trace,
        "landmarks": basis.n_landmarks,
        "H": la.H,
        "loss": la.loss,
        "mean": la.mean,
        "features": phi,
        "outputs": f,
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.n_params, la.n_layers],
        "history": la.fit_history_["processed_examples"],
        **{f"snapshot {n}": G for n, G in la.snapshots},
        **{f"direction {k}": v for k, v in basis.directions.items()},
    }


def of_posterior(c, la):
    phi, _ = la.backend.jacobians(c.x())
    return {
        **{name: getattr(la, f"posterior_{name}") for name in ("precision", "scale", "covariance")},
        "functional variance": la.functional_variance(phi),
        "functional covariance": la.functional_covariance(phi),
        "residual variance": la.residual_variance,
        "hyperparameters": tuned(la),
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
    found, links = {}, LINKS_OF[c.likelihood]
    for residual in residuals(la):
        if c.likelihood in ("regression", "reward_modeling"):
            for flags in ({}, {"joint": True}, {"diagonal_output": True}):
                name = f"{residual} {''.join(flags)}"
                found |= zip((f"{name} mean", f"{name} spread"), la(c.x(), **flags))
        x = c.x() if c.prediction_inputs is None else c.inputs(58, B)
        for link in links:
            seeded = "seeded " if link == "mc" else ""
            found[f"{seeded}{residual} {link}"] = la(x, link_approx=link, n_samples=30, fitting=True)
        options = {"link_approx": "mc", "n_samples": 30, "fitting": True}
        if links:
            found[f"seeded {residual} mc diagonal"] = la(x, diagonal_output=True, **options)
            found[f"seeded {residual} mc generator"] = la(x, generator=generator(), **options)
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def of_samples(c, la):
    found = {}
    for residual in residuals(la):
        own = {"weights": la.sample(3, generator=generator())}
        calls = {"functions": la.functional_samples, "predictive": la.predictive_samples}
        for name, draw in calls.items():
            own[name] = draw(c.x(), n_samples=3, generator=generator())
            own[f"{name} nn"] = draw(c.x(), "nn", n_samples=3, generator=generator())
        independent = {"diagonal_output": True, "generator": generator()}
        own["independent"] = la.functional_samples(c.x(), n_samples=3, **independent)
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
    arguments = [(1.1 * la.prior_precision.detach()).requires_grad_()]
    if c.likelihood == "regression":
        arguments.append((0.9 * la.sigma_noise.detach()).requires_grad_())
    evidence = la.log_marginal_likelihood(*arguments)
    gradients = torch.autograd.grad(evidence, arguments)
    return {**found, "elsewhere": evidence, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def tuned(la):
    return [float(la.temperature), float(la.sigma_noise), la.logit_scale, la.residual_scale]


def of_prior_tuning(c, la):
    found, val, by_evidence = {}, c.batches(2, N_VAL), deepcopy(la)
    structure = {"conv_batchnorm": "layerwise", "partly_frozen": "diag"}.get(c.name, "scalar")
    by_evidence.optimize_prior_precision(n_steps=15, prior_structure=structure, init_prior_prec=0.8)
    found["evidence"] = by_evidence.prior_precision
    grids = {"grid": {"grid_size": 7}}
    if c.name == "mlp":
        grids["seeded mc"] = {"grid_size": 2, "n_samples": 5, "link_approx": "mc"}
        grids["seeded nn"] = {**grids["seeded mc"], "pred_type": "nn"}
    for name, options in grids.items():
        other = deepcopy(la)
        other.optimize_prior_precision(method="gridsearch", val_loader=val, **options)
        found |= {name: other.prior_precision, f"{name} setting": tuned(other)}
    return found


def of_joint_tuning(c, la):
    found, val = {}, c.batches(2, N_VAL)
    for link in ("probit", "mc") if c.name == "mlp" else ("probit",):
        other = deepcopy(la)
        search = {"temperature": [0.1, 1.0, 10.0]} if link == "mc" else c.search
        result = other.optimize_hyperparameters(val, search, link_approx=link, n_samples=16)
        own = {name: getattr(result, name) for name in ("score", "loss", "applied")} | {
            "best": [float(v) for v in vars(result.best).values() if v is not None],
            "searched": list(result.searched),
            "first scores": [score for _, score in result.table[:12]],
            "inputs": result.n_inputs,
            "setting": tuned(other),
            "prior": other.prior_precision,
            "H": other.H,
            "prediction": as_tuple(other(c.x()))[-1],
        }
        for name, baseline in result.baselines.items():
            own[f"baseline {name}"] = baseline is not None
            if baseline is not None:
                own |= {
                    f"baseline {name} score": baseline.score,
                    f"baseline {name} difference": baseline.difference,
                    f"baseline {name} error": baseline.standard_error,
                    f"baseline {name} parameters": sorted(baseline.parameters),
                    f"baseline {name} values": [float(v) for v in baseline.parameters.values()],
                }
        found |= named("seeded mc" if link == "mc" else link, own)
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


def of_more_data(c, added):
    """Return what override=False, merge, forget, basis=, max_samples and n_total give."""

    def sums(name, la):
        return named(
            name, {"H": la.H, "loss": la.loss, "counts": [la.n_data, la.n_predictions, la.n_curvature]}
        )

    added.fit(c.batches(3, 13), override=False)
    whole, other = (c.estimator(curvature_size=1000, curvature="exact") for _ in range(2))
    whole.fit(c.batches(1, N), **c.fit)
    other.fit(c.batches(3, 13), basis=whole.basis)
    whole.merge(other)
    found = sums("added", added) | sums("merged", whole)
    whole.forget(c.batches(1, N)[:2])
    part = c.estimator()
    part.fit(c.batches(1, N), max_samples=31, n_total=500, **c.fit)
    return found | sums("remaining", whole) | sums("of a sample", part)


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
    own = {b.__name__: {"backend": b} for b in (ReverseNystromGGN, BackPackNystromGGN, AsdlNystromGGN)}
    own |= {mode: {"autodiff": mode} for mode in ("forward", "double", "reverse")}
    found = {}
    for name, change in own.items() if c.name == "mlp" else ():
        other = c.fitted(**change)
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


PARTS = [of_fit, of_posterior, of_predictions, of_samples, of_evidence, of_prior_tuning, of_joint_tuning]
PARTS += [of_early_stopping, of_more_data, of_novelty, of_backprop, of_backends, of_words]


def of_small(la):
    """Return what a loaded state has to give."""
    x = uniform(84, 3, 2)
    return {
        "probit": la(x),
        "bridge": la(x, link_approx="bridge"),
        "share outside": la.residual_share(x),
        "evidence": la.log_marginal_likelihood(),
        **{name: getattr(la, name) for name in ("H", "loss", "residual")},
        "hyperparameters": [float(la.temperature), float(la.prior_precision), la.residual_scale],
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.subsample_size],
        "repr": repr(la),
        "seeded novelty": la.novelty(x),
        "history": la.fit_history_["processed_examples"],
    }
