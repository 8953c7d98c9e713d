"""Tables of docs/ablations.md, and the figures of it and of docs/choosing.md, from the JSON of this study."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.report import NOTHING, table
from benchmarks.studies.ablations import report_landmarks
from benchmarks.studies.common import results, tables
from benchmarks.studies.common.results import DOCS, IMAGES, write_page
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import Run, Runs

PAGE, CHOOSING = DOCS / "ablations.md", DOCS / "choosing.md"
CASES = ("cifar10-jpeg", "fashion-cnn")
OF_LANDMARKS = {f"landmarks_{case}": case for case in report_landmarks.CASES}
NAMES = ("error", *(f"quality_{case}" for case in CASES), "cost", "price", "directions", *OF_LANDMARKS)

METHODS = {"T = 1": "T = 1", "stopped": "stopped early", "T": "T tuned", "T, s": "T and s tuned"}
SIMPLE = ("MAP", "temperature scaling", "vector scaling")
SWEEPS = {"K": "K", "n": "n, curvature inputs", "M": "M, landmarks", "way": "landmarks drawn"}
AXES = {"width": "P", "C": "C", "K": "K", "M": "M", "N": "N"}
# By the arithmetic: the power of P, C, K, M, N that a stage's cost goes with.
EXPECTED: dict[str, tuple[str, str, str, str, str]] = {
    "forward": ("1", "0", "0", "0", "0"),
    "scan": ("1", "0", "0", "0", "1"),
    "landmark gradients": ("1", "0", "0", "1", "0"),
    "Gram matrix": ("1", "0", "0", "2", "0"),
    "eigenvectors": ("0", "0", "0", "3", "0"),
    "directions": ("1", "0", "1", "1", "0"),
    "features, forward mode": ("1", "0", "1", "0", "0"),
    "features, reverse mode": ("1", "1", "0 to 1", "0", "0"),
    "curvature": ("0", "1", "2", "0", "0"),
    "prediction": ("1", "0", "1, then 0 to 1", "0", "0"),
    "fit": ("1", "0", "0 to 1", "1 to 3", "0 to 1"),
    "peak memory of a fit": ("1", "0", "0 to 1", "1 to 2", "0"),
    "peak memory of a prediction": ("0 to 1", "0", "0 to 1", "0", "0"),
}


def shown(values: Iterable[float], form: str = ".4f") -> str:
    """Return the mean over seeds with its standard error."""
    return tables.shown(mean_and_error(list(values)), form)


def cells_at(run: Run, **wanted: int) -> list[dict[str, Any]]:
    return [row for row in run["cells"] if all(row[key] == value for key, value in wanted.items())]


ERRORS = {
    "NTK": "ntk",
    "covariance, T = 1": "evidence",
    "covariance, T tuned": "tuned",
    "covariance, T = 1, with the residual": "evidence, residual",
    "covariance, T tuned, with the residual": "tuned, residual",
    "share of trace captured at test inputs": "captured",
    "share of the Gram matrix's trace retained": "retained",
}


def errors(axis: str, run: Run) -> str:
    """Write the errors along K at the largest M, or along M at a middle K."""
    sizes = run["sizes"]
    fixed = {"M": sizes[-1]} if axis == "K" else {"K": 32}
    lines = []
    for size in sizes:
        rows = cells_at(run, **fixed, **{axis: size})
        if rows:
            cells = [shown((row[key] for row in rows), ".3f") for key in ERRORS.values()]
            best = f"{run['best_rank'][str(rows[0]['K'])]:.3f}"
            lines.append([str(size), *cells[:1], best, *cells[1:]])
    head = list(ERRORS)
    return table([axis, head[0], f"NTK, best of rank {axis if axis == 'K' else 32}", *head[1:]], lines)


def error_setting(run: Run) -> str:
    """Say what was compared."""
    of_evidence, tuned = run["settings"]["evidence"], run["settings"]["tuned"]
    seeds = len({row["seed"] for row in run["cells"]})
    lines = [
        ["network", f"{run['network']}, {run['parameters']} weights, float64"],
        ["images", f"{run['images']}: " + ", ".join(f"{n} {name}" for name, n in run["counts"].items())],
        ["accuracy on test images", f"{run['test_accuracy']:.3f}"],
        ["kernel of", f"{run['counts']['test']} test images x 10 outputs"],
        ["prior precision, of the largest exact evidence at T = 1", f"{of_evidence['prior']:.3g}"],
        [f"T, of the best validation NLL at K = {run['tuned_K']}", f"{tuned['temperature']:.3g}"],
        ["largest eigenvalue of the exact curvature", f"{run['largest_curvature']:.3g}"],
        ["seeds of the landmarks", str(seeds)],
    ]
    return table(["what", "value"], lines)


def of_sweep(run: Run, sweep: str) -> dict[Any, list[dict[str, Any]]]:
    """Return the rows of a sweep by its values, one a seed."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in run["rows"]:
        if row["sweep"] == sweep:
            found.setdefault(row["value"], []).append(row)
    order = None if sweep == "way" else float
    return dict(sorted(found.items(), key=lambda pair: order(pair[0]))) if order else found


