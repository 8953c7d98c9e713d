"""What a fitted estimator of a drawn configuration must agree in with the dense oracle."""

import io
from dataclasses import dataclass, field

import torch
from fuzz_configs import BACKENDS, Config
from fuzz_oracle import (
    F64,
    Dense,
    bridge,
    close,
    curvature,
    evidence,
    loss,
    monte_carlo,
    probit,
    residual_of_directions,
)

from laplace_ella import ELLALaplace


def flat(tangents):
    """Return tangents of all weights (S, P)."""
    return torch.cat([v.reshape(len(v), -1).to(F64) for v in tangents.values()], 1)


@dataclass
class Truth:
    """What a fitted estimator should say, with the directions and G that it has."""

    config: Config
    la: ELLALaplace
    dense: Dense = field(init=False)

    def __post_init__(self):
        config, la = self.config, self.la
        self.dense = Dense(config.network.module)
        self.V = flat(la.basis.directions).T
        self.train = [self.dense.jacobian(x, len(y)) for x, y in config.batches]
        self.J, self.f, _ = self.dense.jacobian(config.x, config.n_test)
        self.phi = self.J @ self.V
        self.delta = self.dense.prior(config.options["prior_precision"])
        self.sigma = config.options.get("sigma_noise", 1.0)
        self.temperature = config.options["temperature"] or 1.0
        # V^T V = I, which rounding of V does not change.
        scalar = isinstance(config.options["prior_precision"], float)
        identity = torch.eye(la.basis.rank, dtype=F64)
        self.projected = self.delta[0] * identity if scalar else self.V.T @ (self.delta[:, None] * self.V)
        self.A = la.H / (self.sigma**2 * self.temperature) + self.projected
        self.scale = config.options.get("logit_scale", 1.0)
        self.outside = self.J - self.phi @ self.V.T
        self.rho = config.options.get("residual_scale", 1.0) / float(self.delta[0])

    @property
    def hosted(self):
        """The likelihood of the fit."""
        return "classification" if self.config.likelihood == "reward_modeling" else self.config.likelihood

    def rows(self):
        """Return R (M, P), if it is known which landmarks there are."""
        config = self.config
        if config.landmarks is None:
            pairs = [J.flatten(0, 1) for J, _, _ in self.train[: config.parts[0]]]
            every = torch.cat(pairs)
            return every if config.options["subsample_size"] >= len(every) else None
        x, outputs = config.landmarks
        J, _, lengths = self.dense.jacobian(x, len(outputs))
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1] * config.n_outputs
        return J.flatten(0, 1)[starts + outputs]

    def covariance(self):
        """Return Cov(f) of each input; None where an isotropic residual is all but all of it."""
        inverse = torch.linalg.inv(self.A)
        cov = torch.stack([p @ inverse @ p.T for p in self.phi])
        residual = self.config.options.get("residual", "none")
        if residual == "exact":
            cov = cov + self.rho * self.outside @ self.outside.mT
        elif residual == "isotropic":  # of random tangents, by the share that they say is outside
            share = self.la.residual_share(self.config.x).to(F64)
            if float(share.max()) > 0.9:
                return None
            variance = self.rho * self.phi.square().sum((1, 2)) * share / (1 - share) / cov.shape[-1]
            cov = cov + variance[:, None, None] * torch.eye(cov.shape[-1], dtype=F64)
        return cov

    def joint(self):
        flat, outside = self.phi.flatten(0, 1), self.outside.flatten(0, 1)
        cov = flat @ torch.linalg.inv(self.A) @ flat.T
        return cov + self.rho * outside @ outside.T


def check_directions(t):
    """V is orthonormal, and made of eigenvectors of the landmarks' Gram matrix."""
    config, la = t.config, t.la
    eps = max(torch.finfo(config.dtype).eps, torch.finfo(F64).eps)
    if config.spills:
        eps = max(eps, torch.finfo(config.options["spill_dtype"]).eps)
    values = la.basis.eigenvalues
    condition = float(values[0] / values[-1])
    off = 1e3 * torch.finfo(config.dtype).eps + 1e2 * 2e-16 * condition
    close("V^T V", t.V.T @ t.V, torch.eye(la.basis.rank), off)
    rows = t.rows()
    # Gradients that all but cancel, of weights whose scale a norm takes off, are rounding in less than float64.
    if rows is None or (config.dtype != F64 and values[0] < 1e-5):
        return
    loose = {torch.float64: 1e4, torch.float32: 1e3, torch.bfloat16: 20}[config.dtype] * eps
    if config.spills:
        loose = max(loose, 20 * eps)
    spectrum = torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp_min(0)
    close("eigenvalues", values, spectrum[: la.basis.rank], loose)
    close("trace", la.basis.trace, spectrum.sum(), loose)
    found = residual_of_directions(rows, t.V, values)
    bound = loose * (values[0] / values).sqrt()
    assert bool((found <= bound).all()), (
        f"directions are no eigenvectors: {found.tolist()}, {values.tolist()}"
    )
    asked = config.options["n_eigenvalues"]
    if isinstance(asked, int) and la.basis.rank < min(asked, len(rows)):
        left = float(spectrum[la.basis.rank] / spectrum[0])
        assert left < 10 * max(loose, len(rows) * 3e-16), (
            f"rank {la.basis.rank}, and the next eigenvalue is {left:.2e}"
        )


