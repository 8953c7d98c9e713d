r"""Slow twins of the package's equations, written from the mathematics alone.

Loops of ``.backward()``, dense matrices over all weights, explicit :math:`\Lambda`:
nothing here is clever, and nothing here comes from the package.
"""

import copy
import math

import torch


def in_evaluation_mode(model):
    return copy.deepcopy(model).eval()


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def weights(model):
    return torch.cat([p.detach().flatten() for p in trainable(model)])


def outputs(model, x):
    with torch.no_grad():
        return in_evaluation_mode(model)(x)


def gradient_rows(model, x, coordinates):
    """R (M, P): one backward pass for each pair of input and output coordinate."""
    model = in_evaluation_mode(model)
    rows = []
    for i, c in enumerate(coordinates.tolist()):
        model.zero_grad(set_to_none=True)
        model(x[i : i + 1])[0, c].backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model)]
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def jacobian(model, x):
    """J (B, C, P)."""
    n_outputs = outputs(model, x[:1]).shape[1]
    columns = [gradient_rows(model, x, torch.full((len(x),), c)) for c in range(n_outputs)]
    return torch.stack(columns, 1)


def gram(rows):
    return rows.double() @ rows.double().T


def basis(rows, rank):
    r"""V (P, K), eigenvalues (K,) and trace of :math:`R R^T`."""
    eigenvalues, U = torch.linalg.eigh(gram(rows))
    top = torch.argsort(eigenvalues, descending=True)[:rank]
    V = rows.double().T @ U[:, top] @ torch.diag(eigenvalues[top] ** -0.5)
    return V, eigenvalues[top], eigenvalues.sum()


def dense(directions):
    """V (P, K) of directions (K, *shape), by weight."""
    return torch.cat([v.flatten(1) for v in directions.values()], 1).T


def with_signs_of(V, reference):
    """Eigenvectors are unique up to their signs; take those of a reference (P, K)."""
    return V * (V * reference.double()).sum(0).sign()


def features(model, x, V):
    return jacobian(model, x) @ V.to(x.dtype)


def output_hessian(f, likelihood):
    r""":math:`\Lambda` (C, C) of one input."""
    if likelihood == "regression":
        return torch.eye(len(f), dtype=f.dtype)
    p = inverse_link(f, likelihood)
    return torch.diag(p * (1 - p)) if likelihood == "bernoulli" else torch.diag(p) - torch.outer(p, p)


def curvature(phi, f, likelihood):
    r""":math:`\sum_i \Phi_i^T \Lambda_i \Phi_i`; with a Jacobian in place of the features, the GGN."""
    total = torch.zeros(phi.shape[-1], phi.shape[-1], dtype=phi.dtype)
    for phi_i, f_i in zip(phi, f):
        total = total + phi_i.T @ output_hessian(f_i, likelihood) @ phi_i
    return total


def prior_matrix(model, prior_precision):
    r""":math:`\Delta` (P, P) of a scalar, layer-wise or diagonal prior."""
    sizes = [p.numel() for p in trainable(model)]
    delta = torch.as_tensor(prior_precision, dtype=torch.float64).flatten()
    if len(delta) == 1:
        delta = delta.repeat(sum(sizes))
    elif len(delta) == len(sizes):
        delta = torch.cat([d.repeat(n) for d, n in zip(delta, sizes)])
    return torch.diag(delta)


def precision(G, projected_prior, sigma_noise, temperature):
    return G / (sigma_noise**2 * temperature) + projected_prior


def covariance(phi, A):
    """(B, C, C): each input on its own."""
    return torch.stack([p @ torch.linalg.inv(A) @ p.T for p in phi])


def joint_covariance(phi, A):
    """(BC, BC)."""
    flat = phi.reshape(-1, phi.shape[-1])
    return flat @ torch.linalg.inv(A) @ flat.T


def loss(f, y, likelihood):
    """Negative log likelihood of targets (N,) or (N, C), summed."""
    if likelihood == "regression":
        return sum(0.5 * (a - b) ** 2 for a, b in zip(f.flatten(), y.flatten()))
    if likelihood == "bernoulli":
        zero = torch.zeros((), dtype=f.dtype)
        return sum(torch.logaddexp(zero, a) - a * b for a, b in zip(f.flatten(), y.flatten()))
    return sum(torch.logsumexp(a, 0) - (a @ b.to(a) if b.ndim else a[int(b)]) for a, b in zip(f, y))


def evidence(loss, n_numbers, likelihood, A, projected_prior, scatter, sigma_noise, temperature):
    r"""Log-lik - 1/2 (log det A - log det V^T Delta V) - 1/2 scatter, of a loss of ``n_numbers`` outputs."""
    log_likelihood = -loss / (sigma_noise**2 * temperature)
    if likelihood == "regression":
        log_likelihood = log_likelihood - n_numbers * math.log(sigma_noise * math.sqrt(2 * math.pi))
    return log_likelihood - 0.5 * (torch.logdet(A) - torch.logdet(projected_prior) + scatter)


def log_evidence(f, y, likelihood, A, projected_prior, prior, offset, sigma_noise, temperature):
    r"""The scatter is (theta* - mu0)^T Delta (theta* - mu0)."""
    of_data = loss(f, y, likelihood), f.numel(), likelihood
    return evidence(*of_data, A, projected_prior, offset @ prior @ offset, sigma_noise, temperature)


def inverse_link(f, likelihood):
    return torch.sigmoid(f) if likelihood == "bernoulli" else torch.softmax(f, -1)


def probit(f, cov, likelihood="classification"):
    scaled = [[m / math.sqrt(1 + math.pi / 8 * v) for m, v in zip(a, c.diagonal())] for a, c in zip(f, cov)]
    return inverse_link(torch.tensor(scaled, dtype=f.dtype), likelihood)


def bridge(f, cov, normalize):
    """Match a Dirichlet to N(f, cov), input by input, with all of the (C, C) covariance."""
    result = []
    for mean, var in zip(f, cov):
        n, one = len(mean), torch.ones(len(mean), dtype=mean.dtype)
        mean = mean - var @ one * (one @ mean) / (one @ var @ one)
        var = var - torch.outer(var @ one, var @ one) / (one @ var @ one)
        v = var.diagonal()
        if normalize:
            ratio = v.mean() / math.sqrt(n / 2)
            mean, v = mean / math.sqrt(ratio), v / ratio
        alpha = (1 - 2 / n + mean.exp() / n**2 * (-mean).exp().sum()) / v
        result.append(alpha / alpha.sum())
    return torch.stack(result)


def monte_carlo(f, cov, n_samples, generator, likelihood="classification"):
    """Mean of the probabilities of iid samples from N(f, cov), through an eigendecomposition of cov."""
    result = []
    for mean, var in zip(f, cov):
        eigenvalues, Q = torch.linalg.eigh(var)
        root = Q * eigenvalues.clamp_min(0).sqrt()
        noise = torch.randn(n_samples, len(mean), dtype=f.dtype, generator=generator)
        result.append(inverse_link(mean + noise @ root.T, likelihood).mean(0))
    return torch.stack(result)
