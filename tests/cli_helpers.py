"""Command lines, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Cli = Callable[..., tuple[int, str, str]]


def command_line(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command: exit code, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code: Any = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
