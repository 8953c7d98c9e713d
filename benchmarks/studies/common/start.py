"""Start a study: ``python -m benchmarks.studies.NAME run ...``, or ``... report``."""

from __future__ import annotations

import argparse
from importlib import import_module


def start(package: str) -> None:
    """Run a study, or write its report; what it has to say of itself stands in its package's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=import_module(package).__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", choices=("run", "report"), help="measure and write JSON, or write tables from it"
    )
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of run; `run --help` lists them")
    args = parser.parse_args()
    if args.what == "report" and args.options:
        parser.error(f"report has no options; got {' '.join(args.options)}")
    module = import_module(f"{package}.{args.what}")
    module.main(args.options) if args.what == "run" else module.main()


def options_of(package: str) -> argparse.ArgumentParser:
    """Return a parser for the options of a study's ``run``."""
    return argparse.ArgumentParser(prog=f"python -m {package} run")
