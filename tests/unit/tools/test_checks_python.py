"""House rules on Python files: each bad snippet is caught, its good twin is not."""

from __future__ import annotations

import pytest

from tools.checks import boundaries, calls, files, sizes, skips, spec_fields
from tools.checks.source import Severity, Source


def findings(rule, text: str, path: str = "router/handler.py") -> list[str]:
    return [finding.message for finding in rule.check(Source(path, text))]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("import os\nx = os.environ['A']", "router/handler.py"),
        ("import os as o\nx = o.getenv('A')", "router/handler.py"),
        ("from os import environ", "cluster/base/log.py"),
        ("import torch\nx = torch.cuda.is_available()", "replicas/worker/worker.py"),
        ("from torch import cuda", "replicas/layers/linear.py"),
        ("import torch.distributed as dist", "replicas/layers/linear.py"),
        ("import torch as t\nt.distributed.barrier()", "replicas/worker/worker.py"),
        ("import ray", "replicas/engine/scheduler.py"),
        ("from ray import serve", "router/handler.py"),
        ("def f():\n    import ray.serve", "cluster/planner/memory.py"),
    ],
)
def test_a_name_outside_its_owner_is_an_error(text: str, path: str) -> None:
    assert len(findings(boundaries, text, path)) == 1


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("import os\nx = os.environ['A']", "cluster/base/env.py"),
        ("import os\nx = os.path.join('a', 'b')", "router/handler.py"),
        ("import torch\nx = torch.cuda.is_available()", "replicas/worker/device.py"),
        ("import torch.distributed as dist", "cluster/dist/torch_communicator.py"),
        ("import ray", "replicas/leader/actor.py"),
        ("import ray", "cluster/control/lifecycle.py"),
        ("import ray", "router/app.py"),
        ("import os, ray\nx = os.environ", "tests/ray/test_anything.py"),
        ("import arrays\nx = arrays.ray", "router/handler.py"),
    ],
)
def test_owners_may_use_their_names(text: str, path: str) -> None:
    assert findings(boundaries, text, path) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "eval('1')",
        "exec('x = 1')",
        "import torch\ntorch.load('f')",
        "from torch import load\nload('f')",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "build(trust_remote_code=True)",
        "build(trust_remote_code=flag)",
        "import ray\nray.get(ref)",
        "import ray\nray.get(ref, timeout=None)",
        "import ray\nray.wait(refs)",
    ],
)
def test_dangerous_calls_are_errors(text: str) -> None:
    assert len(findings(calls, text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import yaml\nyaml.safe_load(f)",
        "build(trust_remote_code=False)",
        "import ray\nray.get(ref, timeout=5.0)",
        "import ray\nray.wait(refs, timeout=limit_s)",
    ],
)
def test_safe_calls_pass(text: str) -> None:
    assert findings(calls, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pytest\npytest.skip()",
        "import pytest\npytest.skip('')",
        "import pytest\n@pytest.mark.skip\ndef test_a(): ...",
        "import pytest\n@pytest.mark.skipif(True)\ndef test_a(): ...",
        "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_a(): ...",
        "import pytest\npytestmark = pytest.mark.skip(reason='')",
        "import pytest\npytest.importorskip('triton')",
    ],
)
def test_a_skip_without_a_reason_is_an_error(text: str) -> None:
    assert len(findings(skips, text, "tests/unit/test_a.py")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import pytest\npytest.skip('needs two nodes')",
        "import pytest\n@pytest.mark.skipif(True, reason='needs a GPU')\ndef test_a(): ...",
        "import pytest\npytest.importorskip('triton', reason='the kernel is optional')",
    ],
)
def test_a_skip_with_a_reason_passes(text: str) -> None:
    assert findings(skips, text, "tests/unit/test_a.py") == []


def test_sizes_warn_then_fail() -> None:
    def severities(num_lines: int) -> list[Severity]:
        source = Source("router/a.py", "x = 1\n" * num_lines)
        return [finding.severity for finding in sizes.check(source)]

    assert severities(250) == []
    assert severities(251) == [Severity.WARNING]
    assert severities(601) == [Severity.ERROR]


def test_a_long_function_is_an_error() -> None:
    body = "    x = 1\n"
    assert findings(sizes, "def f():\n" + body * 79) == []
    assert findings(sizes, "async def f():\n" + body * 80) == ["f has 81 lines; at most 80"]


def test_generated_modules_are_exempt() -> None:
    assert findings(sizes, "x = 1\n" * 900, "router/proto/penstock_pb2.py") == []


def test_drawer_names_and_full_package_files_are_errors() -> None:
    assert findings(files, "", "moe/utils.py")
    assert findings(files, "from moe import gating\n", "moe/__init__.py")
    assert findings(files, "\n", "moe/__init__.py") == []
    assert findings(files, "x = 1\n", "moe/gating.py") == []


def test_test_files_share_no_base_name() -> None:
    sources = [Source(f"tests/{place}/test_plan.py", "") for place in ("unit/moe", "unit/planner")]
    assert [finding.path for finding in files.check_all(sources)] == [
        "tests/unit/planner/test_plan.py"
    ]
    assert list(files.check_all(sources[:1])) == []


@pytest.mark.parametrize(
    ("field", "caught"),
    [
        ("port: int", True),
        ("port: int = 3", True),
        ("port: int = Field(3, ge=1)", True),
        ("port: int = Field(3, description='')", True),
        ("port: int = Field(3, description='TCP port.')", False),
        ("port: Annotated[int, Field(description='TCP port.')] = 3", False),
        ("port: int = 3\n    '''TCP port.'''", False),
        ("model_config = ConfigDict(frozen=True)", False),
        ("kinds: ClassVar[int] = 3", False),
    ],
)
def test_spec_fields_need_a_description(field: str, caught: bool) -> None:
    text = f"class Gateway(BaseModel):\n    {field}\n"
    assert bool(findings(spec_fields, text, "cluster/base/spec.py")) is caught
    assert findings(spec_fields, text, "cluster/base/plan.py") == []
