"""Directories that are written whole or not at all, and that know whether they are intact."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tinylm.errors import TinyLMError

SUMS_FILE = "SHA256SUMS"  # for `sha256sum -c SHA256SUMS`
TEMPORARY_PREFIX = ".tmp-"


@contextlib.contextmanager
def written_whole(
    directory: Path, *, marker: str | tuple[str, ...], error: type[TinyLMError], hint: str = ""
) -> Iterator[Path]:
    """Give a temporary directory that becomes ``directory`` if the block succeeds.

    Args:
        directory: The final name. One that exists is replaced if it is empty or holds ``marker``.
        marker: Name of the file that tells an earlier directory of this kind, or several of which
            one is enough.
        error: What to raise.
        hint: How to go on after a failure to write, for the message.

    Raises:
        TinyLMError: As ``error``: the directory holds something else, or can't be written (disk
            full). What was there before is intact and the temporary directory is gone.
    """
    replaces = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    markers = (marker,) if isinstance(marker, str) else marker
    if replaces and not any((directory / name).is_file() for name in markers):
        raise error(
            f"{directory}: exists and holds no {' or '.join(markers)}, so it is not replaced. "
            "Choose another directory."
        )
    temporary = temporary_name(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            _flush_to_disk(path)
        _flush_to_disk(temporary)
        if replaces:
            old = directory.parent / f"{TEMPORARY_PREFIX}old-{directory.name}"
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
            temporary.rename(directory)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(directory)
        _flush_to_disk(directory.parent)
    except OSError as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        raise error(
            f"{directory}: can't be written: {failure}. {_free_space(directory)} The unfinished "
            "files were removed and what was there before is intact. Make room or choose another "
            f"disk, then run again. {hint}"
        ) from failure
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_name(directory: Path) -> Path:
    """Return where :func:`written_whole` writes before it renames."""
    return directory.parent / f"{TEMPORARY_PREFIX}{directory.name}"


def _free_space(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory.parent).free / 1e6:.0f} MB are free there."
    except OSError:
        return ""


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_checksums(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS`` over every other file of a directory.

    Args:
        directory: The directory.
        known: Digests by relative name of files that need not be read again.
    """
    known = known or {}
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SUMS_FILE)
    lines = []
    for path in files:
        name = path.relative_to(directory).as_posix()
        lines.append(f"{known.get(name) or sha256(path)}  {name}\n")
    (directory / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_checksums(directory: Path, *, error: type[TinyLMError], hint: str = "") -> dict[str, str]:
    """Return digests by relative file name.

    Raises:
        TinyLMError: As ``error``: ``SHA256SUMS`` is missing or damaged.
    """
    path = directory / SUMS_FILE
    if not path.is_file():
        raise error(f"{path}: expected a file, found none; the directory is incomplete. {hint}")
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise error(f"{path}: damaged line {line!r}. {hint}")
        sums[name] = digest
    return sums


def check_sums(
    directory: Path,
    *,
    required: tuple[str, ...],
    error: type[TinyLMError],
    hint: str = "",
    skip: Callable[[str], bool] = lambda name: False,
) -> dict[str, str]:
    """Compare the files of a directory with its ``SHA256SUMS``.

    Args:
        directory: What :func:`written_whole` and :func:`write_checksums` made.
        required: Files that must be listed.
        error: What to raise.
        hint: The way out, for the message.
        skip: Names that are not to be read.

    Returns:
        Digests by relative file name.

    Raises:
        TinyLMError: As ``error``: a file is missing, truncated or altered.
    """
    sums = read_checksums(directory, error=error, hint=hint)
    for name in required:
        if name not in sums:
            raise error(f"{directory / SUMS_FILE}: expected a line for {name}, found none. {hint}")
    for name, digest in sums.items():
        if skip(name):
            continue
        path = directory / name
        if not path.is_file():
            raise error(f"{path}: expected a file, found none; the directory is incomplete. {hint}")
        found = sha256(path)
        if found != digest:
            raise error(
                f"{path}: truncated or altered ({path.stat().st_size} bytes): expected SHA-256 "
                f"{digest}, found {found}. Copy it again. {hint}"
            )
    return sums
