"""`python -m tools.checks`: run every house rule over the repository and list what breaks one.

Linters check style; these check the architecture: who may use what, how big a file may grow, what
must be explained. Exit status 1 when an error was found; warnings are only shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tools.checks import (
    boundaries,
    calls,
    files,
    hygiene,
    links,
    sizes,
    skips,
    spec_fields,
    texts,
)
from tools.checks.source import Finding, Severity, Source, repository_sources

PER_FILE = (hygiene, sizes, files, boundaries, calls, skips, texts, spec_fields)
WHOLE_TREE = (files, links)


def run(sources: list[Source]) -> list[Finding]:
    """All findings, in the order of the files."""
    findings: list[Finding] = []
    for source in sources:
        try:
            for rule in PER_FILE:
                findings += rule.check(source)
        except SyntaxError as error:
            message = f"not valid Python: {error.msg}"
            findings.append(Finding(path=source.path, line=error.lineno or 1, message=message))
    for tree_rule in WHOLE_TREE:
        findings += tree_rule.check_all(sources)
    return sorted(findings, key=lambda finding: (finding.path, finding.line, finding.message))


def main() -> int:
    """Print the findings; the exit status says whether one of them is an error."""
    sources = repository_sources(Path.cwd())
    findings = run(sources)
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    warnings = len(findings) - errors
    sys.stdout.write(f"{len(sources)} files: {errors} errors, {warnings} warnings\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
