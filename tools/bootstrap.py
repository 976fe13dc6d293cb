"""Makes the virtual environment that every make target runs in, from nothing but a Python.

Standard library only, and nothing that Python 3.7 cannot parse, so that an old interpreter gives
the version message below instead of a traceback. Shows what pip is at, keeps pip's full output in
a log, and writes the stamp file last: an interrupted run goes on where pip left off.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import re
import subprocess
import sys
import threading
import time
from typing import IO, Iterable, Sequence  # noqa: UP035 (the version message must appear on old Pythons too)

MIN_PYTHON = (3, 11)
LOG_TAIL_LINES = 25
PROGRESS = re.compile(
    r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)|Processing \S*/(\w+)-\d"
)
INSTALLING = "Installing collected packages"
COUNT_PERIOD_S = 5.0


def why_not_python(version: Sequence[int], executable: str) -> str:
    """The reason why this interpreter cannot be used, or an empty string."""
    if tuple(version[:2]) >= MIN_PYTHON:
        return ""
    needed = ".".join(map(str, MIN_PYTHON))
    return (
        f"Penstock needs Python {needed} or newer; {executable} is {version[0]}.{version[1]}.\n"
        "Point make at another interpreter: make setup PYTHON=python3.12"
    )


def pinned_names(lock_path: str) -> set[str]:
    """Names of the packages in a lock file."""
    with open(lock_path, encoding="utf-8") as lock:
        return {line.split("==")[0] for line in lock if "==" in line and line[0] != "#"}


def show(text: str) -> None:
    """A moving line on a terminal; a plain line elsewhere, so that logs stay readable."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K" + text[:100])
    else:
        sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def follow(lines: Iterable[str], log: IO[str], names: set[str]) -> None:
    """Copy pip's output to the log, showing which of `names` it is at; ends where it installs."""
    seen: set[str] = set()
    for line in lines:
        log.write(line)
        match = PROGRESS.match(line)
        name = (match.group(1) or match.group(2)).lower().replace("_", "-") if match else ""
        if name in names - seen:
            seen.add(name)
            show(f"  found {len(seen)}/{len(names)} {name}")
        elif line.startswith(INSTALLING):
            return


def count_installed(venv: str, total: int, done: threading.Event) -> None:
    """Show how far pip is while it unpacks, which it does without a word."""
    while not done.wait(COUNT_PERIOD_S):
        folders = glob.glob(os.path.join(venv, "lib", "python*", "site-packages", "*.dist-info"))
        show(f"  installed {min(len(folders), total)}/{total}")


def run_pip(venv: str, arguments: Sequence[str], log: IO[str], names: set[str]) -> int:
    """Run `pip install` once and return its exit status."""
    python = os.path.join(venv, "bin", "python")
    process = subprocess.Popen(
        [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", DS_BUILD_OPS="0"),
        universal_newlines=True,
    )
    output = process.stdout or io.StringIO()
    follow(output, log, names)
    done = threading.Event()
    counter = threading.Thread(target=count_installed, args=(venv, len(names), done), daemon=True)
    if names:
        counter.start()
    log.write(output.read())
    done.set()
    return process.wait()


def make_venv(path: str) -> None:
    """Create the environment unless a working one is there."""
    python = os.path.join(path, "bin", "python")
    probe = [python, "-m", "pip", "--version"]
    if os.path.exists(python) and subprocess.call(probe, stdout=subprocess.DEVNULL) == 0:
        return
    show(f"[1/3] creating {path}\n")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", path]) != 0:
        sys.exit(
            f"Could not create a virtual environment with {sys.executable}. On Debian and Ubuntu "
            "the module is a package of its own: install python3-venv."
        )


def install(venv: str, lock_path: str, log_path: str) -> None:
    """Install the pinned packages, then this checkout itself, editable."""
    names = pinned_names(lock_path)
    with open(log_path, "w", encoding="utf-8") as log:
        show(f"[2/3] installing {len(names)} pinned packages (minutes the first time)\n")
        status = run_pip(venv, ["-r", lock_path], log, names)
        if status == 0:
            show("[3/3] installing penstock itself, editable\n")
            status = run_pip(venv, ["--no-deps", "--no-build-isolation", "-e", "."], log, set())
    if status != 0:
        with open(log_path, encoding="utf-8") as log:
            tail = log.readlines()[-LOG_TAIL_LINES:]
        sys.exit("\n" + "".join(tail) + f"\npip failed; its whole output is in {log_path}")


def main() -> None:
    """Entry point of `make setup`."""
    parser = argparse.ArgumentParser(description="Create the environment of all make targets.")
    parser.add_argument("--venv", required=True)
    parser.add_argument("--lock", required=True)
    parser.add_argument("--stamp", required=True, help="file written when all went well")
    options = parser.parse_args()
    reason = why_not_python(sys.version_info[:2], sys.executable)
    if reason:
        sys.exit(reason)
    start = time.time()
    make_venv(options.venv)
    install(options.venv, options.lock, os.path.join(options.venv, "install.log"))
    with open(options.stamp, "w", encoding="utf-8"):
        show(f"ready in {time.time() - start:.0f} s\n")


if __name__ == "__main__":
    main()
