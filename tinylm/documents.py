"""Documents from files of text, JSON lines or Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinylm.errors import DataError
from tinylm.jsonl import JsonlReader

TEXT_SUFFIXES = (".txt", ".md", ".text")
PARQUET_SUFFIX = ".parquet"
_ROWS_AT_ONCE = 1000


class DocumentReader:
    """Iterates over the documents of one file.

    A ``.parquet`` file holds one in each row's column ``text``; a ``.txt`` or ``.md`` file is one;
    any other is JSON lines ``{"text": ...}``, plain or gzip.

    Args:
        path: The file.
        skip_bad_lines: Count bad lines and rows instead of raising.

    Attributes:
        num_skipped: Bad lines and rows left out by the last iteration.
        first_problem: What was wrong with the first of them.
    """

    def __init__(self, path: Path, *, skip_bad_lines: bool = False) -> None:
        self.path = path
        self.skip_bad_lines = skip_bad_lines
        self.num_skipped = 0
        self.first_problem: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield each document.

        Raises:
            DataError: The file can't be read, or a line or row is bad.
        """
        self.num_skipped, self.first_problem = 0, None
        suffix = self.path.suffix.lower()
        if suffix == PARQUET_SUFFIX:
            yield from self._parquet()
        elif suffix in TEXT_SUFFIXES:
            yield self._whole_file()
        else:
            reader = JsonlReader(self.path, skip_bad_lines=self.skip_bad_lines)
            yield from reader
            self.num_skipped, self.first_problem = reader.num_skipped, reader.first_problem

    def _whole_file(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})."
                " Convert the file, for example with iconv."
            ) from error
        except OSError as error:
            raise DataError(f"{self.path}: can't be read ({error.strerror or error}).") from error

    def _parquet(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                if "text" not in names:
                    raise DataError(
                        f"{self.path}: expected a column 'text', found {', '.join(names) or 'none'}"
                        ". Rename the column that holds the documents."
                    )
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=["text"]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        if isinstance(value, str):
                            yield value
                        else:
                            self._skip_row(number, value)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: can't be read as Parquet ({error}).") from error

    def _skip_row(self, number: int, value: object) -> None:
        found = "null" if value is None else type(value).__name__
        message = f"{self.path}, row {number}: text must be a string, found {found}"
        if not self.skip_bad_lines:
            raise DataError(
                f"{message}. Correct the row, or pass --skip-bad-lines to leave such rows out and "
                "count them."
            )
        self.num_skipped += 1
        self.first_problem = self.first_problem or message
