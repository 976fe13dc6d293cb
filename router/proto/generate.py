"""Writes the generated protobuf modules beside their .proto files, or checks them for drift.

The include path is the repository root, so the generated imports are absolute
(`router.proto.penstock_pb2`). Generated files are committed: an installation needs no compiler.

    python -m router.proto.generate           # rewrite
    python -m router.proto.generate --check   # exit 1 and name the files that differ
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ("router/proto/penstock.proto",)
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def compile_protos(out: Path) -> list[Path]:
    """Compile every proto of the project into `out`; returns the generated paths under it.

    Raises:
        RuntimeError: the compiler refused a file (its message is on stderr).
    """
    well_known = resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{well_known}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
        *PROTOS,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; see its message above")
    return [
        out / (proto.removesuffix(".proto") + suffix) for proto in PROTOS for suffix in SUFFIXES
    ]


def drifted_files() -> list[str]:
    """Repository paths whose committed content is not what the compiler writes now."""
    with tempfile.TemporaryDirectory() as scratch:
        generated = compile_protos(Path(scratch))
        return [
            str(path.relative_to(scratch))
            for path in generated
            if not _same(path, ROOT / path.relative_to(scratch))
        ]


def _same(generated: Path, committed: Path) -> bool:
    return committed.is_file() and committed.read_bytes() == generated.read_bytes()


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the protobuf modules.")
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    if not parser.parse_args(argv).check:
        compile_protos(ROOT)
        return 0
    drifted = drifted_files()
    if drifted:
        sys.stderr.write("out of date: " + ", ".join(drifted) + "\n")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
