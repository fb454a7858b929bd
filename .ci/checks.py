"""Run the checks of `make test` one after another and give one verdict at the end.

All of them run, also after a failure. `make test` runs the first list; `make test-other` compares
the notebooks once more as another processor would compute them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTHON = sys.executable
CODE = [name for name in ("lib", "tests", "benchmarks", "book", ".ci") if (ROOT / name).exists()]

CHECKS = {
    "ruff check": [BIN / "ruff", "check", "--output-format=concise", *CODE],
    "ruff format": [BIN / "ruff", "format", "--check", "--output-format=concise", *CODE],
    "mypy": [BIN / "mypy"],
    "import-linter": [BIN / "lint-imports", "--no-logo"],
    "codespell": [BIN / "codespell"],
    "pytest": [PYTHON, "-m", "pytest", "-q", "--tb=short", "-n", "2"],
    "notebooks": [PYTHON, "book/build.py", "compare"],
}
LINT = [name for name in CHECKS if name not in ("pytest", "notebooks")]
# Two workers on the threads of all cores would wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}


def main(target: str) -> int:
    """Run the checks of one target: test, lint or test-other."""
    names = {"test": list(CHECKS), "lint": LINT, "test-other": ["notebooks"]}[target]
    variables = OTHER_PROCESSOR if target == "test-other" else {}
    begin = time.monotonic()
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        start = time.monotonic()
        own = {**(ONE_THREAD if name == "pytest" else {}), **variables}
        code = subprocess.call(CHECKS[name], cwd=ROOT, env={**os.environ, **own})
        if code:
            failed.append(name)
        verdict = "FAILED" if code else "ok"
        print(f"[{number}/{len(names)}] {name}: {verdict}, {time.monotonic() - start:.1f} s\n")
    seconds = time.monotonic() - begin
    if failed:
        print(f"make {target}: FAILED in {', '.join(failed)} ({seconds:.0f} s)")
        return 1
    left_out = "" if target != "test" else "; `make pages` checks the built book in a browser"
    print(f"make {target}: all {len(names)} checks passed ({seconds:.0f} s){left_out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except KeyboardInterrupt:
        print("\nInterrupted.")
        sys.exit(130)