def check_curvature(t):
    config, la = t.config, t.la
    n = sum(len(y) for _, y in config.batches)
    total = config.fit_options.get("n_total", n)
    assert la.n_data == total
    y = torch.cat([flat_targets(config, y) for _, y in config.batches])
    f = torch.cat([f for _, f, _ in t.train])
    t.loss = loss(f, y, t.hosted) * total / n
    t.n_numbers = f.numel() * total / n
    close("loss", la.loss, t.loss, t.config.tolerance, scale=float(f.abs().sum()) * total / n)
    H, size = la.H, config.options["curvature_size"]
    assert H.shape == (la.basis.rank, la.basis.rank)
    close("symmetry of G", H, H.T, 1e-12)
    least = float(torch.linalg.eigvalsh(H)[0])
    assert least > -1e-9 * max(1e-30, float(H.abs().max())), f"G has an eigenvalue of {least}"
    exact = size is None or all(size >= sum(len(y) for _, y in part) for part in parts_of(config))
    if exact and config.options.get("curvature", "exact") == "exact":
        phi = torch.cat([J @ t.V for J, _, _ in t.train])
        scale = max(float((p.T @ p).abs().max()) for p in phi) * 1e-6
        close("G", H, curvature(phi, f, t.hosted) * total / n, 4 * config.tolerance, scale)


def parts_of(config):
    found, start = [], 0
    for n in config.parts:
        found.append(config.batches[start : start + n])
        start += n
    return found


def flat_targets(config, y):
    """Return targets (B L,) or (B L, C)."""
    per_output = config.likelihood in ("regression", "bernoulli") or y.is_floating_point()
    return y.flatten(0, -2) if per_output else y.flatten()


def check_posterior(t):
    la = t.la
    close("posterior precision", la.posterior_precision, t.A, 10 * t.config.tolerance)
    inverse = torch.linalg.inv(la.posterior_precision.detach())
    condition = float(torch.linalg.cond(la.posterior_precision.detach()))
    close("posterior covariance", la.posterior_covariance, inverse, 1e-9 + 1e-14 * condition)
    theta = t.dense.theta()
    offset = theta - t.config.options["prior_mean"]
    expected = evidence(
        t.loss, t.n_numbers, t.hosted, t.A, t.projected, offset @ (t.delta * offset), t.sigma, t.temperature
    )
    if t.config.dtype != torch.bfloat16:
        size = float(t.loss) / (t.sigma**2 * t.temperature) + t.n_numbers
        close("evidence", la.log_marginal_likelihood(), expected, 5 * t.config.tolerance, scale=size)


def check_features(t):
    phi, f = t.la.features(t.config.x)
    size = float(t.J.flatten(0, 1).norm(dim=1).max())
    close("phi", phi, t.phi, t.config.tolerance, scale=size if t.config.dtype != F64 else size * 1e-3)
    close("f", f, t.f, t.config.tolerance, scale=1.0)
    cov = torch.stack([p @ torch.linalg.inv(t.A) @ p.T for p in t.phi])
    loose = 4 * t.config.tolerance
    size = spread(t, cov)
    close("functional variance", t.la.functional_variance(phi), cov, loose, size)


def spread(t, cov):
    """Return how large a variance along any direction is: what rounding of phi is measured by."""
    largest = float(torch.linalg.inv(t.A).diagonal().max())
    return largest * float(t.J.flatten(0, 1).square().sum(1).max()) * (1e-3 if t.config.dtype == F64 else 1.0)


