"""The `moe-plugin` command as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import moe_plugin
from moe_plugin.cli import app

COMMANDS = ["bench", "doctor", "explain", "generate", "serve", "tune"]


def test_commands() -> None:
    assert set(COMMANDS) <= typer.main.get_command(app).commands.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"moe-plugin {moe_plugin.__version__}")


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["exlain"])
    assert result.exit_code == 2
    assert "exlain" in result.stderr


def test_nothing_shows_the_help() -> None:
    output = CliRunner().invoke(app, []).output
    assert [command for command in COMMANDS if command not in output] == []


@pytest.mark.slow
def test_the_process_shows_a_traceback_only_on_request() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "moe_plugin.cli", "explain", "--preset", "nonsense", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    plain = run()
    assert plain.returncode == 1
    assert plain.stderr.splitlines() == [plain.stderr.strip()]
    assert plain.stderr.startswith("error: unknown preset 'nonsense'")
    detailed = run("--traceback")
    assert detailed.returncode != 0
    assert "Traceback (most recent call last)" in detailed.stderr
    assert "ConfigError: unknown preset 'nonsense'" in detailed.stderr
