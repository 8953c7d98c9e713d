"""Write the cost table of the project's README from the JSON of run.py.

python benchmarks/report.py [results/quick.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
START = "<!-- costs: written by benchmarks/report.py -->\n"
END = "<!-- end of costs -->"


def cost_table(found: dict[str, Any]) -> str:
    """Return the results as a Markdown table with a line on where they were measured."""
    about = found["environment"]
    head = (
        f"ResNet-20 (272 474 weights) on {about['images']}, {about['dtype']}, {about['threads']} threads, "
        f"torch {about['torch']}, laplace-torch {about['laplace-torch']}; medians of one run.\n\n"
    )
    lines = ["| what | measured | target |", "|---|---|---|"]
    for row in found["results"]:
        bounds = row["target"] or {}
        target = " ".join(f"{bound} {number:g}" for bound, number in bounds.items())
        target += " (missed)" if row["met"] is False else ""
        lines.append(f"| {row['case']} | {row['value']:.3g} {row['unit']} | {target} |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "quick.json"
    text = README.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    README.write_text(before + START + cost_table(json.loads(path.read_text())) + END + after)
    print(f"{README.name}: table of {path.name} written")


if __name__ == "__main__":
    main()
