"""Random configurations of the whole package against a dense oracle.

    python tests/support/fuzz.py [--count 200] [--seed 0] [--start 0] [--only NUMBER]

A configuration follows from a seed and a number; what fails prints the line that repeats it alone.
"""

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter

import torch
from fuzz_checks import CHECKS, Truth
from fuzz_configs import Refused, draw_config, fitted


def run(seed, number):
    """Check one configuration; returns "agrees", or why it could not be tried.

    Raises
    ------
    AssertionError
        With the configuration, and the line that repeats it.
    """
    config = draw_config(seed, number)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            truth = Truth(config, fitted(config, folder))
            for check in CHECKS:
                check(truth)
        except Refused as error:
            return f"refused: {str(error)[:60]}"
        except Exception as error:
            line = f"python tests/support/fuzz.py --seed {seed} --only {number}"
            raise AssertionError(f"{type(error).__name__}: {error}\n{config}\n{line}") from error
    return "agrees"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--only", type=int, help="one number, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = Counter()
    for number in range(args.start, args.start + args.count) if args.only is None else [args.only]:
        try:
            found[run(args.seed, number)] += 1
        except AssertionError as error:
            found["disagrees"] += 1
            print(error, "\n", flush=True)
            if args.only is not None:
                traceback.print_exception(error)
    print(dict(found))
    return int(found["disagrees"] > 0)


if __name__ == "__main__":
    sys.exit(main())
