"""`penstock validate` and `penstock plan`: output, exit codes, and what they do not import."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cluster.base.plan import ClusterPlan, from_json
from cluster.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "demo.yaml"


def _run(*args: object, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], env=env)


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    file = tmp_path / "wrong.yaml"
    file.write_text("models:\n  - name: m\n    repo: org/m\n    replicas: 0\n    dtype: int8\n")
    return file


def test_validate_accepts_the_demo():
    result = _run("validate", DEMO)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "ok, cluster demo, models demo-dense, replicas 1" in result.stdout


def test_validate_prints_every_problem_and_exits_2(wrong: Path):
    result = _run("validate", wrong)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: 2 problems in the cluster file" in result.stderr
    assert f"{wrong}:4: models[0].replicas: 0 is out of range" in result.stderr
    assert f'{wrong}:5: models[0].dtype: "int8"' in result.stderr
    assert "Traceback" not in result.stderr


def test_one_problem_is_one_error_line(tmp_path: Path):
    result = _run("validate", tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/absent.yaml: no such file (check the path)\n"


def test_markup_in_values_is_text(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  - name: '[red]m[/]'\n    repo: org/m\n")
    assert '"[red]m[/]" is not accepted' in _run("validate", file).stderr


def test_plan_shows_places_and_memory():
    result = _run("plan", DEMO)
    assert result.exit_code == 0
    for words in ("demo-dense", "WEIGHTS", "KV CACHE", "Foreseen places", "127.0.0.1:50051"):
        assert words in result.stdout
    assert "Decisions" not in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_plan_explains():
    result = _run("plan", DEMO, "--explain")
    assert result.exit_code == 0
    assert "Decisions" in result.stdout
    assert "scheduler.max_context" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_plan_as_json_is_the_plan():
    result = _run("plan", DEMO, "--json")
    plan = from_json(ClusterPlan, json.loads(result.stdout))
    assert (plan.name, plan.models[0].tp_size) == ("demo", 2)
    assert Path(plan.models[0].path).is_absolute()


def test_plan_refuses_with_a_fix(tmp_path: Path):
    file = tmp_path / "c.yaml"
    text = DEMO.read_text().replace("tp: 2", "tp: 3")
    file.write_text(text.replace("models/demo-dense", str(DEMO.parent / "models/demo-dense")))
    result = _run("plan", file)
    assert result.exit_code == 2
    assert "models[0].parallel.tp: The model cannot be split over 3 ranks" in result.stderr
    assert "\nfix: Set tp to 2 or 4" in result.stderr


def test_warnings_go_to_stderr(tmp_path: Path):
    file = tmp_path / "c.yaml"
    model = DEMO.parent / "models" / "demo-dense"
    file.write_text(f"gateway: {{host: 0.0.0.0}}\nmodels: [{{name: m, path: {model}}}]\n")
    result = _run("plan", file, "--json")
    assert result.exit_code == 0
    assert "warning: gateway.host 0.0.0.0" in result.stderr
    assert json.loads(result.stdout)["name"] == "c"


@pytest.mark.parametrize("args", [["nonsense"], ["validate"], ["plan", "--nonsense", "x"]])
def test_usage_errors_exit_2(args: list[str]):
    assert _run(*args).exit_code == 2


def test_a_bad_environment_is_a_user_error():
    result = _run("validate", DEMO, env={"PENSTOCK_LOG_LEVEL": "loud"})
    assert result.exit_code == 2
    assert "PENSTOCK_LOG_LEVEL is not a log level" in result.stderr


@pytest.mark.parametrize(
    ("raised", "exit_code", "words"),
    [(KeyboardInterrupt(), 130, ""), (RuntimeError("[boom]"), 1, "internal: RuntimeError: [boom]")],
)
def test_other_ends(
    raised: BaseException, exit_code: int, words: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path) -> None:
        raise raised

    monkeypatch.setattr("cluster.cli.validate.load_cluster_file", fail)
    result = _run("validate", DEMO)
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lines_are_those_of_the_commands():
    for name in ("validate", "plan"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert (command.help or "").splitlines()[0] == COMMANDS[name].help


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PENSTOCK_LOG_LEVEL": "info"},
        timeout=60,
        check=False,
    )


REPORT = (
    "import sys, atexit\n"
    "heavy = ('torch', 'ray', 'transformers', 'grpc', 'deepspeed')\n"
    "atexit.register(lambda: print('HEAVY', [m for m in heavy if m in sys.modules]))\n"
    "from cluster.cli.main import main\n"
    "sys.argv = ['penstock', *sys.argv[1:]]\n"
    "main()\n"
)


def test_a_wrong_file_is_refused_fast_and_lightly(wrong: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _python(REPORT, "validate", str(wrong))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert "HEAVY []" in done.stdout
    assert "models[0].replicas" in done.stderr
    assert "Traceback" not in done.stderr
    # Processor time, not the clock on the wall: other work on the machine does not count.
    used_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used_s < 1.0


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["plan", str(DEMO)]])
def test_offline_commands_import_nothing_heavy(args: list[str]):
    done = _python(REPORT, *args)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_help_imports_no_command():
    code = REPORT.replace("if m in sys.modules]", "if m in sys.modules] + [m for m in sys.modules "
                          "if m.startswith('cluster.cli.') and m != 'cluster.cli.main'] + "
                          "[m for m in ('pydantic', 'rich') if m in sys.modules]")  # fmt: skip
    assert "HEAVY []" in _python(code, "--help").stdout


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "soon", "1e9"])
@pytest.mark.parametrize("command", ["up x.yaml", "status", "generate x", "chat", "down"])
def test_a_timeout_is_a_time_that_passes(command: str, value: str):
    result = _run(*command.split(), "--timeout", value)
    assert result.exit_code == 2
    assert f"{value!r} is no number of seconds above 0" in result.stderr
