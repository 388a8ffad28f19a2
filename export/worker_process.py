"""A process that answers requests, one JSON object a line: its two ends and its memory.

A fresh process makes the resident set mean something: what it grows by is what was loaded there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tinylm.errors import ExportError

_STDERR_TAIL_CHARS = 1000


class WorkerProcess:
    """Asks a process that runs :func:`serve`; see :func:`worker_process`."""

    def __init__(
        self, process: subprocess.Popen[str], stderr: IO[str], prefix: str, error: type[Exception]
    ) -> None:
        self._process = process
        self._stderr = stderr
        self._prefix = prefix
        self._error = error

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            Exception: Of the type given to :func:`worker_process`: the worker reports an error, or
                its process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"do": action, **arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            tail = self._stderr.read()[-_STDERR_TAIL_CHARS:].strip()
            raise self._error(
                f"{self._prefix}its process ended with code {self._process.wait()} "
                f"during {action!r}: {tail or 'it printed nothing'}"
            )
        reply = json.loads(line)
        if "error" in reply:
            raise self._error(f"{self._prefix}{reply['error']}")
        return reply


@contextlib.contextmanager
def worker_process(
    arguments: Sequence[str], *, prefix: str = "", error: type[Exception] = ExportError
) -> Iterator[WorkerProcess]:
    """Start a worker, and end it with the block.

    Args:
        arguments: What Python is to run.
        prefix: Goes before every error's message.
        error: What :meth:`WorkerProcess.ask` raises.
    """
    with (
        tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace") as stderr,
        subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            yield WorkerProcess(process, stderr, prefix, error)
        finally:
            process.kill()


def serve(
    handle: Callable[[dict[str, Any]], dict[str, Any]], errors: tuple[type[Exception], ...]
) -> None:
    """Answer requests until stdin ends.

    Args:
        handle: Makes the reply to a request.
        errors: What becomes a reply of ``{"error": ...}``; anything else ends the process.
    """
    # Libraries print to stdout as well: it becomes stderr, and replies keep the channel.
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        try:
            reply = handle(json.loads(line))
        except errors as error:
            reply = {"error": str(error) or type(error).__name__}
        print(json.dumps(reply), file=channel, flush=True)


class ResidentMemory:
    """This process's resident set, from when this is made."""

    def __init__(self) -> None:
        # Forgets what importing libraries took for a moment, where the system can.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._baseline, _ = _resident_bytes()

    def figures(self) -> dict[str, int | None]:
        """Return it as it was then, the largest since, and what is still in use.

        A figure is None where the system does not say.
        """
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory for later
        held, peak = _resident_bytes()
        return {"baseline_bytes": self._baseline, "peak_bytes": peak, "held_bytes": held}


def _resident_bytes() -> tuple[int | None, int | None]:
    """Return the resident set and the largest one so far, at one moment, as far as known.

    ``ru_maxrss`` would include the parent's memory on Linux, where it outlives exec.
    """
    # One reading of the file: of two, the later resident set may exceed the earlier largest.
    resident, largest = _status_bytes("VmRSS:", "VmHWM:")
    if largest is None:
        with contextlib.suppress(ImportError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            largest = max(counted, resident or 0)  # it lags behind
    return resident or largest, largest


def _status_bytes(*keys: str) -> list[int | None]:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [None] * len(keys)
    found = {line.split()[0]: line.split()[1] for line in lines if line.startswith(keys)}
    return [int(found[key]) * 1024 if key in found else None for key in keys]  # it counts in kB
