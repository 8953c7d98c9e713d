"""What a fitted estimator of a drawn configuration must agree in with the dense oracle.

Directions V are those that the fit found, and are asked only whether they are eigenvectors: those of equal
eigenvalues are unique up to a rotation, and so is nothing that is made of them.
"""

import io
from dataclasses import dataclass
from itertools import pairwise

import oracle
import torch
from fuzz_configs import Config, estimator
from fuzz_oracle import F64, Dense, close

from laplace_ella import ELLALaplace

# What a link may be off by, and a prediction of an estimator that was saved and loaded.
OF_LINKS = {F64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.3}
OF_SAVED = {F64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05}


@dataclass
class Truth:
    """What a fitted estimator should say, with the directions and G that it has."""

    config: Config
    la: ELLALaplace

    def __post_init__(self):
        config, la = self.config, self.la
        options = config.options
        # Of pairs of options and their better one, the fit is that of classes.
        self.hosted = config.likelihood.replace("reward_modeling", "classification")
        self.dense = Dense(config.network.module)
        self.V = torch.cat([v.reshape(len(v), -1).to(F64) for v in la.basis.directions.values()], 1).T
        self.train = [self.dense.jacobian(x, len(y)) for x, y in config.batches]
        self.J, self.f, _ = self.dense.jacobian(config.x, config.n_test)
        self.phi = self.J @ self.V
        self.outside = self.J - self.phi @ self.V.T
        self.delta = self.dense.prior(options["prior_precision"])
        self.sigma, self.temperature = options.get("sigma_noise", 1.0), options["temperature"] or 1.0
        # V^T V = I, which rounding of V does not change.
        scalar, identity = isinstance(options["prior_precision"], float), torch.eye(la.basis.rank, dtype=F64)
        self.projected = self.delta[0] * identity if scalar else self.V.T @ (self.delta[:, None] * self.V)
        self.A = oracle.precision(la.H, self.projected, self.sigma, self.temperature)
        self.residual = options.get("residual", "none")
        self.rho = options.get("residual_scale", 1.0) / float(self.delta[0])
        # How large a variance along any direction is: what rounding of phi is measured by.
        share = 1e-3 if config.dtype == F64 else 1.0
        of_jacobian = self.J.flatten(0, 1).square().sum(1).max()
        self.spread = share * float(torch.linalg.inv(self.A).diagonal().max() * of_jacobian)

    def rows(self):
        """Return R (M, P), if it is known which landmarks there are."""
        config = self.config
        if config.landmarks is None:
            every = torch.cat([J.flatten(0, 1) for J, _, _ in self.train[: config.parts[0]]])
            return every if config.options["subsample_size"] >= len(every) else None
        x, outputs = config.landmarks
        J, _, lengths = self.dense.jacobian(x, len(outputs))
        return J.flatten(0, 1)[torch.tensor([0, *lengths]).cumsum(0)[:-1] * config.n_outputs + outputs]

    def covariance(self):
        """Return Cov(f) of each input; None where an isotropic residual is all but all of it."""
        cov = oracle.covariance(self.phi, self.A)
        if self.residual == "exact":
            cov = cov + self.rho * self.outside @ self.outside.mT
        elif self.residual == "isotropic":  # of random tangents, by the share that they say is outside
            share, n = self.la.residual_share(self.config.x).to(F64), cov.shape[-1]
            if float(share.max()) > 0.9:
                return None
            variance = self.rho * self.phi.square().sum((1, 2)) * share / (1 - share) / n
            cov = cov + variance[:, None, None] * torch.eye(n, dtype=F64)
        return cov

    def joint(self):
        cov, outside = oracle.joint_covariance(self.phi, self.A), self.outside.flatten(0, 1)
        return cov + self.rho * outside @ outside.T if self.residual == "exact" else cov


