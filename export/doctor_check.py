"""One finding of ``tinylm-export doctor``."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Literal

# ok: there and working. missing: needed and not there. problem: there and not working.
# optional: not there, and only needed for what the check says.
Status = Literal["ok", "missing", "problem", "optional"]

COMMAND_TIMEOUT_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: The thing.
        status: See :data:`Status`.
        found: What is there, or what went wrong.
        needed_for: What does not work without it.
        command: What to run to mend it; empty where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    needed_for: str
    command: str = ""


def program_output(command: list[str]) -> str | None:
    """Return what a program prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
