"""Real text that is already on the machine: docstrings of installed Python modules.

Nothing is downloaded and nothing is imported: sources are parsed with :mod:`ast`. The result is
a training and a validation file of JSON lines, one document per module, the same for the same
installation.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tinylm.errors import DataError

DEFAULT_TRAIN_BYTES = 8_000_000
DEFAULT_VAL_FRACTION = 0.02
# Shorter modules are a licence line or a re-export: nothing to learn from.
MIN_DOCUMENT_CHARS = 200
# Folders whose docstrings are test names, caches, or belong to another root.
SKIPPED_FOLDERS = frozenset({"__pycache__", "test", "tests", "site-packages", "dist-packages"})

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What :func:`gather_docstrings` wrote.

    Attributes:
        num_train_docs: Documents in the training file.
        num_val_docs: Documents in the validation file; none of their modules is in training.
        train_bytes: UTF-8 bytes of training text, JSON syntax not counted.
        val_bytes: UTF-8 bytes of validation text.
        num_modules: Source files read.
        num_unreadable: Source files left out: not UTF-8, or not this Python's syntax.
        num_duplicates: Docstrings left out because an earlier module has the same one.
    """

    num_train_docs: int
    num_val_docs: int
    train_bytes: int
    val_bytes: int
    num_modules: int
    num_unreadable: int
    num_duplicates: int


def gather_docstrings(
    out_train: str | Path,
    out_val: str | Path,
    *,
    max_bytes: int = DEFAULT_TRAIN_BYTES,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    roots: Sequence[str | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SampleReport:
    """Write docstrings of the standard library and the installed packages as JSON lines.

    Modules are visited in the order of a hash of their names, so any ``max_bytes`` gets a mix of
    all packages, and a module's place in training or validation never depends on the others. A
    docstring that occurred before, in either file, is left out.

    Args:
        out_train: Training file to write; its folder is made.
        out_val: Validation file to write; its folder is made.
        max_bytes: Training text to gather, in UTF-8 bytes. Less is written when there is no more.
        val_fraction: Share of the modules held out for validation, in (0, 1).
        roots: Folders that hold modules and packages. Default: this interpreter's standard
            library and site-packages.
        progress: Called with (bytes of training text so far, ``max_bytes``) after each module.

    Returns:
        Counts of what was written and what was left out.

    Raises:
        DataError: An argument is out of range, or the roots hold too little text for both files.
    """
    out_train, out_val = Path(out_train), Path(out_val)
    if max_bytes < 1:
        raise DataError(f"max_bytes must be positive, found {max_bytes}.")
    if not 0.0 < val_fraction < 1.0:
        raise DataError(f"val_fraction must be between 0 and 1, found {val_fraction}.")
    if out_train.resolve() == out_val.resolve():
        raise DataError(f"{out_train}: training and validation need two different files.")
    folders = default_roots() if roots is None else [Path(root) for root in roots]
    modules = sorted(_find_modules(folders), key=lambda item: (_hash_unit(item[0]), item[0]))

    train, val = _JsonlWriter(out_train), _JsonlWriter(out_val)
    seen: set[bytes] = set()
    num_modules = num_unreadable = num_duplicates = 0
    for name, path in modules:
        if train.num_bytes >= max_bytes:
            break
        num_modules += 1
        tree = _parse(path)
        if tree is None:
            num_unreadable += 1
            continue
        text, duplicates = _module_document(name, tree, seen)
        num_duplicates += duplicates
        if text is not None:
            # The order above hashes the bare name: another hash decides who is held out.
            held_out = _hash_unit("held out:" + name) < val_fraction
            (val if held_out else train).add(text)
        if progress is not None:
            progress(min(train.num_bytes, max_bytes), max_bytes)
    for writer, kind in ((train, "training"), (val, "validation")):
        if not writer.lines:
            raise DataError(
                f"no {kind} text: {num_modules} modules under {', '.join(map(str, folders))} gave "
                f"{train.num_docs} training and {val.num_docs} validation documents. Install more "
                "packages, or raise max_bytes or val_fraction."
            )
    train.write()
    val.write()
    return SampleReport(
        num_train_docs=train.num_docs,
        num_val_docs=val.num_docs,
        train_bytes=train.num_bytes,
        val_bytes=val.num_bytes,
        num_modules=num_modules,
        num_unreadable=num_unreadable,
        num_duplicates=num_duplicates,
    )


def default_roots() -> list[Path]:
    """Return this interpreter's standard library and site-packages folders, without repeats."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = (Path(sysconfig.get_path(name)).resolve() for name in names)
    return list(dict.fromkeys(path for path in paths if path.is_dir()))


class _JsonlWriter:
    """Collects documents and writes them at once, to a temporary name first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []
        self.num_bytes = 0

    @property
    def num_docs(self) -> int:
        return len(self.lines)

    def add(self, text: str) -> None:
        self.lines.append(json.dumps({"text": text}, ensure_ascii=False))
        self.num_bytes += len(text.encode("utf-8"))

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _hash_unit(text: str) -> float:
    """Map a string to [0, 1), the same on every machine and in every run."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _find_modules(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of every module; of one name, only the first root's."""
    names: set[str] = set()
    for root in roots:
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(
                name for name in subfolders if name not in SKIPPED_FOLDERS and name.isidentifier()
            )
            package = Path(folder).relative_to(root).parts
            for file in sorted(files):
                stem = Path(file).stem
                if not file.endswith(".py") or not stem.isidentifier():
                    continue
                parts = package if stem == "__init__" else (*package, stem)
                name = ".".join(parts)
                if name and name not in names:
                    names.add(name)
                    yield name, Path(folder, file)


def _parse(path: Path) -> ast.Module | None:
    """Parse a source file; None when it is not UTF-8 or not valid for this Python."""
    try:
        source = path.read_bytes().decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            return ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _module_document(name: str, tree: ast.Module, seen: set[bytes]) -> tuple[str | None, int]:
    """Return a module's document, None if it is too short, and its number of duplicates."""
    sections: list[str] = []
    num_chars = num_duplicates = 0
    for heading, node in _walk_documented(name, tree):
        docstring = _clean_docstring(node)
        if docstring is None:
            continue
        digest = hashlib.sha256(docstring.encode("utf-8")).digest()
        if digest in seen:
            num_duplicates += 1
            continue
        seen.add(digest)
        sections.append(f"{heading}\n\n{docstring}")
        num_chars += len(docstring)
    text = "\n\n\n".join(sections)
    return (text if num_chars >= MIN_DOCUMENT_CHARS else None), num_duplicates


def _walk_documented(name: str, node: _Documented) -> Iterator[tuple[str, _Documented]]:
    """Yield (heading, node) of a module and, in source order, of its classes and functions."""
    yield _heading(name, node), node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk_documented(f"{name}.{child.name}", child)


def _heading(name: str, node: _Documented) -> str:
    """Return the line above a docstring: the qualified name with its signature."""
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){result}"


def _clean_docstring(node: _Documented) -> str | None:
    """Return the dedented docstring; None if there is none or UTF-8 can't hold it."""
    raw = ast.get_docstring(node, clean=False)
    if raw is None:
        return None
    lines = inspect.cleandoc(raw).split("\n")
    text = "\n".join(line.rstrip() for line in lines).strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate written as an escape
        return None
    return text or None
