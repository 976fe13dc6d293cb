"""What the documentation states as fact is compared with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.base.load import parse_cluster_text
from cluster.cli.main import COMMANDS
from router.error_map import ERROR_STATUS
from router.proto import penstock_pb2
from router.sampling_fields import FIELDS

ROOT = Path(__file__).parents[3]


def table_rows(page: str, first_column: str) -> list[list[str]]:
    """Rows of the table whose first heading is `first_column`, cells stripped of backticks."""
    lines = iter((ROOT / page).read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")])
    return rows


def test_the_error_table_is_the_one_in_the_code() -> None:
    documented = {
        code.strip(): (grpc_name, int(http), retry == "yes")
        for code, grpc_name, http, retry, _ in table_rows("docs/api-grpc.md", "code")
    }
    assert documented == {
        code: (status.grpc.name, status.http, status.retryable)
        for code, status in ERROR_STATUS.items()
    }


def test_every_grpc_method_is_documented() -> None:
    cells = [row[0] for row in table_rows("docs/api-grpc.md", "method")]
    documented = {name.strip() for cell in cells for name in cell.split(",")}
    assert documented == set(penstock_pb2.DESCRIPTOR.services_by_name["Penstock"].methods_by_name)


def test_every_http_path_is_documented() -> None:
    routes = re.findall(r'Route\("([^"]+)"', (ROOT / "router/http/app.py").read_text())
    cells = [row[0] for row in table_rows("docs/api-http.md", "path")]
    documented = {path.strip() for cell in cells for path in cell.split(",")}
    assert documented == {path.replace(":path}", "}") for path in routes}


def test_every_sampling_field_is_documented() -> None:
    page = (ROOT / "docs/sampling.md").read_text()
    assert [field for field in FIELDS if f"`{field}`" not in page] == []


def test_every_command_is_documented() -> None:
    documented = {row[0].split()[1] for row in table_rows("README.md", "command")}
    assert documented == set(COMMANDS)


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        used = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / page).read_text()))
        assert used - targets == set(), page


@pytest.mark.parametrize("page", ["README.md"])
def test_cluster_files_in_the_pages_are_valid(page: str) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert parse_cluster_text(block, ROOT / "examples" / "readme.yaml").spec.models
