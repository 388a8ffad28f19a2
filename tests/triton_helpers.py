"""Triton's kernels on the CPU: they are interpreted where a process starts so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(*arguments: str, **variables: str) -> str:
    """Run Python in this folder, its kernels interpreted, and return what it said on stderr."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr
