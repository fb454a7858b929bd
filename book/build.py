"""Run the book's notebooks and render its pages.

    python book/build.py book               run every notebook afresh, then render
    python book/build.py preview            render the outputs that are stored in the notebooks
    python book/build.py execute [NAME ...] run notebooks in place and store their outputs
    python book/build.py compare            run every notebook and compare with its stored outputs

Nothing is cached between builds: a cell that fails, fails every time. `book` skips all work only
when a stamp over everything the pages depend on matches the last successful build.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
BUILD = BOOK / "_build"
STAMP = BUILD / "built.json"
WORKERS = 2
CELL_TIMEOUT = 120  # seconds
SKIPPED = {"_build", "__pycache__", ".ipynb_checkpoints"}
# A cell with one of these tags is left out of the comparison of outputs.
EXCUSES = {"timing", "widget", "float"}
IGNORE = "nbval-ignore-output"
# JupyterLab folds a solution by this, as the page does by its tag.
SOLUTION = "hide-cell"
FOLDED = {"source_hidden": True, "outputs_hidden": True}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


# --- what the commands do ---------------------------------------------------------------------


def book() -> int:
    """Run all notebooks in a copy of the book, and render the copy."""
    page = BUILD / "html" / "index.html"
    digest = inputs_digest()
    if page.exists() and STAMP.exists() and json.loads(STAMP.read_text())["inputs"] == digest:
        print(f"The book is up to date: {page.as_uri()}")
        return 0
    begin = time.monotonic()
    source = BUILD / "src"
    for stale in (source, BUILD / "html", BUILD / ".doctrees", BUILD / ".jupyter_cache"):
        shutil.rmtree(stale, ignore_errors=True)
    STAMP.unlink(missing_ok=True)
    copy_sources(source)

    paths = notebooks(source)
    print(f"[1/2] Running {len(paths)} notebooks, {WORKERS} at a time", flush=True)
    if failed := run_all(paths, lambda path: write(path, run(read(path), path))):
        return verdict(f"make book: FAILED while running {', '.join(failed)}")

    print("[2/2] Rendering the pages", flush=True)
    start = time.monotonic()
    if render(source, BOOK, "--all", "-W", "--keep-going", "-n"):
        return verdict("make book: FAILED while rendering; the warnings above are errors")
    print(f"      {time.monotonic() - start:.1f} s")
    if inputs_digest() == digest:  # else somebody wrote in the sources meanwhile
        STAMP.write_text(json.dumps({"inputs": digest}) + "\n")
    print(f"The book is built ({time.monotonic() - begin:.0f} s): {page.as_uri()}")
    return 0


def preview() -> int:
    """Render the outputs stored in the notebooks, re-rendering only pages that changed."""
    begin = time.monotonic()
    source = BUILD / "preview" / "src"
    copy_sources(source)
    if render(source, source.parent):
        return verdict("make preview: FAILED")
    page = source.parent / "_build" / "html" / "index.html"
    print(f"Preview with the stored outputs ({time.monotonic() - begin:.0f} s): {page.as_uri()}")
    return 0


def execute(names: list[str]) -> int:
    """Run notebooks in place; rewrite those whose code, compared outputs or explorers changed."""
    begin = time.monotonic()
    paths = notebooks(BOOK)
    if unknown := [name for name in names if name not in {path.stem for path in paths}]:
        known = ", ".join(path.stem for path in paths) or "none yet"
        return verdict(f"There is no chapter {', '.join(unknown)}; there are: {known}")
    paths = [path for path in paths if not names or path.stem in names]
    written = []

    def refresh(path: Path) -> None:
        before = read(path)
        after = run(normalise(deepcopy(before)), path)
        after.metadata["rooflm"] = {"code": code_digest(after)}
        # markdown and metadata of `before` count too: normalising may have changed them
        unchanged = normalise(deepcopy(before)) == before and compared(before) == compared(after)
        unchanged = unchanged and explorers(before) == explorers(after)
        if not (unchanged and before.metadata.get("rooflm") == after.metadata["rooflm"]):
            write(path, after)
            written.append(path.stem)

    failed = run_all(paths, refresh)
    print(f"Rewritten: {', '.join(sorted(written)) or 'none'} ({time.monotonic() - begin:.0f} s)")
    return verdict(f"make execute: FAILED in {', '.join(failed)}") if failed else 0


def compare() -> int:
    """Run every notebook, two at a time, and compare with the outputs stored in it (nbval)."""
    paths = notebooks(BOOK)
    if not paths:
        print("There are no notebooks yet")
        return 0
    options = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    spread = ["-q", "-n", str(WORKERS), "--dist", "loadfile", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *spread, *map(str, paths)]
    return subprocess.call(command, cwd=ROOT)


# --- running notebooks ------------------------------------------------------------------------


class NotebookFault(Exception):
    """A cell failed, ran too long, or wrote on standard error."""


def run(notebook: NotebookNode, path: Path) -> NotebookNode:
    """Run a notebook in a fresh kernel, in the folder it lies in; return it with its outputs."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute(stderr=subprocess.DEVNULL)  # the kernel's own; cells' goes to the notebook
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as fault:
        plain = re.sub(r"\x1b\[[\d;]*m", "", str(fault))  # without the terminal's colours
        raise NotebookFault(f"{path.name}: {plain}") from None
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise NotebookFault(f"{path.name}, cell {number}, standard error: {output.text}")
    return normalise(notebook)


def run_all(paths: list[Path], job: Callable[[Path], None]) -> list[str]:
    """Run a job on each notebook, two at a time; return the names of those that failed."""

    def timed(path: Path) -> float:
        start = time.monotonic()
        job(path)
        return time.monotonic() - start

    failed = []
    pool = ThreadPoolExecutor(WORKERS)
    tasks = {pool.submit(timed, path): path.stem for path in paths}
    for task in as_completed(tasks):
        try:
            print(f"      {tasks[task]}: {task.result():.1f} s", flush=True)
        except Exception as fault:
            failed.append(tasks[task])
            print(f"      {tasks[task]}: FAILED", flush=True)
            print(fault if isinstance(fault, NotebookFault) else repr(fault), file=sys.stderr)
    return sorted(failed)


def kernel_environment(scratch: str) -> dict[str, str]:
    """Make the kernels alike on every machine, whatever the user's own settings are."""
    return {
        "IPYTHONDIR": scratch,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads_each())),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else debugpy may warn on standard error
        "PYTHONHASHSEED": "0",
    }


def threads_each() -> int:
    """Threads of torch for a notebook; more than there are cores, and they wait for each other."""
    return max(1, (os.cpu_count() or 1) // WORKERS)


# --- notebooks as files -----------------------------------------------------------------------


def notebooks(folder: Path) -> list[Path]:
    """List the notebooks below a folder of sources."""
    return [path for path in files(folder) if path.suffix == ".ipynb"]


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def write(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook at once or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    os.replace(partial, path)


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Leave in a notebook only what does not differ from run to run and machine to machine."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    kept = {"rooflm": notebook.metadata["rooflm"]} if "rooflm" in notebook.metadata else {}
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
            **kept,
        }
    )
    count = 0
    identities: set[str] = set()
    for cell in notebook.cells:
        cell["id"] = stable_id(cell, identities)
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code":
            count += 1
            normalise_outputs(cell, count)
            tags = tags | {IGNORE} if tags & EXCUSES else tags - {IGNORE}
        kept = {"mystnb": cell.metadata["mystnb"]} if "mystnb" in cell.metadata else {}
        if cell.cell_type == "code" and SOLUTION in tags:
            kept["jupyter"] = dict(FOLDED)
        if tags:
            kept["tags"] = sorted(tags)
        cell.metadata = nbformat.from_dict(kept)
    return notebook


