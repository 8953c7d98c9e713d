"""Links and images of all pages exist in the tree, as GitHub resolves them, and their anchors do."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(p.relative_to(ROOT)) for of in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for p in ROOT.glob(of)
)


spec = importlib.util.spec_from_file_location("links", ROOT / "docs/_hooks/links.py")
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)


def leads_somewhere(target, text, page):
    """Say whether a target on a page exists; those on other sites are believed."""
    path, anchor = links.resolved(target, page) or (None, "")
    if path is None:
        return True
    there = ROOT / path
    if path != page and (path.startswith(("/", "..")) or not there.exists()):
        return False
    return not anchor or anchor in links.anchors(text if path == page else there.read_text())


def broken(text, page):
    """Return the targets of a page that lead nowhere."""
    return [target for target in links.targets(text) if not leads_somewhere(target, text, page)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken((ROOT / page).read_text(), page) == []


ANCHORS = "# What it costs, *now*\n\n[a](#what-it-costs-now)\n\n## Same\n\n## Same\n\n[b](#same-1) [c](#same)"
BROKEN = [
    ("[a](design.md#decisions) ![b](images/quickstart.png) [c](https://x.org/none) [d](../LICENSE)", []),
    ("[a](nowhere.md) ![b](images/none.png) [c](/docs/design.md)", None),
    ("[a](design.md#nothing) [b](#none)", None),
    (ANCHORS, []),
    ("```\n[a](nowhere.md)\n```\n\n    [b](nowhere.md)\n\n`[c](nowhere.md)`", []),
    ('<img src="images/none.png">', ["images/none.png"]),
]


@pytest.mark.parametrize(("text", "wrong"), BROKEN)
def test_what_is_broken_is_found(text, wrong):
    assert broken(text, "docs/page.md") == (links.targets(text) if wrong is None else wrong)


def test_targets_change_outside_code_only():
    text = "[a](x.md) `[b](x.md)`\n\n    [c](x.md)\n\n```\n[d](x.md)\n```\n[e](x.md#f)\n"
    new = links.rewritten(text, lambda target: f"new/{target}")
    assert new == text.replace("[a](", "[a](new/").replace("[e](", "[e](new/")
