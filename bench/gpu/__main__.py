"""The engine on one GPU beside the device's own speed, transformers and other ways to offload.

    python -m bench.gpu [--rows REGEX] [--budget-seconds 480]

Needs torch, triton, transformers, safetensors and tokenizers; no Ray, no pydantic, no grpc. See
bench/gpu/README.md. `--device cpu --tiny` tries every row's code without a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.cases import Case, Facts, Group, Setting
from bench.gpu.child import run_cases
from bench.gpu.shapes import SHAPES
from bench.report import Row, format_table, save_report

_ROOT = Path(__file__).parents[2]
_GRACE_S = 30.0
_POLL_S = 0.2


def _groups() -> list[Group]:
    """In the order of what is most wanted; a group imports what it needs in its own process."""

    def device(setting: Setting) -> list[Case]:
        from bench.gpu.device_cases import device_cases

        return device_cases(setting)

    def engine(label: str, kernels: str) -> Group:
        def cases(setting: Setting) -> list[Case]:
            from bench.gpu.engine_cases import engine_cases

            wanted = kernels if setting.device == "cuda" or kernels != "auto" else "off"
            return engine_cases(setting, label, wanted)

        return Group(name=label, cases=cases)

    def peer(setting: Setting) -> list[Case]:
        from bench.gpu.transformers_peer import peer_cases

        return peer_cases(setting)

    def mixture(setting: Setting) -> list[Case]:
        from bench.gpu.mixture_cases import mixture_cases

        return mixture_cases(setting)

    def offload(setting: Setting) -> list[Case]:
        from bench.gpu.offload_cases import offload_cases

        return offload_cases(setting)

    return [
        Group(name="device", cases=device),
        engine("bf16", "auto"),
        engine("fp8", "fp8"),
        Group(name="experts", cases=mixture),
        Group(name="transformers", cases=peer),
        Group(name="offload", cases=offload),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the groups, each in a process; print a table. Returns 1 when a row failed."""
    options = _options(arguments)
    setting = _setting(options)
    if options.child:
        (group,) = [group for group in _groups() if group.name == options.child]
        cases = _chosen(group, setting, options.rows)
        run_cases(cases, setting, json.loads(options.facts), options.file, options.budget_seconds)
        return 0
    run = _Run(setting, options, list(arguments if arguments is not None else sys.argv[1:]))
    for group in _groups():
        if _is_wanted(group, setting, options.rows):
            run.group(group)
    print(format_table(run.rows))
    for note in run.notes:
        print(f"note: {note}")
    return 1 if run.has_failures else 0


class _Run:
    """The report so far; it is written after every case."""

    def __init__(self, setting: Setting, options: argparse.Namespace, arguments: list[str]) -> None:
        self._options = options
        self._arguments = arguments
        self._saves = options.out or not setting.is_tiny
        self._folder = options.out or Path(__file__).parents[1] / "results"
        self._deadline_s = time.monotonic() + options.budget_seconds
        self._facts: Facts = {}
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.has_failures = False

    def group(self, group: Group) -> None:
        """Run one, telling what happens as it happens."""
        left_s = self._deadline_s - time.monotonic()
        with tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=_scratch()) as folder:
            file = Path(folder) / "lines"
            file.touch()
            command = [sys.executable, "-m", "bench.gpu", *self._arguments]
            command += ["--child", group.name, "--facts", json.dumps(self._facts)]
            command += ["--file", str(file), "--budget-seconds", str(max(0.0, left_s))]
            self._say(f"{group.name}: {max(0.0, left_s):.0f} s left")
            with subprocess.Popen(command, cwd=_ROOT) as child, file.open() as lines:
                begun = self._follow(child, lines, time.monotonic() + max(0.0, left_s) + _GRACE_S)
            if child.returncode:
                self._fail(begun or group.name, f"its process ended with {child.returncode}")

    def _follow(self, child: subprocess.Popen[bytes], lines: Any, until_s: float) -> str:
        """Take in the child's lines until it ends; the case that it was in then."""
        begun, rest = "", ""
        while True:
            ended = child.poll() is not None
            rest += lines.read()
            *whole, rest = rest.split("\n")
            for text in whole:
                line = json.loads(text)
                begun = line["case"] if line.get("begun") else ""
                self._take(line)
            if ended:
                return begun
            if time.monotonic() > until_s:
                child.kill()
            time.sleep(_POLL_S)

    def _take(self, line: dict[str, Any]) -> None:
        name = line["case"]
        if line.get("begun"):
            self._say(f"{name} ...")
            return
        if line.get("skipped"):
            self.notes.append(f"{name}: left out, {line['skipped']}")
        else:
            self._facts |= line["facts"]
            self.rows += [Row(**row) for row in line["rows"]]
            for row in line["rows"]:
                ratio = f", {row['ratio']:.3g}x {row['against']}" if row["ratio"] else ""
                self._say(f"  {row['case']}: {row['ours']:.4g} {row['unit']}{ratio}")
            if line["error"]:
                self._fail(name, line["error"])
        self._say(f"{name}: {line.get('skipped') or line['took_s']}")
        self._save()

    def _fail(self, name: str, error: str) -> None:
        self.has_failures = True
        self._say(error)
        self.notes.append(f"{name}: failed: {error.strip().splitlines()[-1]}")
        self._save()

    def _save(self) -> None:
        if self._saves:
            save_report("gpu", self.rows, notes=self.notes, folder=self._folder)

    def _say(self, text: str) -> None:
        print(f"[{self._options.budget_seconds - self._deadline_s + time.monotonic():6.1f}] {text}")
        sys.stdout.flush()


def _scratch() -> Path | None:
    """Memory-backed storage, where it holds a checkpoint and its stores; else the default."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 24 * 2**30
    return shared if roomy else None


def _is_wanted(group: Group, setting: Setting, pattern: str) -> bool:
    """A group whose modules are not there is to fail in its own process, not here."""
    try:
        return bool(_chosen(group, setting, pattern))
    except ImportError:
        return True


def _chosen(group: Group, setting: Setting, pattern: str) -> list[Case]:
    return [case for case in group.cases(setting) if re.search(pattern, case.name)]


def _setting(options: argparse.Namespace) -> Setting:
    tiny = options.tiny
    return Setting(
        size="tiny" if tiny else options.size,
        dtype="float32" if tiny and options.device == "cpu" else options.dtype,
        device=options.device,
        batches=tuple(options.batches or ((1, 3) if tiny else (1, 8, 64, 256))),
        steps=options.steps or (6 if tiny else 48),
        repeats=options.repeats or (1 if tiny else 5),
        prompt_tokens=12 if tiny else 128,
        prefill_tokens=40 if tiny else 2048,
        offload_layers=3 if tiny else 8,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only cases whose name this expression finds")
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="for all of them")
    parser.add_argument("--size", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a trial of the program")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--steps", type=int, help="decode steps per batch size")
    parser.add_argument("--repeats", type=int, help="prompts of the prefill case")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; default: bench/results")
    for name, kind in (("child", str), ("facts", str), ("file", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
