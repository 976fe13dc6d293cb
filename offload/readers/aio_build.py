"""Builds DeepSpeed's asynchronous I/O ahead of time: `make ops`, or `python -m` this module.

Sources are those of the installed deepspeed package; nothing of it is imported. Its own build, just
in time, takes minutes inside the process that wants to serve, and one that is killed leaves a lock
on which all later ones wait for ever. Here the files that include torch, which takes a compiler
twenty seconds each time, are compiled as one; the result has the versions in its name, appears by
rename, and is shared by every environment of the same versions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.base.env import default_cache_dir
from offload.readers.direct import build_direct
from offload.readers.engine import ReaderUnavailableError
from replicas.kernels.build import (
    COMPILE_TIMEOUT_S,
    KernelsUnavailableError,
    find_compiler,
)

MODULES = {
    "pin_memory_op": ("pin_memory",),
    "async_io_op": ("aio/common", "aio/py_lib"),
}
"""Extension module -> folders of its sources. The second finds the first's symbols when loaded."""
# Not optimised: it is the disk that takes the time, and the compiler otherwise.
_FLAGS = (
    "-O0",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-w",
    "-DTORCH_API_INCLUDE_EXTENSION_H",
)
_TORCH_LIBRARIES = ("-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python")
_TORCH_HEADER = "torch/extension.h"


def ops_directory(cache_dir: Path) -> Path:
    """Where the build for this interpreter, torch and deepspeed lies.

    Raises:
        ReaderUnavailableError: deepspeed is not installed.
    """
    try:
        versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    except importlib.metadata.PackageNotFoundError as error:
        raise ReaderUnavailableError(f"there is no {error.name} here") from error
    parts = [*versions, sys.implementation.cache_tag, platform.machine(), *_FLAGS]
    return cache_dir / "ops" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def find_ops(cache_dir: Path) -> dict[str, Path]:
    """The built modules by name, loadable in this order; never builds.

    Raises:
        ReaderUnavailableError: they have not been built.
    """
    folder = ops_directory(cache_dir)
    modules = {name: folder / f"{name}.so" for name in MODULES}
    if not all(path.exists() for path in modules.values()):
        raise ReaderUnavailableError("DeepSpeed's asynchronous I/O is not built; run `make ops`")
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise ReaderUnavailableError(f"{folder} can be written by others")
    return modules


def build_ops(cache_dir: Path) -> dict[str, Path]:
    """Compile both modules unless that was done before.

    Raises:
        ReaderUnavailableError: no compiler, no libaio, no deepspeed; or the compiler failed.
    """
    try:
        return find_ops(cache_dir)
    except ReaderUnavailableError:
        target = ops_directory(cache_dir)
    sources, torch_root = _package("deepspeed") / "ops" / "csrc", _package("torch")
    try:
        compiler = find_compiler()
    except KernelsUnavailableError as error:
        raise ReaderUnavailableError(str(error)) from error
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as name:
        folder = Path(name)
        includes = [*_copy_sources(sources, folder), torch_root / "include"]
        includes.append(torch_root / "include/torch/csrc/api/include")
        includes.append(Path(sysconfig.get_paths()["include"]))
        command = [compiler, *_FLAGS, *(f"-I{path}" for path in includes)]
        _check_libaio(compiler, folder)
        _compile_all(command, folder)
        _link(compiler, folder, torch_root / "lib")
        finished = folder / "finished"
        finished.mkdir(mode=0o700)
        for module in MODULES:
            (folder / f"{module}.so").rename(finished / f"{module}.so")
        shutil.rmtree(target, ignore_errors=True)
        finished.rename(target)
    return find_ops(cache_dir)


def _copy_sources(sources: Path, folder: Path) -> list[Path]:
    """Copies whose headers may be included twice, as they are when files become one."""
    copies = []
    for part in ("aio/common", "aio/py_lib", "pin_memory"):
        copy = folder / part
        copy.mkdir(parents=True)
        for file in (sources / part).iterdir():
            if file.suffix in (".cpp", ".h"):
                once = "#pragma once\n" if file.suffix == ".h" else ""
                (copy / file.name).write_text(once + file.read_text())
        copies.append(copy)
    return copies


def _compile_all(command: Sequence[str], folder: Path) -> None:
    """The modules side by side."""
    with ThreadPoolExecutor(max_workers=len(MODULES)) as pool:
        jobs = [
            pool.submit(_compile, [*command, f"-DTORCH_EXTENSION_NAME={module}"], folder, module)
            for module in MODULES
        ]
        for job in jobs:
            job.result()


def _compile(command: Sequence[str], folder: Path, module: str) -> None:
    for part in MODULES[module]:
        files = sorted((folder / part).glob("*.cpp"))
        if any(_TORCH_HEADER in path.read_text() for path in (folder / part).glob("*.h")):
            together = folder / f"{module}.cpp"
            together.write_text("".join(f'#include "{file}"\n' for file in files))
            files = [together]
        for file in files:
            output = folder / f"{module}.{file.stem}.o"
            _run([*command, "-c", str(file), "-o", str(output)])


def _link(compiler: str, folder: Path, torch_libraries: Path) -> None:
    for module in MODULES:
        objects = [str(path) for path in sorted(folder.glob(f"{module}.*.o"))]
        library = [f"-L{torch_libraries}", *_TORCH_LIBRARIES]
        extra = ["-laio", "-fopenmp"] if module == "async_io_op" else []
        _run(
            [
                compiler,
                "-shared",
                *objects,
                "-o",
                str(folder / f"{module}.so"),
                *library,
                *extra,
            ]
        )


def _check_libaio(compiler: str, folder: Path) -> None:
    probe = folder / "libaio.cpp"
    probe.write_text("#include <libaio.h>\nint main() { return io_setup(0, nullptr) != 0; }\n")
    try:
        _run([compiler, str(probe), "-o", str(folder / "libaio"), "-laio"])
    except ReaderUnavailableError as error:
        raise ReaderUnavailableError(
            "there are no headers of libaio; install libaio-dev (Debian) or libaio-devel"
        ) from error


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ReaderUnavailableError(f"there is no {name} here")
    return Path(spec.submodule_search_locations[0])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ReaderUnavailableError(f"{command[0]} does not come to an end ({error})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise ReaderUnavailableError(f"{command[0]} failed: {first}")


def main() -> int:
    """Build all readers and say what there is now."""
    cache_dir = default_cache_dir()
    built = {"direct": build_direct, "aio": build_ops}
    missing = 0
    for name, build in built.items():
        try:
            build(cache_dir / "kernels" if name == "direct" else cache_dir)
            print(f"{name}: built")  # noqa: T201 - a command's answer
        except ReaderUnavailableError as error:
            missing += 1
            print(f"{name}: not available, because {error}")  # noqa: T201 - a command's answer
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