def scores(sweep: str, run: Run) -> str:
    """Write NLL and ECE of one sweep."""
    lines = []
    for value, rows in of_sweep(run, sweep).items():
        cells = [
            shown((row["methods"][name][key] for row in rows), ".4f")
            for key in ("nll", "ece")
            for name in METHODS
        ]
        retained = shown((row["retained"] for row in rows), ".3f")
        lines.append([str(value), retained, *cells])
    head = [f"{score}, {words}" for score in ("NLL", "ECE") for words in METHODS.values()]
    return table([SWEEPS[sweep], "retained trace", *head], lines)


def setting(run: Run) -> str:
    """Say what was run, and what simpler methods reach."""
    counts, usual = run["counts"], run["usual"]
    used = f"{counts['train']} training images (landmarks, N), {counts['curvature']} curvature inputs, "
    used += f"{counts['validation']} validation and {counts['test']} test images of {run['images']}"
    lines = [
        [name, *(f"{run['simple'][name][key]:.4f}" for key in ("nll", "ece", "accuracy"))] for name in SIMPLE
    ]
    return (
        f"{run['title']}, {run['parameters']} weights; {used}; M = {usual['M']} and K = {usual['K']} where they are not "
        f"swept; prior precision {run['prior_precision']:g}; Monte-Carlo link of {run['samples']} samples.\n\n"
        + table(["simpler method", "NLL", "ECE", "accuracy"], lines)
    )


def settings_found(run: Run) -> str:
    """Write the temperatures and scales that tuning chose along K, and the n at which the paper's procedure stopped."""
    lines = []
    for k, rows in of_sweep(run, "K").items():
        found = [row["methods"] for row in rows]
        lines.append(
            [
                str(k),
                ", ".join(f"{of['stopped']['n']}" for of in found),
                ", ".join(f"{of['T']['temperature']:.3g}" for of in found),
                ", ".join(
                    f"{of['T, s']['temperature']:.3g} and {of['T, s']['logit_scale']:.2f}" for of in found
                ),
            ]
        )
    return table(["K", "stopped at n, by seed", "T, by seed", "T and s, by seed"], lines)


def small(run: Run) -> str:
    """Write the test NLL of what was tuned on few validation images."""
    names = ["T", "T, s", *SIMPLE[1:]]
    lines = []
    for n in dict.fromkeys(row["n"] for row in run["small"]):
        rows = [row for row in run["small"] if row["n"] == n]
        lines.append([str(n), *(shown(row["methods"][name]["nll"] for row in rows) for name in names)])
    head = [METHODS.get(name, name) for name in names]
    return table(["validation images", *head], lines)


def exponents(run: Run) -> str:
    """Write the fitted exponents beside those that the cost model expects."""
    lines = []
    for stage, expected in EXPECTED.items():
        cells = []
        for axis, theory in zip(AXES, expected):
            found = run["exponents"][axis].get(stage)
            text = (
                "not measured"
                if found is None
                else f"{found['exponent']:.2f} ± {found['standard_error']:.2f}"
            )
            cells.append(f"{text} ({theory})")
        lines.append([stage, *cells])
    ranges = [next(iter(run["exponents"][axis].values())) for axis in AXES]
    head = [f"{name}, {r['from']:g} to {r['to']:g}" for name, r in zip(AXES.values(), ranges)]
    return table(["cost of", *head], lines)


def base_costs(run: Run) -> str:
    """Write what each stage costs at the setting that all axes share."""
    base = run["base"]
    row = next(row for row in run["axes"]["M"] if row["cell"] == base)
    forward = row["seconds"]["forward"] / run["batch"]
    inputs = {
        "scan": base["N"],
        "landmark gradients": base["M"],
        **dict.fromkeys(("forward", "prediction"), run["batch"]),
        **{f"features, {mode} mode": run["batch"] for mode in ("forward", "reverse")},
    }
    lines = []
    for stage, seconds in row["seconds"].items():
        n = inputs.get(stage)
        each = "" if n is None else f"{seconds / n / forward:.3g}"
        lines.append([stage, "" if n is None else str(n), f"{1e3 * seconds:.3g}", each])
    about = (
        f"Width {base['width']} (P = {row['P']}), C = {base['C']}, K = {base['K']}, M = {base['M']}, N = {base['N']}, "
        f"n = {run['curvature_size']}, batches of {run['batch']} inputs of {' x '.join(map(str, run['shape']))}; a fit takes "
        f"{row['bytes']['fit'] / 1e6:.0f} MB beyond what the process held before.\n\n"
    )
    return about + table(["stage", "inputs", "processor time, ms", "forwards an input"], lines)


