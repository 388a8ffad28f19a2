from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models

from tinylm.config import PRESETS
from tinylm.errors import DataError, TokenizerError
from tinylm.sample import default_roots, gather_docstrings
from tinylm.spm_convert import convert_sentencepiece
from tinylm.tokenizer import (
    DEFAULT_TOKENIZER,
    load_tokenizer,
    num_token_ids,
    save_tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]

HARD_STRINGS = [
    "",
    " ",
    "          ",
    "Hello world",
    " Hello  world  ",
    "\n",
    "\n\n\r\n\t\t x\n    def f():\n\treturn 1\n",
    "2024-01-02 3.14159e-10 007",
    "naïve café Ωμέγα Привет नमस्ते 日本語 한국어 العربية",
    "🦙🚀 😶‍🌫️ é ﬁ Å ½",
    "\x00\x01\x1b[0m\x7f\x85\u00a0\u200b\u2028\ufeff\ufffd\U0010ffff",
    "<s> </s> <unk> <0x0A> </s>",
    "a" * 300,
    "=" * 80 + "-" * 77,
]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    gather_docstrings(
        folder / "train.jsonl",
        folder / "val.jsonl",
        max_bytes=1_000_000,
        val_fraction=0.1,
        roots=default_roots()[:1],
    )
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def folder(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer([jsonl], tmp_path_factory.mktemp("tok"), vocab_size=2048)


def _digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _random_texts(pieces: list[str], count: int) -> list[str]:
    rng = random.Random(7)
    alphabets = ["ab ", " \n\t=-#", "".join(map(chr, range(0x20, 0x250)))]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 25))) for _ in range(count)]
    texts += ["".join(rng.choices(rng.choice(alphabets), k=50)) for _ in range(count)]
    return texts + [
        "".join(chr(c) for c in rng.sample(range(0x11000, 0x20000), 20)) for _ in range(count // 4)
    ]


def test_trained_tokenizer_is_llama_style(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, vocab_size=2048)
    assert sorted(p.name for p in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert len(tokenizer) == num_token_ids(tokenizer) == 2048
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer("x")["input_ids"][0] == 1
    padded = tokenizer(["a b c d e f g h", "a"], padding=True)
    assert padded["input_ids"][1][-1] == 2 and padded["attention_mask"][1][-1] == 0
    # Digits one by one; line breaks as bytes; indentation in pieces.
    assert len(tokenizer.tokenize("2024")) == 5
    tokens = tokenizer.tokenize("\n        x")
    assert "<0x0A>" in tokens and "▁" * 8 in tokens


def test_hugging_face_and_sentencepiece_agree_and_round_trip(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i).replace("▁", " ") for i in range(259, 2048)]
    for text in HARD_STRINGS + _random_texts(pieces, 400):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == processor.encode(text), repr(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_training_is_deterministic(jsonl: Path, folder: Path, tmp_path: Path) -> None:
    again = train_tokenizer([jsonl], tmp_path / "again", vocab_size=2048)
    assert _digests(again) == _digests(folder)


def test_saving_keeps_the_bytes(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    save_tokenizer(tokenizer, tmp_path)
    assert _digests(tmp_path) == _digests(folder)
    assert str(folder) not in (tmp_path / "tokenizer_config.json").read_text()
    save_tokenizer(load_tokenizer(tmp_path), tmp_path)  # onto itself
    assert _digests(tmp_path) == _digests(folder)


def test_all_sources_give_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = tmp_path / "checkpoint"
    save_tokenizer(load_tokenizer(folder), checkpoint)
    PRESETS["tinylm-test"].save(checkpoint / "config.json")  # "model_type": "tinylm"
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(folder / "tokenizer.model", lone)
    sources = [checkpoint, folder / "tokenizer.json", folder / "tokenizer.model", lone]
    expected = load_tokenizer(folder)
    others = [load_tokenizer(source) for source in sources]
    for tokenizer in [*others, AutoTokenizer.from_pretrained(str(folder))]:
        for text in HARD_STRINGS:
            assert tokenizer(text)["input_ids"] == expected(text)["input_ids"], repr(text)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


def test_a_llama_class_name_does_not_change_the_ids(folder: Path, tmp_path: Path) -> None:
    # As on the hub: transformers 5 rebuilds this class and loses a leading space.
    shutil.copy(folder / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | special))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(" Hello")["input_ids"] == load_tokenizer(folder)(" Hello")["input_ids"]
    assert tokenizer(" Hello")["input_ids"] != tokenizer("Hello")["input_ids"]


def test_too_little_text_names_the_largest_size_and_that_works(tmp_path: Path) -> None:
    file = tmp_path / "small.jsonl"
    file.write_text(json.dumps({"text": "the cat sat on the mat and the dog sat too"}))
    with pytest.raises(TokenizerError) as caught:
        train_tokenizer([file], tmp_path / "a", vocab_size=4096)
    message = str(caught.value)
    assert "small.jsonl: too little text for a vocabulary of 4096" in message
    found = re.search(r"largest that works is (\d+)", message)
    assert found is not None
    train_tokenizer([file], tmp_path / "b", vocab_size=int(found[1]))
    with pytest.raises(TokenizerError, match="too little text"):
        train_tokenizer([file], tmp_path / "c", vocab_size=int(found[1]) + 1)
    assert not (tmp_path / "a").exists()


def test_too_small_a_vocabulary_names_the_size_and_that_works(tmp_path: Path) -> None:
    file = tmp_path / "chinese.jsonl"
    text = "".join(chr(0x4E00 + i) for i in range(200)) * 5
    file.write_text(json.dumps({"text": text}))
    with pytest.raises(
        TokenizerError, match=r"can't hold the bytes .* Use at least (\d+)"
    ) as caught:
        train_tokenizer([file], tmp_path / "a", vocab_size=300)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found is not None
    train_tokenizer([file], tmp_path / "b", vocab_size=int(found[1]))


def test_training_input_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "hello hello hello"}\nnot json\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: not JSON"):
        train_tokenizer([bad], tmp_path / "t", vocab_size=262)
    train_tokenizer([bad], tmp_path / "t", vocab_size=264, skip_bad_lines=True)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="found only empty texts"):
        train_tokenizer([empty], tmp_path / "u")
    with pytest.raises(DataError, match="no training files"):
        train_tokenizer([], tmp_path / "u")


