"""A virtual environment with some installed packages and what they depend on, and nothing else.

For programs that promise to run with few packages. Nothing is installed: it links to what is here.
"""

from __future__ import annotations

import sysconfig
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def bare_python(packages: Sequence[str], without: Sequence[str], folder: Path) -> Path:
    """The interpreter of such an environment, made in `folder`.

    Args:
        without: left out, though something depends on them.
    """
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    names = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=names))
    for name in sorted(_with_dependencies(packages, without)):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()}:
            source, link = Path(str(distribution.locate_file(top))), site / top
            if top not in ("..", "__pycache__") and source.exists() and not link.exists():
                link.symlink_to(source)
    return folder / "bin" / "python"


def _with_dependencies(packages: Sequence[str], without: Sequence[str]) -> set[str]:
    known: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = waiting.pop()
        if name in known or name in without:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        known.add(name)
        for text in requires:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name.lower().replace("_", "-"))
    return known
