"""JSON lines with a ``"text"`` field: a reader that names the file, the line and the problem."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tinylm.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlReader:
    """Iterates over the texts of a JSON lines file.

    Each line is an object with a string in ``"text"``; other fields and blank lines are ignored.
    gzip is recognised by content, whatever the file is called. Each iteration reads the file anew.

    Attributes:
        path: The file.
        skip_bad_lines: Whether a bad line is counted instead of raised.
        num_skipped: Bad lines passed over by the latest iteration.
        first_problem: What was wrong with the first of them, ``None`` if there was none.
    """

    def __init__(self, path: str | Path, *, skip_bad_lines: bool = False) -> None:
        self.path = Path(path)
        self.skip_bad_lines = skip_bad_lines
        self.num_skipped = 0
        self.first_problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield each line's text.

        Raises:
            DataError: The file can't be read, a line is bad, or no document is found.
        """
        num_documents = 0
        for text in self.texts_or_none():
            if text is not None:
                num_documents += 1
                yield text
        if not num_documents:
            raise DataError(self.no_documents_message())

    def no_documents_message(self) -> str:
        """Say that the latest iteration found nothing to use."""
        skipped = f", and {self.num_skipped} bad lines ({self.first_problem})"
        return (
            f'{self.path}: expected JSON lines such as {{"text": "..."}}, found no documents'
            f"{skipped if self.num_skipped else ''}. Give a file with at least one."
        )

    def texts_or_none(self) -> Iterator[str | None]:
        """Yield each line's text, or None for a bad line that is skipped.

        Raises:
            DataError: The file can't be read, or a line is bad.
        """
        self.num_skipped, self.first_problem = 0, None
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                yield _parse_line(line.rstrip())
            except _BadLineError as problem:
                message = f"{self.path}, line {number}: {problem}"
                if not self.skip_bad_lines:
                    raise DataError(
                        f"{message}. Correct the line, or pass --skip-bad-lines to leave such "
                        "lines out and count them."
                    ) from None
                self.num_skipped += 1
                self.first_problem = self.first_problem or message
                yield None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        try:
            with self.path.open("rb") as raw:
                magic = raw.read(2)
                raw.seek(0)
                stream: BinaryIO = raw
                if magic == _GZIP_MAGIC:
                    stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
                for line in stream:
                    number += 1
                    yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: not found. Give a JSON lines file.") from error
        except IsADirectoryError as error:
            raise DataError(f"{self.path}: expected a file, found a folder.") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.path}, after line {number}: the gzip data is damaged or cut off ({error}). "
                "Copy or compress the file again."
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.path}, after line {number}: can't be read ({error.strerror or error})."
            ) from error


def read_jsonl(path: str | Path, *, skip_bad_lines: bool = False) -> JsonlReader:
    """Return an iterable over the texts of a JSON lines file.

    Args:
        path: A file of lines ``{"text": "..."}``, plain or gzip.
        skip_bad_lines: Count bad lines in ``num_skipped`` instead of raising.

    Returns:
        The reader; iterating raises DataError with file, line number and problem.
    """
    return JsonlReader(path, skip_bad_lines=skip_bad_lines)


class _BadLineError(Exception):
    """What is wrong with one line."""


def _parse_line(line: bytes) -> str:
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
        ) from None
    try:
        value = json.loads(decoded)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _BadLineError(f"not JSON ({what} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # huge numbers, very deep nesting
        raise _BadLineError(f"not JSON that can be read ({error})") from None
    if not isinstance(value, dict):
        raise _BadLineError(f'expected an object {{"text": ...}}, found {_json_type(value)}')
    if "text" not in value:
        fields = ", ".join(map(repr, list(value)[:8])) or "none"
        raise _BadLineError(f'no field "text" (fields found: {fields})')
    text = value["text"]
    if not isinstance(text, str):
        raise _BadLineError(f'"text" must be a string, found {_json_type(text)}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise _BadLineError(
            f"the text is not UTF-8 (lone surrogate \\u{code:04x} at character {error.start + 1})"
        ) from None
    return text


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