def test_vocabulary_too_small_for_the_tokenizer(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="vocabulary has 512 ids, the tokenizer has 2048"):
        load_tokenizer(folder, vocab_size=512)


def test_missing_and_damaged_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no such file or folder.*tinylm tokenizer train"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TokenizerError, match=r"expected tokenizer\.json .* found notes\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:1000])
    with pytest.raises(TokenizerError, match=r"its files can't be read \("):
        load_tokenizer(tmp_path)
    (tmp_path / "cut.model").write_bytes((folder / "tokenizer.model").read_bytes()[:1001])
    with pytest.raises(TokenizerError, match=r"cut\.model: "):
        load_tokenizer(tmp_path / "cut.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(TokenizerError, match=r"text\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "text.model")


def test_a_tokenizer_needs_an_end_token(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.save(str(tmp_path / "other.json"))
    with pytest.raises(TokenizerError, match="expected an end token"):
        load_tokenizer(tmp_path / "other.json")


def test_models_that_cannot_be_converted_are_refused(jsonl: Path, tmp_path: Path) -> None:
    prefix = str(tmp_path / "unigram")
    lines = jsonl.read_text(encoding="utf-8").splitlines()[:50]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line[:1000] for line in lines),
        model_prefix=prefix,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError) as caught:
        convert_sentencepiece(Path(prefix + ".model").read_bytes(), "unigram.model")
    for problem in ("its algorithm is not BPE", "it normalises Unicode", "it removes spaces"):
        assert problem in str(caught.value)


def _run_isolated(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


LOAD_DEFAULT = (
    "from tinylm.tokenizer import load_tokenizer\n"
    "from tinylm.errors import TokenizerError\n"
    "try: print(load_tokenizer()(' Hello')['input_ids'])\n"
    "except TokenizerError as error: print(error)\n"
)


def test_unreachable_hub_fails_fast_and_says_what_to_do(tmp_path: Path) -> None:
    start = time.monotonic()
    # Nothing listens on the discard port: the connection is refused, as without a network.
    done = _run_isolated(LOAD_DEFAULT, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    for part in (DEFAULT_TOKENIZER, "tinylm tokenizer train", "llama2_tokenizer.py", "network"):
        assert part in done.stdout
    # Mostly imports; the retries of the hub's client would take several minutes.
    assert time.monotonic() - start < 60


def test_hub_cache_serves_without_network(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / ("models--" + DEFAULT_TOKENIZER.replace("/", "--"))
    commit = "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    done = _run_isolated(LOAD_DEFAULT, tmp_path, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == str(load_tokenizer(folder)(" Hello")["input_ids"]), done.stderr
