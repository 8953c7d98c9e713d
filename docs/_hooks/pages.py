"""Pages of the site that lie outside docs/: README and the like, and sources that pages link to.

Links are written for readers of the plain files, and changed here to what they are on the site. MkDocs
then checks them.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from links import resolved, rewritten, targets
from mkdocs.structure.files import File, Files

# Where a file of the tree is on the site. docs/x is at x, and any other file that is linked to at source/x.md.
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_PATHS = {uri: path for path, uri in PAGES.items()}
_LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".cfg": "ini"}

# Cells of up to so many characters stay on one line, so that numbers stand beside their errors, and cells of more than
# so many get room; wide tables scroll.
_SHORT, _LONG = 30, 70
_CELL = re.compile(r"<td([^>]*)>(.*?)</td>", re.S)
_TAG = re.compile(r"<[^>]*>")
# Scripts, styles, fonts and images of other sites, which would be fetched when a page is read.
_FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*\"""")
_COMMIT = re.compile(r"\b([0-9a-f]{10})[0-9a-f]{30}\b")

_log = logging.getLogger("mkdocs.hooks.pages")


def uri_of(path: str) -> str:
    """Return the name on the site of a file of the tree."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def path_of(uri: str) -> str:
    """Return the file of the tree that a page of the site is made from."""
    return _PATHS.get(uri, f"docs/{uri}")


def _root(config: Any) -> Path:
    return Path(config["docs_dir"]).parent


def _source(path: str, text: str) -> str:
    """Return a page that shows a source file; not searched, as it would drown the pages about it."""
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n``````{language}\n{text.rstrip()}\n``````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add README and the like, and a page for each source file that a page links to."""
    root = _root(config)
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / path)))
    for page in list(files.documentation_pages()):
        for target in targets(page.content_string):
            path, _ = resolved(target, path_of(page.src_uri)) or ("", "")
            uri = uri_of(path)
            # What does not exist is left to MkDocs to complain of.
            if uri.startswith("source/") and (root / path).is_file() and uri not in files.src_uris:
                text = (root / path).read_text(encoding="utf-8")
                files.append(File.generated(config, uri, content=_source(path, text)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to the site's pages instead of the tree's files."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def on_site(target: str) -> str:
        found = resolved(target, path_of(uri))
        if found is None or target.startswith("#"):
            return target
        path, anchor = found
        relative = posixpath.relpath(uri_of(path), posixpath.dirname(uri) or ".")
        return f"{relative}#{anchor}" if anchor else relative

    return rewritten(markdown, on_site)


def on_page_content(html: str, **_: Any) -> str:
    """Say of cells of tables how long they are, for the style sheet, and show commits by their first digits."""

    def kept(match: re.Match[str]) -> str:
        length = len(_TAG.sub("", match[2]))
        kind = "short" if length <= _SHORT else "long" if length > _LONG else "middling"
        text = _COMMIT.sub(r'<span title="\g<0>">\1</span>', match[2])
        return f'<td{match[1]} class="{kind}">{text}</td>'

    return _CELL.sub(kept, html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Complain of anything that would be fetched from elsewhere; links may lead there."""
    for tag in _FETCHED.findall(output):
        _log.warning("%s would fetch %s", page.file.src_uri, tag)
    return output
