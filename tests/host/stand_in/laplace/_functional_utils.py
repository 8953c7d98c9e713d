import torch


def prior_of(value, structure, n_layers, n_params):
    sizes = {"scalar": 1, "layerwise": n_layers, "diag": n_params}
    return value if value.numel() > 1 else value.expand(sizes[structure]).clone()


def evidence_step(estimator, optimizer, log_prior):
    optimizer.zero_grad()
    (-estimator.log_marginal_likelihood(prior_precision=log_prior.exp())).backward()
    optimizer.step()


def optimizer_of(log_prior, lr):
    return torch.optim.Adam([log_prior.requires_grad_()], lr=lr)