def price(runs: Runs) -> str:
    """Write what predictions with fewer directions cost, beside what they score."""
    if not {"price", "directions"} <= runs.keys():
        return NOTHING
    scored, cost = runs["directions"], {row["K"]: row for row in runs["price"]["rows"]}
    lines = []
    for row in scored["rows"]:
        of_t, of_both = row["methods"]["T"], row["methods"]["T, s"]
        one, many = cost[row["K"]]["calls"].values()
        lines.append(
            [
                str(row["K"]),
                f"{row['retained']:.1%}",
                *(f"{found[key]:.4f}" for key in ("nll", "ece") for found in (of_t, of_both)),
                f"{of_t['errors']:.3f}",
                f"{of_t['temperature']:.3g}",
                f"{many['mode']}",
                f"{many['forwards']:.3g}; {many['counted']:.3g}",
                *(f"{1e3 * c['seconds']:.0f}; {1e3 * c['taken']:.0f}" for c in (many, one)),
            ]
        )
    for name in SIMPLE:
        found = scored["simple"][name]
        lines.append([name, "", f"{found['nll']:.4f}", "", f"{found['ece']:.4f}", *[""] * 7])
    scores = [f"{score}, {METHODS[name]}" for score in ("NLL", "ECE") for name in ("T", "T, s")]
    batch = list(runs["price"]["passes"])[-1]
    times = [f"ms of {what}, promised; taken" for what in (f"{batch} inputs", "one input")]
    head = [
        "K'",
        "trace",
        *scores,
        "AUROC of errors, T tuned",
        "T",
        "features by",
        "forwards; counted",
        *times,
    ]
    return table(head, lines)


def price_setting(runs: Runs) -> str:
    """Say what was run."""
    if "directions" not in runs:
        return NOTHING
    run = runs["directions"]
    counts, sizes = run["counts"], run["sizes"]
    return (
        f"{run['network']}, {run['parameters']} weights, on {run['images']}: {counts['train']} training, {counts['validation']} "
        f"validation and {counts['test']} test images; one fit with M = {sizes['subsample_size']}, "
        f"K = {sizes['n_eigenvalues']}, n = {sizes['curvature_size']}; one thread.\n"
    )


def where(runs: Runs) -> str:
    """Say on what machine, with which versions, each file was measured."""
    if not runs:
        return NOTHING
    keys = ("commit", "cpu", "threads", "torch", "laplace-torch", "load_before", "seconds")
    lines = [
        [key.replace("_", " "), *(str(run["environment"][key]) for run in runs.values())] for key in keys
    ]
    return table(["", *(f"ablation_{name}.json" for name in runs)], lines)


def of_part(part: str, write: Callable[[Run], str], runs: Runs) -> str:
    return write(runs[part]) if part in runs else NOTHING


def choosing_landmarks(runs: Runs) -> str:
    found = {case: runs[name] for name, case in OF_LANDMARKS.items() if name in runs}
    return report_landmarks.cost(found) if found else NOTHING


def figure(name: str, caption: str, part: str, runs: Runs) -> str:
    """Show a figure, if what it is drawn from was measured."""
    return f"![{caption}](images/ablation_{name}.png)\n" if part in runs else NOTHING


OF_CASE: dict[str, Callable[[Run], str]] = {
    "setting": setting,
    **{sweep: partial(scores, sweep) for sweep in SWEEPS},
    "settings found": settings_found,
    "small": small,
}
FIGURES = {
    "error": ("Error of the kernel and of the covariance over M and K", "error"),
    "products": ("Error of the covariance against T times the prior precision", "error"),
    **{f"quality_{case}": ("NLL and ECE against K, n, M and the draw", f"quality_{case}") for case in CASES},
    "prior": ("Validation NLL over temperature and prior precision", "quality_fashion-cnn"),
    "small": ("Test NLL against the number of validation images", "quality_fashion-cnn"),
    "cost": ("Time and memory against P, C, K, M and N", "cost"),
}
TABLES: dict[str, Callable[[Runs], str]] = {
    **{f"figure {name}": partial(figure, name, *about) for name, about in FIGURES.items()},
    "error setting": partial(of_part, "error", error_setting),
    "error K": partial(of_part, "error", partial(errors, "K")),
    "error M": partial(of_part, "error", partial(errors, "M")),
    **{
        f"{case} {name}": partial(of_part, f"quality_{case}", write)
        for case in CASES
        for name, write in OF_CASE.items()
    },
    **{
        f"landmarks {case}{suffix}": partial(of_part, name, write)
        for name, case in OF_LANDMARKS.items()
        for suffix, write in {" setting": report_landmarks.setting, "": report_landmarks.compared}.items()
    },
    "choosing landmarks": choosing_landmarks,
    "base costs": partial(of_part, "cost", base_costs),
    "exponents": partial(of_part, "cost", exponents),
    "where": where,
}


OF_CHOOSING: dict[str, Callable[[Runs], str]] = {"price setting": price_setting, "price": price}


def read() -> Runs:
    return results.read("ablations", NAMES, "ablation_")


def main() -> None:
    from benchmarks.studies.ablations.plots import draw_all

    runs = read()
    write_page(PAGE, "ablations/report.py", runs, TABLES)
    write_page(CHOOSING, "ablations/report.py", runs, OF_CHOOSING)
    for name in draw_all(runs, IMAGES):
        print(f"{name} drawn")
