"""What a notebook of the book has to keep beside its outputs, which nbval compares.

nbval passes whatever has no stored output and never looks at images; these rules close that gap.
Tags that excuse a cell from the comparison: timing (it measures), widget (it holds an explorer),
float (training or long sums, which move with the processor). `make execute` adds the tag
nbval-ignore-output to such cells and stores the digest of the code that was run.
"""

import hashlib
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

BOOK = Path(__file__).resolve().parent.parent / "book"
NOTEBOOKS = sorted(
    path
    for path in BOOK.rglob("*.ipynb")
    if not {"_build", ".ipynb_checkpoints"} & set(path.relative_to(BOOK).parts)
)
EXCUSES = {"timing", "widget", "float"}
IGNORE = "nbval-ignore-output"
FOLDED = {"source_hidden": True, "outputs_hidden": True}
REGION = re.compile(r'role="region" aria-label="([^"]+)"')
RULES = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    """Read a notebook; return it and its code cells, each with a name for messages."""
    notebook = nbformat.read(path, as_version=4)
    name = path.relative_to(BOOK.parent).as_posix()
    cells = [
        (f"{name}, cell {number}", cell)
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    ]
    return notebook, cells


def tags(cell):
    return set(cell.metadata.get("tags", []))


def faults(cells, is_fault, message):
    """Say of which cells the fault is true."""
    return [f"{where}: {message}" for where, cell in cells if is_fault(cell)]


@RULES
def test_stored_outputs_are_of_the_present_code(path):
    notebook, cells = read(path)
    code = "\0".join(cell.source for _, cell in cells)
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    stored = notebook.metadata.get("rooflm", {}).get("code")
    assert stored == digest, (
        f"{path.name}: its code was not run as it stands; make execute CHAPTER={path.stem}"
    )


@RULES
def test_every_code_cell_has_been_run_in_order(path):
    _, cells = read(path)
    counts = [cell.execution_count for _, cell in cells]
    assert counts == list(range(1, len(cells) + 1)), (
        f"{path.name}: execution counts are {counts}; make execute CHAPTER={path.stem}"
    )


@RULES
def test_every_excused_cell_says_why(path):
    _, cells = read(path)
    wrong = faults(
        cells,
        lambda cell: (
            (IGNORE in tags(cell)) != bool(EXCUSES & tags(cell)) or "NBVAL" in cell.source.upper()
        ),
        f"{IGNORE} goes with one of {sorted(EXCUSES)}, and they with it (make execute adds it)",
    )
    other = faults(
        cells,
        lambda cell: {tag for tag in tags(cell) if tag.startswith("nbval")} - {IGNORE},
        f"of nbval's tags only {IGNORE} is allowed",
    )
    assert not wrong + other


@RULES
def test_at_most_a_third_of_the_outputs_is_excused(path):
    _, cells = read(path)
    with_output = [cell for _, cell in cells if cell.outputs]
    excused = [cell for cell in with_output if EXCUSES & tags(cell)]
    assert 3 * len(excused) <= len(with_output), (
        f"{path.name}: {len(excused)} of {len(with_output)} cells with output are not compared"
    )


@RULES
def test_every_float_cell_checks_its_numbers(path):
    _, cells = read(path)
    assert not faults(
        cells,
        lambda cell: "float" in tags(cell) and not re.search(r"\bcheck\(", cell.source),
        "a cell tagged float calls check(...)",
    )


@RULES
def test_every_solution_is_folded_in_jupyterlab_too(path):
    _, cells = read(path)
    assert not faults(
        cells,
        lambda cell: (
            cell.metadata.get("jupyter") != (FOLDED if "hide-cell" in tags(cell) else None)
        ),
        "a cell tagged hide-cell, and no other, is folded (make execute does it)",
    )


@RULES
def test_no_output_is_an_error_or_a_warning(path):
    _, cells = read(path)
    assert not faults(
        cells,
        lambda cell: any(
            output.output_type == "error" or output.get("name") == "stderr"
            for output in cell.outputs
        ),
        "an error, or something on standard error, is stored",
    )


@RULES
def test_every_explorer_has_a_stored_page(path):
    """A cell with an explorer is not compared, so nothing else would miss its output."""
    _, cells = read(path)
    tagged = [(where, cell) for where, cell in cells if "widget" in cell.metadata.get("tags", [])]
    assert not faults(
        tagged,
        lambda cell: not any("text/html" in output.get("data", {}) for output in cell.outputs),
        "no page of the explorer is stored",
    )


@RULES
def test_no_column_heading_is_empty(path):
    _, cells = read(path)
    assert not faults(
        cells,
        lambda cell: any(
            re.search(r"<th[^>]*>\s*</th>", output.get("data", {}).get("text/html", ""))
            for output in cell.outputs
        ),
        "a column heading without a word, which a screen reader can't announce",
    )


@RULES
def test_no_two_tables_have_one_name(path):
    """A screen reader lists the regions of a page by their names."""
    _, cells = read(path)
    stored = [o.get("data", {}).get("text/html", "") for _, c in cells for o in c.outputs]
    names = [name for page in stored for name in REGION.findall(page)]
    assert not {name for name in names if names.count(name) > 1}


@RULES
def test_cells_are_small(path):
    _, cells = read(path)
    lengths = [len(cell.source.splitlines()) for _, cell in cells]
    assert not faults(cells, lambda cell: len(cell.source.splitlines()) > 25, "over 25 lines")
    assert statistics.median(lengths) < 8, f"{path.name}: the median cell has 8 lines or more"
    assert 15 <= len(cells) <= 30, f"{path.name}: {len(cells)} code cells, not 15 to 30"


@RULES
def test_every_figure_has_alternative_text(path):
    _, cells = read(path)
    wrong = []
    for where, cell in cells:
        for output in cell.outputs:
            for mime in output.get("data", {}):
                alt = output.metadata.get(mime, {}).get("alt", "")
                if mime.startswith("image/") and len(alt) < 20:
                    wrong.append(f"{where}: {mime} with the alternative text {alt!r}")
    assert not wrong


@RULES
def test_directives_are_colon_fences(path):
    notebook, _ = read(path)
    wrong = [
        f"{path.name}, cell {number}: ```{{...}} does not read well in Colab; use :::{{...}}"
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown" and re.search(r"^\s*[`~]{3,}\{", cell.source, re.MULTILINE)
    ]
    assert not wrong


@RULES
def test_a_notebook_is_no_burden(path):
    assert path.stat().st_size < 1.5e6, f"{path.name}: {path.stat().st_size} bytes"


@RULES
def test_spelling(path):
    if shutil.which("codespell", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("codespell is not installed")
    notebook, _ = read(path)
    text = "\n".join(cell.source for cell in notebook.cells)
    command = [Path(sys.executable).with_name("codespell"), "-"]
    result = subprocess.run(command, cwd=BOOK.parent, input=text, capture_output=True, text=True)
    assert result.returncode == 0, f"{path.name}:\n{result.stdout}"
