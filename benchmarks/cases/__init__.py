"""What is measured: functions of the command line's options that return rows.

``ALL_CASES`` maps a case to its parts; each part runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.cases import features, fits, host, searches, setting
from benchmarks.cases.chunks import CHUNK_CASES, QUICK_CHUNKS
from benchmarks.cases.latency import LATENCY_CASES
from benchmarks.cases.method_costs import COST_CASES
from benchmarks.cases.plans import PLAN_CASES
from benchmarks.cases.setting import Part, Rows
from benchmarks.methods import METHODS

CASES: dict[str, dict[str, Part]] = {
    "gradients": {
        **{name: partial(features.gradients, name=name) for name in setting.BATCHES},
        **{
            f"{k}, Gram matrix": partial(features.gram, name=k, size=m) for k, m in features.LANDMARKS.items()
        },
        **{
            f"{k}, Gram matrix, M = {m}": partial(features.gram, name=k, size=m, ways=("fit",))
            for k, m in features.MANY_LANDMARKS.items()
        },
        **{f"{name}, exact residual": partial(features.kernels, name=name) for name in features.KERNELS},
    },
    "features": {
        f"{name}-{c}-{k}": partial(features.features, name=name, n_outputs=c, rank=k)
        for name, c, k in features.FEATURES
    },
    "crossover": {name: partial(features.crossover, name=name) for name in features.CROSSOVER_BATCHES},
    "host": {"resnet20": host.against_host},
    "composed": {"resnet20": host.composed},
    "memory": {
        **{
            f"{name}-{m}": partial(fits.memory, name=name, n_landmarks=m)
            for name, m in (("resnet20", 200), ("resnet20", 500), ("mlp", 40), ("vit", 40))
        },
        "ours": partial(host.memory_of_host, batch=None),
        **{f"host-{batch}": partial(host.memory_of_host, batch=batch) for batch in (1, 4, 8)},
    },
    "methods": {
        **{name: partial(fits.method, name="resnet20", chosen=name) for name in METHODS},
        "tiny, full": partial(fits.method, name="tiny", chosen="all weights, full"),
    },
}
# Minutes each, in files of their own, as are plans, chunks and latencies.
TUNING_CASES: dict[str, dict[str, Part]] = {
    "tuning": {
        **{kind: partial(searches.tuning, kind=kind) for kind in ("grid", "probit", "mc")},
        "host": host.tuning_of_host,
    },
    "sampled": {
        "20": partial(searches.sampled_curvature, rank=20, sizes=(100, 400, 1000)),
        "100": partial(searches.sampled_curvature, rank=100, sizes=(200,)),
    },
}
CUDA_CASES: dict[str, dict[str, Part]] = {
    "cuda-features": {
        f"{name}-{c}": partial(features.cuda, name=name, n_outputs=c) for name, c in features.CUDA
    },
    "cuda-resnet20": {"resnet20": partial(fits.cuda, name="resnet20", n=50_000, batch=500)},
    "cuda-resnet50": {"resnet50": partial(fits.cuda, name="resnet50", n=2_000, batch=50)},
    "cuda-vit-b-16": {"vit_b_16": partial(fits.cuda, name="vit_b_16", n=2_000, batch=50)},
}
# What is computed from the rows of all parts of a case.
COMBINE: dict[str, Callable[[Rows], Rows]] = {"memory": host.compared_memory}
ALL_CASES = {
    **CASES,
    **TUNING_CASES,
    **COST_CASES,
    **CUDA_CASES,
    **PLAN_CASES,
    **CHUNK_CASES,
    **LATENCY_CASES,
}
# With --quick, of cases that take hours.
QUICK_CASES = {**ALL_CASES, **QUICK_CHUNKS}
