"""Sphinx extension of this book.

It keeps every page on its own origin, gives figures that come out of a notebook the alternative
text which the notebook stored with them, writes version and date into the footer, and mends what
the theme and the libraries write that a screen reader stumbles over.
"""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from sphinx.application import Sphinx

import rooflm

LICENCES = (
    'Text and figures: <a href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>. '
    'Code: <a href="https://www.apache.org/licenses/LICENSE-2.0">Apache-2.0</a>.'
)

# What axe objects to in the pages as the theme, bibtex and pandas write them, and the remedy.
REPAIRS = [
    # A name that differs from the text on the button; the text will do.
    (
        r'(<button class="btn search-button-field[^>]*?)\s+title="Search"\s+aria-label="Search"',
        r"\1",
    ),
    (r'<i class="(theme-switch [^>]*?)\s*title="[^"]*">', r'<i aria-hidden="true" class="\1>'),
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # A sidebar that is no landmark.
    (r'(<div id="pst-primary-sidebar")', r'\1 role="navigation" aria-label="Book"'),
    # A list whose entries have a role that is deprecated.
    (r'role="doc-biblioentry"', 'role="listitem"'),
    # A header without text above the index of a table.
    (r'<th((?: class="[^"]*")?) *>(?:<p></p>|&nbsp;|\s)*</th>', r"<td\1></td>"),
]


def keep_to_own_origin(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Drop thebe, which starts kernels elsewhere, and any script or style of another origin."""

    def own(asset: Any) -> bool:
        name = str(getattr(asset, "filename", None) or "")
        body = str(getattr(asset, "attributes", {}).get("body") or "")
        elsewhere = name.startswith(("http:", "https:", "//"))
        return not elsewhere and "thebe" not in name and "thebe" not in body.lower()

    for kind in ("script_files", "css_files"):
        context[kind] = [asset for asset in context.get(kind, []) if own(asset)]
    context["theme_extra_footer"] = app.config.rooflm_footer


def drop_thebe_config(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Drop the thebe configuration that sphinx-thebe puts into every page."""
    for node in list(doctree.findall(nodes.raw)):
        if "thebe" in node.astext():
            node.parent.remove(node)


def use_stored_alt_text() -> None:
    """Make myst-nb read alt text from the output: `metadata={"image/png": {"alt": ...}}`."""
    render = NbElementRenderer.render_image

    def render_image(self: NbElementRenderer, data: Any) -> list[nodes.Element]:
        images = render(self, data)
        if alt := data.output_metadata.get(data.mime_type, {}).get("alt"):
            for image in images:
                image["alt"] = alt
        return images

    NbElementRenderer.render_image = render_image  # type: ignore[method-assign]


def repair(app: Sphinx, failure: Exception | None) -> None:
    """Apply the repairs to every page."""
    if failure or app.builder.format != "html":
        return
    for path in Path(app.outdir).rglob("*.html"):
        page = before = path.read_text(encoding="utf-8")
        for pattern, replacement in REPAIRS:
            page = re.sub(pattern, replacement, page)
        if page != before:
            path.write_text(page, encoding="utf-8")


def write_footer(app: Sphinx, config: Any) -> None:
    """Compose the footer: version, date of the last commit, licences."""
    config.html_context.setdefault("default_mode", "auto")
    config.rooflm_footer = f"<p>Version {rooflm.__version__}{last_change(app)}. {LICENCES}</p>"


def last_change(app: Sphinx) -> str:
    """Return the date of SOURCE_DATE_EPOCH or of the last commit, or nothing without either."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        command = ["git", "log", "-1", "--format=%ct"]
        try:
            result = subprocess.run(command, cwd=app.srcdir, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        seconds = result.stdout.strip()
    return time.strftime(", %Y-%m-%d", time.gmtime(int(seconds))) if seconds else ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    use_stored_alt_text()
    app.add_config_value("rooflm_footer", "", "html")
    app.connect("config-inited", write_footer)
    app.connect("doctree-resolved", drop_thebe_config, priority=900)
    app.connect("html-page-context", keep_to_own_origin, priority=900)
    app.connect("build-finished", repair)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
