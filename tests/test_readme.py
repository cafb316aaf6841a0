"""The README says what is true: its strategy table is generated, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from moe_plugin.cli import app

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- strategy-table:start -->", "<!-- strategy-table:end -->"


def code_of(text: str) -> list[str]:
    """Lines of fenced blocks and pieces of inline code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    joined = (block.replace("\\\n", " ") for block in blocks)
    return [*(line for block in joined for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", rest)]


def test_the_strategy_table_is_the_generated_one() -> None:
    from moe_plugin.strategies.table import strategy_table

    _, _, after = README.read_text().partition(START)
    table, end, _ = after.partition(END)
    assert end, f"README.md lacks {START} ... {END}"
    assert table.strip() == strategy_table().strip()


def test_the_strategy_table_names_every_strategy() -> None:
    import moe_plugin
    from moe_plugin.strategies.table import strategy_table

    table = strategy_table()
    assert [name for name in moe_plugin.strategy_names() if name not in table] == []
    assert all(line.startswith("|") and line.endswith("|") for line in table.strip().splitlines())


def test_the_commands_exist_with_their_options() -> None:
    commands = typer.main.get_command(app).commands
    seen = set()
    for line in code_of(README.read_text()):
        for command, rest in re.findall(r"(?<![\w./-])moe-plugin ([a-z]+)([^|;&#]*)", line):
            assert command in commands, f"README mentions `moe-plugin {command}`"
            found = commands[command]
            if hasattr(found, "commands") and rest.split():
                name = rest.split()[0]
                assert name in found.commands, f"README mentions `moe-plugin {command} {name}`"
                found = found.commands[name]
            options = {option for parameter in found.params for option in parameter.opts}
            unknown = set(re.findall(r"(?<=\s)--[\w-]+", rest)) - options - {"--help"}
            assert not unknown, f"README gives {unknown} to `moe-plugin {command}`"
            seen.add(command)
    assert {"serve", "explain"} <= seen


def test_links_to_files_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", README.read_text())
    assert [target for target in targets if not (README.parent / target).exists()] == []