def check_predictions(t):
    config, la, cov = t.config, t.la, t.covariance()
    if cov is None:
        return
    if config.likelihood in ("regression", "reward_modeling"):
        check_moments(t, cov)
        return
    f, link = t.f * t.scale, config.likelihood
    off = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.3}[config.dtype]
    off = off * (1 + float(f.abs().max()))
    close("probit", la(config.x), probit(f, cov, link), off, 1.0)
    mc = la(config.x, link_approx="mc", n_samples=512)
    close("mc", mc, monte_carlo(f, cov, link), max(off, 0.06), 1.0)
    diagonal = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
    mc = la(config.x, link_approx="mc", n_samples=512, diagonal_output=True)
    close("mc, independent outputs", mc, monte_carlo(f, diagonal, link), max(off, 0.06), 1.0)
    nn = la(config.x, pred_type="nn", link_approx="mc", n_samples=3)
    probabilities = [mc, nn]
    if link == "classification":
        for name in ("bridge", "bridge_norm"):
            p = la(config.x, link_approx=name)
            expected = bridge(f, cov, name == "bridge_norm")
            if expected is not None and config.dtype == F64:
                close(name, p, expected, 1e-4, 1.0)
            probabilities.append(p)
        for p in probabilities:
            close(
                "sum of probabilities",
                p.double().sum(-1),
                torch.ones(len(p)),
                0.03 if p.dtype == torch.bfloat16 else 1e-5,
            )
    for p in probabilities:
        assert bool(((p >= 0) & (p <= 1.001)).all()), "probabilities outside of [0, 1]"


def check_moments(t, cov):
    config, la = t.config, t.la
    loose, size = 4 * config.tolerance, spread(t, cov)
    mean, full = la(config.x)
    close("mean", mean, t.f, config.tolerance, 1.0)
    close("covariance", full, cov, loose, size)
    _, variances = la(config.x, diagonal_output=True)
    close("variance", variances, cov.diagonal(dim1=1, dim2=2), loose, size)
    if config.options.get("residual", "none") in ("none", "exact"):
        flat = t.phi.flatten(0, 1)
        joint = (
            t.joint() if config.options.get("residual") == "exact" else flat @ torch.linalg.inv(t.A) @ flat.T
        )
        mean, found = la(config.x, joint=True)
        close("joint mean", mean, t.f.flatten(), config.tolerance, 1.0)
        close("joint covariance", found, joint, loose, size)


def check_samples(t):
    config, la = t.config, t.la
    generator = torch.Generator().manual_seed(0)
    drawn = la.functional_samples(config.x, n_samples=3, generator=generator)
    assert drawn.shape == (3, *t.f.shape)
    assert bool(drawn.isfinite().all())
    drawn = la.predictive_samples(config.x, n_samples=3, generator=generator)
    assert drawn.shape == (3, *t.f.shape)
    offsets = la.sample(3, generator=generator).double() - t.dense.theta()
    assert offsets.shape == (3, len(t.V))
    if config.options.get("residual") != "exact" and config.dtype == F64:
        outside = offsets - offsets @ t.V @ t.V.T
        close(
            "samples of weights in the span",
            outside,
            torch.zeros_like(outside),
            1.0,
            1e-7 * float(offsets.norm()),
        )


def check_novelty(t):
    if t.config.options.get("residual") != "exact" or t.config.dtype == torch.bfloat16:
        return
    total = t.J.square().sum((1, 2))
    share = t.outside.square().sum((1, 2)) / total.clamp_min(1e-300)
    if bool((total > 1e-9).all()):
        close("residual share", t.la.residual_share(t.config.x), share, 10 * t.config.tolerance, 1.0)


def check_saved(t):
    """Save, load into another estimator, and predict."""
    file = io.BytesIO()
    torch.save(t.la.state_dict(), file)
    file.seek(0)
    names = ("dict_key_x", "dict_key_y", "enable_backprop", "autodiff", "backend")
    options = {k: v for k, v in t.config.options.items() if k in names}
    if options.get("backend") is not None:
        options["backend"] = BACKENDS[options["backend"]]
    other = ELLALaplace(t.config.network.module, t.config.likelihood, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    mine, theirs = t.la(t.config.x), other(t.config.x)
    pairs = zip(mine, theirs) if isinstance(mine, tuple) else [(mine, theirs)]
    for a, b in pairs:
        close(
            "a saved estimator's prediction",
            b,
            a,
            0.05 if a.dtype == torch.bfloat16 else 1e-3 if a.dtype != F64 else 1e-9,
        )


CHECKS = (
    check_directions,
    check_curvature,
    check_posterior,
    check_features,
    check_predictions,
    check_samples,
    check_novelty,
    check_saved,
)