def normalise_outputs(cell: NotebookNode, count: int) -> None:
    """Number a code cell and its outputs; drop the ids of widgets that lived in the kernel."""
    if cell.execution_count is not None:
        cell.execution_count = count
    for output in cell.outputs:
        if "execution_count" in output:
            output.execution_count = count
        data = output.get("data", {})
        if "text/html" in data:  # the page's form of an explorer; the widget dies with the kernel
            data.pop(WIDGET_VIEW, None)


def stable_id(cell: NotebookNode, taken: set[str]) -> str:
    """Keep a cell's id, or derive one from its text where it is missing or taken."""
    identity = cell.get("id", "")
    salt = 0
    while not identity or identity in taken:
        identity = hashlib.sha256(f"{salt}{cell.source}".encode()).hexdigest()[:8]
        salt += 1
    taken.add(identity)
    return identity


def code_digest(notebook: NotebookNode) -> str:
    """Hash the code, so that a test can tell whether the stored outputs are of this code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def compared(notebook: NotebookNode) -> list[object]:
    """List the outputs that nbval compares: text, not images, of the cells not excused."""
    result: list[object] = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or IGNORE in cell.metadata.get("tags", []):
            continue
        streams: dict[str, str] = {}
        for output in cell.outputs:
            if output.output_type == "stream":
                streams[output.name] = streams.get(output.name, "") + output.text
            else:
                data = output.get("data", {})
                result.append({mime: compared_data(mime, data[mime]) for mime in data})
        result.append(streams)
    return result


def explorers(notebook: NotebookNode) -> list[str]:
    """List the pages of the explorers, which nbval is excused from and a reader sees."""
    return [
        "".join(output.get("data", {}).get("text/html", ""))
        for cell in notebook.cells
        if cell.cell_type == "code" and "widget" in cell.metadata.get("tags", [])
        for output in cell.outputs
    ]


def compared_data(mime: str, content: object) -> object:
    """Reduce what nbval does not compare to the fact that it is there."""
    skipped = mime.startswith("image/") or mime in ("text/latex", WIDGET_VIEW)
    return None if skipped else content


# --- the book's files and its renderer --------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """List the files below a folder, without what builds and caches leave."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        found += [Path(parent, name) for name in sorted(names) if not name.endswith(".partial")]
    return found


def inputs_digest() -> str:
    """Hash all that the pages depend on."""
    total = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    inputs: Iterable[Path] = (
        ROOT / "requirements.txt",
        ROOT / "pyproject.toml",
        *files(ROOT / "lib"),
        *files(ROOT / "data"),
        *files(BOOK),
    )
    for path in inputs:
        total.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def copy_sources(target: Path) -> None:
    """Make a folder equal to book/, and leave files that are equal already as they are."""
    wanted = {path.relative_to(BOOK) for path in files(BOOK)}
    for path in files(target) if target.exists() else []:
        if path.relative_to(target) not in wanted:
            path.unlink()
    for relative in wanted:
        source, copy = BOOK / relative, target / relative
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def render(source: Path, output: Path, *options: str) -> int:
    """Render with Jupyter Book, notebooks as they are; show what it says only when it fails."""
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(source)]
    command += ["--path-output", str(output), *options]
    plain = {**os.environ, "NO_COLOR": "1"}
    result = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
    said = result.stderr.strip()
    if result.returncode and not said:
        said = result.stdout[-4000:]
    if said:
        print(said.replace(str(source), str(BOOK)))
    return result.returncode


def verdict(line: str) -> int:
    """Print why a command failed, as its last line, and return its exit status."""
    print(line, flush=True)
    return 1


def main() -> int:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["book", "preview", "execute", "compare"])
    parser.add_argument("chapters", nargs="*", help="names of notebooks, for execute")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(kernel_environment(scratch))
        commands = {"book": book, "preview": preview, "compare": compare}
        if arguments.command == "execute":
            return execute(arguments.chapters)
        return commands[arguments.command]()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nInterrupted.", flush=True)
        os._exit(130)  # at once: kernels end with the process that started them
