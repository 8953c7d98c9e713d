"""Links of a Markdown page: found, resolved in the tree as GitHub does it, and written anew."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator

# Code is left alone: fences, indented blocks after an empty line, spans.
_CODE = re.compile(
    r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)[ ]*$"
    r"|(?<=\n\n)(?:(?: {4}|\t)[^\n]*\n?)+"
    r"|(?P<span>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=span)(?!`)",
    re.M | re.S,
)
_LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|href)=")(?P<target>[^)"\s]+)""")
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$", re.M)
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.I)


def prose(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a page into pieces, and say of each whether it is code."""
    end = 0
    for match in _CODE.finditer(text):
        yield text[end : match.start()], False
        yield match.group(), True
        end = match.end()
    yield text[end:], False


def targets(text: str) -> list[str]:
    """Return the targets of all links and images, those to other sites too."""
    return [m["target"] for piece, code in prose(text) if not code for m in _LINK.finditer(piece)]


def resolved(target: str, page: str) -> tuple[str, str] | None:
    """Return path in the tree and anchor of a target on a page; None for those on other sites.

    Both paths are relative to the top of the tree; the path of a page's own anchors is the page's.
    """
    if _ELSEWHERE.match(target):
        return None
    path, _, anchor = target.partition("#")
    return (posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page), anchor


def rewritten(text: str, new: Callable[[str], str]) -> str:
    """Return the page with other targets."""

    def change(match: re.Match[str]) -> str:
        return match["before"] + new(match["target"])

    return "".join(piece if code else _LINK.sub(change, piece) for piece, code in prose(text))


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub makes it (and the site, by the same rule)."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page: those of its headings, the second of a kind with a number."""
    found: set[str] = set()
    # Code spans belong to headings, other code does not.
    shown = "".join(piece for piece, code in prose(text) if not code or "\n" not in piece)
    for heading in _HEADING.findall(shown):
        name = first = slug(heading)
        n = 0
        while name in found:
            n += 1
            name = f"{first}-{n}"
        found.add(name)
    return found