def check_directions(t):
    """V is orthonormal, and made of eigenvectors of the landmarks' Gram matrix."""
    config, values, rank = t.config, t.la.basis.eigenvalues, t.la.basis.rank
    eps = torch.finfo(config.dtype).eps
    off = 1e3 * eps + 1e2 * 2e-16 * float(values[0] / values[-1])
    close("V^T V", t.V.T @ t.V, torch.eye(rank), off)
    rows = t.rows()
    # Gradients that all but cancel, of weights whose scale a norm takes off, are rounding in less than float64.
    if rows is None or (config.dtype != F64 and values[0] < 1e-5):
        return
    of_rows = max(eps, torch.finfo(config.options["spill_dtype"]).eps) if config.spills else eps
    loose = {F64: 1e4, torch.float32: 1e3, torch.bfloat16: 20}[config.dtype] * of_rows
    spectrum = torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp_min(0)
    close("eigenvalues", values, spectrum[:rank], loose)
    close("trace", t.la.basis.trace, spectrum.sum(), loose)
    found = (rows.T @ (rows @ t.V) - t.V * values).norm(dim=0) / values[0]
    assert bool((found <= loose * (values[0] / values).sqrt()).all()), f"no eigenvectors: {found}, {values}"
    asked = config.options["n_eigenvalues"]
    if isinstance(asked, int) and rank < min(asked, len(rows)):
        left = float(spectrum[rank] / spectrum[0])
        assert left < 10 * max(loose, len(rows) * 3e-16), (
            f"rank {rank}, and the next eigenvalue is {left:.2e}"
        )


def check_curvature(t):
    config, H, rank = t.config, t.la.H, t.la.basis.rank
    n = sum(len(y) for _, y in config.batches)
    total = config.fit_options.get("n_total", n)
    assert t.la.n_data == total
    per_output = config.likelihood in ("regression", "bernoulli")
    parts = (y for _, y in config.batches)
    y = torch.cat([y.flatten(0, -2) if per_output or y.is_floating_point() else y.flatten() for y in parts])
    f = torch.cat([f for _, f, _ in t.train])
    t.loss, t.n_numbers = oracle.loss(f, y, t.hosted) * total / n, f.numel() * total / n
    close("loss", t.la.loss, t.loss, config.tolerance, float(f.abs().sum()) * total / n)
    assert H.shape == (rank, rank)
    close("symmetry of G", H, H.T, 1e-12)
    least = float(torch.linalg.eigvalsh(H)[0])
    assert least > -1e-9 * max(1e-30, float(H.abs().max())), f"G has an eigenvalue of {least}"
    ends, size = torch.tensor([0, *config.parts]).cumsum(0).tolist(), config.options["curvature_size"]
    calls = (sum(len(y) for _, y in config.batches[a:b]) for a, b in pairwise(ends))
    exact = size is None or all(size >= n_of_call for n_of_call in calls)
    if exact and config.options.get("curvature", "exact") == "exact":
        phi = torch.cat([J @ t.V for J, _, _ in t.train])
        scale = max(float((p.T @ p).abs().max()) for p in phi) * 1e-6
        close("G", H, oracle.curvature(phi, f, t.hosted) * total / n, 4 * config.tolerance, scale)


def check_posterior(t):
    la, found = t.la, t.la.posterior_precision.detach()
    close("posterior precision", found, t.A, 10 * t.config.tolerance)
    loose = 1e-9 + 1e-14 * float(torch.linalg.cond(found))
    close("posterior covariance", la.posterior_covariance, torch.linalg.inv(found), loose)
    if t.config.dtype != torch.bfloat16:
        offset = t.dense.theta() - t.config.options["prior_mean"]
        of_data, of_prior = (t.loss, t.n_numbers, t.hosted), (t.projected, offset @ (t.delta * offset))
        expected = oracle.evidence(*of_data, t.A, *of_prior, t.sigma, t.temperature)
        size = float(t.loss) / (t.sigma**2 * t.temperature) + t.n_numbers
        close("evidence", la.log_marginal_likelihood(), expected, 5 * t.config.tolerance, size)


def check_features(t):
    phi, f = t.la.features(t.config.x)
    size = float(t.J.flatten(0, 1).norm(dim=1).max())
    close("phi", phi, t.phi, t.config.tolerance, size if t.config.dtype != F64 else size * 1e-3)
    close("f", f, t.f, t.config.tolerance, 1.0)
    cov = oracle.covariance(t.phi, t.A)
    close("functional variance", t.la.functional_variance(phi), cov, 4 * t.config.tolerance, t.spread)


