from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylm.errors import DataError
from tinylm.sample import default_roots, gather_docstrings

LONG = "A sentence that is long enough to count as a document of its own, word by word. " * 4


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _write_modules(root: Path, count: int) -> None:
    package = root / "package"
    package.mkdir(parents=True)
    for index in range(count):
        source = f'"""Module {index}. {LONG}"""\nraise SystemExit("imported")\n'
        (package / f"module_{index}.py").write_text(source)


def test_document_has_names_signatures_and_docstrings(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write_modules(root, 20)
    (root / "shapes.py").write_text(
        f'"""Shapes. {LONG}"""\n'
        "class Circle(Shape):\n"
        '    """A circle.\n\n    Drawn by:\n        Indented more.\n    """\n'
        "    async def area(self, unit: str = 'm', *, exact=False) -> float:\n"
        '        """Return the area."""\n'
        "    def undocumented(self): pass\n",
    )
    gather_docstrings(tmp_path / "t", tmp_path / "v", val_fraction=0.3, roots=[root])
    (text,) = (t for t in _texts(tmp_path / "t") + _texts(tmp_path / "v") if "shapes" in t)
    assert text == (
        f"module shapes\n\nShapes. {LONG.strip()}\n\n\n"
        "class shapes.Circle(Shape)\n\nA circle.\n\nDrawn by:\n    Indented more.\n\n\n"
        "async def shapes.Circle.area(self, unit: str='m', *, exact=False) -> float\n\n"
        "Return the area."
    )


def test_split_is_by_module_and_stable(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write_modules(root, 60)
    first = gather_docstrings(tmp_path / "t1", tmp_path / "v1", val_fraction=0.2, roots=[root])
    again = gather_docstrings(tmp_path / "t2", tmp_path / "v2", val_fraction=0.2, roots=[root])
    assert first == again
    assert (tmp_path / "t1").read_bytes() == (tmp_path / "t2").read_bytes()
    train, val = _texts(tmp_path / "t1"), _texts(tmp_path / "v1")
    assert len(train) + len(val) == first.num_train_docs + first.num_val_docs == 60
    assert 3 <= len(val) <= 25
    assert not set(train) & set(val)
    assert first.train_bytes == sum(len(text.encode()) for text in train)
    # A module that comes along later moves none of the others across.
    (root / "package" / "newcomer.py").write_text(f'"""New. {LONG}"""')
    gather_docstrings(tmp_path / "t3", tmp_path / "v3", val_fraction=0.2, roots=[root])
    assert set(train) <= set(_texts(tmp_path / "t3"))
    assert set(val) <= set(_texts(tmp_path / "v3"))


def test_duplicates_tests_and_broken_sources_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write_modules(root, 20)
    for name in ("copy_a", "copy_b"):
        (root / f"{name}.py").write_text(f'"""Same text. {LONG}"""')
    (root / "latin.py").write_bytes(b'"""caf\xe9 ' + LONG.encode() + b'"""')
    (root / "broken.py").write_text(f'"""Broken. {LONG}"""\ndef (:')
    (root / "surrogate.py").write_text(f'"""\\ud800 {LONG}"""')
    (root / "tests").mkdir()
    (root / "tests" / "test_x.py").write_text(f'"""A test. {LONG}"""')
    report = gather_docstrings(tmp_path / "t", tmp_path / "v", val_fraction=0.3, roots=[root])
    texts = _texts(tmp_path / "t") + _texts(tmp_path / "v")
    assert sum("Same text." in text for text in texts) == 1
    assert report.num_duplicates == 1
    assert report.num_unreadable == 2
    assert not any(word in t for t in texts for word in ("caf", "Broken", "\ud800", "A test."))


def test_the_standard_library_gives_real_text(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = gather_docstrings(
        tmp_path / "sub" / "train.jsonl",
        tmp_path / "sub" / "val.jsonl",
        max_bytes=200_000,
        val_fraction=0.2,
        roots=default_roots()[:1],
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.train_bytes >= 200_000
    assert report.num_val_docs >= 1
    assert seen[-1] == (200_000, 200_000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert any("Return" in text for text in _texts(tmp_path / "sub" / "train.jsonl"))
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["train.jsonl", "val.jsonl"]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    train, val = tmp_path / "t", tmp_path / "v"
    with pytest.raises(DataError, match="max_bytes must be positive, found 0"):
        gather_docstrings(train, val, max_bytes=0)
    with pytest.raises(DataError, match=r"val_fraction must be between 0 and 1, found 1\.5"):
        gather_docstrings(train, val, val_fraction=1.5)
    with pytest.raises(DataError, match="two different files"):
        gather_docstrings(train, train)
    with pytest.raises(DataError, match=r"no training text: 0 modules under .*Install more"):
        gather_docstrings(train, val, roots=[tmp_path])
    assert not train.exists()
