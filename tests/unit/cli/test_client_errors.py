"""What a user of the command line hears when a value cannot be sent or nobody answers."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from bench.running_cluster import free_ports
from cluster.cli.main import cli


def generate(*arguments: str) -> Result:
    (port,) = free_ports(1)
    address = ("--address", f"127.0.0.1:{port}", "--model", "m", "--timeout", "5")
    return CliRunner().invoke(cli, ["generate", *arguments, *address])


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (("x", "--max-tokens", "99999999999"), "max_tokens"),
        (("x", "--seed", "9223372036854775808"), "seed"),
        (("\udcff",), "prompt"),
    ],
)
def test_a_value_that_no_message_can_hold_is_the_users_to_mend(
    arguments: tuple[str, ...], param: str
) -> None:
    result = generate(*arguments)
    assert result.exit_code == 2
    assert f"error: {param} cannot be sent" in result.stderr
    assert "fix: " in result.stderr


def test_nobody_answers() -> None:
    result = generate("x")
    assert result.exit_code == 1
    assert "error: No gateway answers: " in result.stderr
    assert "fix: Check the address" in result.stderr
