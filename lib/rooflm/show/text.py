"""Sentences and equations that come out of code."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shown:
    """An object of one rich form beside its plain text."""

    mime: str
    rich: str
    plain: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {self.mime: self.rich, "text/plain": self.plain}

    def __repr__(self) -> str:
        return self.plain


def takeaway(text: str) -> Shown:
    """A box with the one sentence to keep: conditional, and with a number.

    >>> takeaway("Below 202 FLOP/B, memory sets the speed.")
    Takeaway: Below 202 FLOP/B, memory sets the speed.
    """
    text = " ".join(text.split())
    rich = (
        '<div class="admonition takeaway" role="note">'
        '<p class="admonition-title takeaway-title">Takeaway</p>'
        f"<p>{html.escape(text)}</p></div>"
    )
    return Shown("text/html", rich, f"Takeaway: {text}")


def say(text: str) -> Shown:
    """A paragraph of Markdown whose numbers come from code.

    >>> say("The ridge point is **201.6** FLOP/B.")
    The ridge point is **201.6** FLOP/B.
    """
    return Shown("text/markdown", text, text)


def equation(lhs: Any, expr: Any) -> Shown:
    """Display maths: lhs = expr, printed as they stand; nothing is simplified.

    Parameters
    ----------
    lhs : LaTeX, or a SymPy expression.
    expr : a SymPy expression, or LaTeX.
    """
    rich = f"$${_latex(lhs)} = {_latex(expr)}$$"
    return Shown("text/latex", rich, f"{lhs} = {expr}")


def _latex(x: Any) -> str:
    if isinstance(x, str):
        return x
    import sympy  # here, so that figures and tables do without it

    return str(sympy.latex(x))