def check_predictions(t):
    config, la, cov = t.config, t.la, t.covariance()
    if cov is None:
        return
    if config.likelihood in ("regression", "reward_modeling"):
        check_moments(t, cov)
        return
    f, link = t.f * config.options.get("logit_scale", 1.0), config.likelihood
    off = OF_LINKS[config.dtype] * (1 + float(f.abs().max()))
    close("probit", la(config.x), oracle.probit(f, cov, link), off, 1.0)
    diagonal = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
    for name, of_mc, flags in (("mc", cov, {}), ("independent mc", diagonal, {"diagonal_output": True})):
        mc = la(config.x, link_approx="mc", n_samples=512, **flags)
        expected = oracle.monte_carlo(f, of_mc, 4000, torch.Generator().manual_seed(0), link)
        close(name, mc, expected, max(off, 0.06), 1.0)
    probabilities = [mc, la(config.x, pred_type="nn", link_approx="mc", n_samples=3)]
    if link == "classification":
        for name in ("bridge", "bridge_norm"):
            probabilities.append(la(config.x, link_approx=name))
            if bridge_applies(cov) and config.dtype == F64:
                close(name, probabilities[-1], oracle.bridge(f, cov, name == "bridge_norm"), 1e-4, 1.0)
        for p in probabilities:
            loose = 0.03 if p.dtype == torch.bfloat16 else 1e-5
            close("sum of probabilities", p.double().sum(-1), torch.ones(len(p)), loose)
    for p in probabilities:
        assert bool(((p >= 0) & (p <= 1.001)).all()), "probabilities outside of [0, 1]"


def bridge_applies(cov):
    """Say whether no variance is too small for a Dirichlet to mean anything."""
    sums, var = cov.sum(2), cov.diagonal(dim1=1, dim2=2)
    total = sums.sum(1)
    if bool((total <= 1e-3 * var.sum(1)).any()):
        return False
    least = (var - sums.square() / total[:, None]).min(1).values
    return bool((least > 1e-2 * var.max(1).values).all())


def check_moments(t, cov):
    la, x, off, loose = t.la, t.config.x, t.config.tolerance, 4 * t.config.tolerance
    mean, full = la(x)
    close("mean", mean, t.f, off, 1.0)
    close("covariance", full, cov, loose, t.spread)
    variances = la(x, diagonal_output=True)[1]
    close("variance", variances, cov.diagonal(dim1=1, dim2=2), loose, t.spread)
    if t.residual != "isotropic":
        mean, found = la(x, joint=True)
        close("joint mean", mean, t.f.flatten(), off, 1.0)
        close("joint covariance", found, t.joint(), loose, t.spread)


def check_samples(t):
    generator = torch.Generator().manual_seed(0)
    for draw in (t.la.functional_samples, t.la.predictive_samples):
        drawn = draw(t.config.x, n_samples=3, generator=generator)
        assert drawn.shape == (3, *t.f.shape)
        assert bool(drawn.isfinite().all())
    offsets = t.la.sample(3, generator=generator).double() - t.dense.theta()
    assert offsets.shape == (3, len(t.V))
    if t.residual != "exact" and t.config.dtype == F64:
        outside = offsets - offsets @ t.V @ t.V.T
        close("samples of weights in the span", outside, 0 * outside, 1.0, 1e-7 * float(offsets.norm()))


def check_novelty(t):
    total = t.J.square().sum((1, 2))
    if t.residual == "exact" and t.config.dtype != torch.bfloat16 and bool((total > 1e-9).all()):
        share = t.outside.square().sum((1, 2)) / total
        close("residual share", t.la.residual_share(t.config.x), share, 10 * t.config.tolerance, 1.0)


def check_saved(t):
    """Save, load into another estimator, and predict."""
    file = io.BytesIO()
    torch.save(t.la.state_dict(), file)
    file.seek(0)
    names = ("dict_key_x", "dict_key_y", "enable_backprop", "autodiff", "backend")
    other = estimator(t.config, {k: v for k, v in t.config.options.items() if k in names})
    other.load_state_dict(torch.load(file, weights_only=True))
    mine, theirs = t.la(t.config.x), other(t.config.x)
    for a, b in zip(mine, theirs) if isinstance(mine, tuple) else [(mine, theirs)]:
        close("a saved estimator's prediction", b, a, OF_SAVED[a.dtype])


CHECKS = [
    value for name, value in [*globals().items()] if name.startswith("check_") and name != "check_moments"
]
