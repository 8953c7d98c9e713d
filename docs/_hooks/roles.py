r"""Docstrings for the site: roles of reStructuredText become links and mathematics that need no script.

The package writes :math:`V^T \Delta V` and :class:`NystromGGN`, as its neighbours do.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Function, NameResolutionError, Object

_MATH = re.compile(r":math:`([^`]+)`")
_NAME = re.compile(r":(?:class|func|meth|data|attr|mod):`([^`]+)`")
_PAGE = re.compile(r"\bdocs/(\w+)\.md\b")
_COMMANDS = {
    **dict(
        zip(
            ["alpha", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "phi", "psi"], "αδεθλμρσφψ"
        )
    ),
    "log": "log",
    "sinh": "sinh",
    "int": "∫",
    "cdot": "·",
    "approx": "≈",
    "mid": "|",
    **dict(zip(["Delta", "Lambda", "Phi", "sum", "sim", "mapsto", "langle", "rangle", "pm"], "ΔΛΦΣ~↦⟨⟩±")),
}


def html(tex: str) -> str:
    r"""Return the little TeX that docstrings use as HTML: "V^T" has a raised T, "\Delta" is a letter.

    Raises
    ------
    ValueError
        On what is not known here.
    """
    found = re.sub(r"\\(?:operatorname|mathrm|text){(\w+)}", r"\1", tex).replace(r"\,", " ")
    found = re.sub(r"\\sqrt{([^}]*)}", r"√(\1)", found)
    found = re.sub(r"\\([a-zA-Z]+)", lambda m: _COMMANDS.get(m[1], m[0]), found)
    for mark, tag in (("^", "sup"), ("_", "sub")):
        found = re.sub(rf"\{mark}(?:{{([^}}]*)}}|(.))", rf"<{tag}>\1\2</{tag}>", found)
    found = found.replace("*", "&#42;")  # not Markdown's
    if re.search(r"[\\{}]", found):
        raise ValueError(
            f"docs/_hooks/roles.py knows too little TeX for {tex!r}: add the command to _COMMANDS."
        )
    return f'<span class="maths">{found}</span>'


def _link(name: str, where: Object) -> str:
    """Return a link to what a docstring names, wherever the site shows it, or else its name."""
    owner = where.parent if isinstance(where, Function) and where.parent is not None else where
    try:
        identifier = owner.resolve(name) if "." not in name else name
    except NameResolutionError:
        identifier = f"laplace_ella.ELLALaplace.{name}"  # of which the mixins are a part
    shown = name.removeprefix("laplace_ella.")
    return f'<autoref optional identifier="{identifier}"><code>{shown}</code></autoref>'


class Roles(Extension):
    """Rewrites each docstring once all names are known."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        text = _MATH.sub(lambda m: html(m[1]), obj.docstring.value)
        text = _NAME.sub(lambda m: _link(m[1], obj), text)
        obj.docstring.value = _PAGE.sub(r"[\1](\1.md)", text)  # checked by MkDocs, as any link
