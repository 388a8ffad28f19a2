"""``tinylm data prepare``: shards, held-out documents, and runs that read them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from training_helpers import VOCAB_SIZE, inputs, losses, stop_after, trainer, write_jsonl

from tinylm.cli import main
from tinylm.corpus import load_corpus
from tinylm.errors import CheckpointError, ConfigError, DataError, TokenizerError
from tinylm.prepare import document_hash, prepare
from tinylm.shards import ShardedTokens, open_prepared
from tinylm.tokenizer import load_tokenizer, train_tokenizer
from tinylm_export.cli import _validation_source


def tokenizer() -> Any:
    return load_tokenizer(inputs().tokenizer, vocab_size=VOCAB_SIZE)


def make(out: Path, **options: Any) -> Path:
    """Prepare the tests' text in many small shards."""
    values: dict[str, Any] = {"val_files": [inputs().val], "shard_mb": 0.002, **options}
    prepare([inputs().train], tokenizer(), out, **values)
    return out


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("prepared") / "tokens")


def test_tokens_and_documents_are_those_of_the_files(prepared: Path) -> None:
    data = open_prepared(prepared, tokenizer())
    for corpus, path in ((data.train, inputs().train), (data.val, inputs().val)):
        expected = load_corpus(path, tokenizer())
        assert len(corpus.tokens) == expected.num_tokens
        np.testing.assert_array_equal(corpus.tokens[:], expected.tokens[:])
        np.testing.assert_array_equal(corpus.doc_ends, expected.doc_ends)
        assert corpus.num_bytes == expected.num_bytes
        assert corpus.unigram_entropy() == expected.unigram_entropy()
    sizes = [p.stat().st_size for p in sorted(prepared.glob("train-*.bin"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {2000}
    hashes = np.load(prepared / "train-doc-hashes.npy")
    assert [int(h) for h in hashes] == [document_hash(text) for text in texts(inputs().train)]


def test_a_slice_across_shards_is_the_whole_rows(prepared: Path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 65536, 500, dtype=np.uint16)
    cuts = [0, 1, 100, 100 + 7, 499, 500]
    tokens = ShardedTokens([whole[a:b] for a, b in itertools.pairwise(cuts)])
    assert len(tokens) == 500
    for _ in range(200):
        start, stop = rng.integers(-20, 520, 2)
        np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])
    with pytest.raises(ValueError, match="step 1"):
        tokens[::2]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [f"document {i} says " + "word " * i for i in range(40)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet")
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, row in enumerate(rows):
        (folder / f"{i:02d}.txt").write_text(row)
    found = []
    for name, files in (
        ("jsonl", [jsonl]),
        ("parquet", [tmp_path / "a.parquet"]),
        ("txt", sorted(folder.iterdir())),
    ):
        out = tmp_path / f"out-{name}"
        prepare(files, tokenizer(), out, val_fraction=0.3)
        found.append({p.name: p.read_bytes() for p in out.iterdir() if p.is_file()})
    assert found[0] == found[1] == found[2]


def test_held_out_documents_are_whole_and_chosen_by_their_text(tmp_path: Path) -> None:
    rows = [f"text number {i} " * 3 for i in range(300)]
    first = write_jsonl(tmp_path / "a.jsonl", [*rows, *rows[:50]])
    second = write_jsonl(tmp_path / "b.jsonl", rows[::-1][:200])
    held_out = []
    for path in (first, second):
        out = tmp_path / f"out-{path.stem}"
        report = prepare([path], tokenizer(), out, val_fraction=0.2)
        train, val = (set(np.load(out / f"{s}-doc-hashes.npy").tolist()) for s in ("train", "val"))
        assert not train & val
        assert train | val == {document_hash(text) for text in texts(path)}
        assert 0.1 < report.num_val_docs / len(texts(path)) < 0.3
        held_out.append({text for text in texts(path) if document_hash(text) in val})
    both = set(texts(first)) & set(texts(second))
    assert held_out[0] & both == held_out[1] & both


def test_training_documents_that_are_held_out_are_dropped(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", ["one of them", "the other", "one of them"])
    val = write_jsonl(tmp_path / "v.jsonl", ["one of them"])
    report = prepare([train], tokenizer(), tmp_path / "out", val_files=[val])
    assert (report.num_train_docs, report.num_val_docs, report.num_dropped) == (1, 1, 2)


def test_run_on_shards_is_the_run_on_files_bit_for_bit(tmp_path: Path, prepared: Path) -> None:
    trainer(tmp_path / "files").train()
    source = {"directory": str(prepared), "train_file": None, "val_file": None, "tokenizer": None}
    trainer(tmp_path / "shards", data=source).train()
    assert losses(tmp_path / "shards") == losses(tmp_path / "files")


def test_resumed_run_on_shards_sees_the_same_batches(tmp_path: Path, prepared: Path) -> None:
    source = {"directory": str(prepared), "train_file": None, "val_file": None, "tokenizer": None}
    for depth in (0, 1, 3):
        out = tmp_path / f"depth-{depth}"
        run = trainer(out, data=source, performance={"prefetch": depth})
        stop_after(run, 3)
        assert run.train().step == 3
        trainer(out, resume=True, data=source, performance={"prefetch": 2}).train()
    assert losses(tmp_path / "depth-0") == losses(tmp_path / "depth-1")
    assert losses(tmp_path / "depth-0") == losses(tmp_path / "depth-3")
    assert [s for s, _ in losses(tmp_path / "depth-0")] == list(range(1, 9))


def test_moved_folder_goes_on_and_another_source_is_refused(tmp_path: Path, prepared: Path) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(prepared, here)
    source = {"directory": str(here), "train_file": None, "val_file": None, "tokenizer": None}
    trainer(out, data=source).train()
    here.rename(there)
    command = ["train", "--out", str(out), "--resume", "--max-steps", "9"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--train-file", str(inputs().train), "--val-file", str(inputs().val)])
    assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--data", str(there)])
    assert exit_.value.code == 0
    assert losses(out)[-1][0] == 9
    # What parity reads when no file is named, with the checkpoint's own tokenizer.
    assert _validation_source(out) == there
    own = load_tokenizer(out / "last", vocab_size=512)
    held_out = len(inputs().val.read_text(encoding="utf-8").splitlines())
    assert open_prepared(_validation_source(out), own).val.num_docs == held_out
    with pytest.raises(CheckpointError, match="started with --data, found --train-file"):
        trainer(
            out,
            resume=True,
            training={"max_steps": 9},
            data={"tokenizer": str(there / "tokenizer")},
        )


def test_damaged_folders_are_refused_by_name(tmp_path: Path, prepared: Path) -> None:
    def damaged(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(prepared, folder)
        return folder

    cut = damaged("cut")
    shard = cut / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00001\.bin: expected 2000 bytes, found 1998"):
        open_prepared(cut, tokenizer(), verify=False)
    gone = damaged("gone")
    (gone / "val-00000.bin").unlink()
    with pytest.raises(DataError, match=r"val-00000\.bin: not found"):
        open_prepared(gone, tokenizer())
    altered = damaged("altered")
    content = bytearray((altered / "train-00002.bin").read_bytes())
    content[7] ^= 1
    (altered / "train-00002.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"train-00002\.bin: altered"):
        open_prepared(altered, tokenizer())
    newer = damaged("newer")
    index = json.loads((newer / "index.json").read_text())
    (newer / "index.json").write_text(json.dumps({**index, "format_version": 2}))
    with pytest.raises(DataError, match="format_version 1, found 2"):
        open_prepared(newer, tokenizer())
    with pytest.raises(DataError, match=r"index\.json: not found"):
        open_prepared(tmp_path, tokenizer())
    other = train_tokenizer([inputs().train], tmp_path / "other", vocab_size=VOCAB_SIZE - 20)
    with pytest.raises(TokenizerError, match="made with the tokenizer"):
        open_prepared(prepared, load_tokenizer(other, vocab_size=VOCAB_SIZE))


def test_bad_input_names_file_and_place(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n' + '{"text": "also fine"}\n' * 3)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: "):
        prepare([bad], tokenizer(), tmp_path / "out", val_files=[inputs().val])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    report = prepare(
        [bad], tokenizer(), tmp_path / "out", val_files=[inputs().val], skip_bad_lines=True
    )
    assert report.num_skipped == 1 and "line 2" in str(report.first_problem)
    table = pyarrow.table({"text": ["a", None, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet, row 2: text must be a string, found null"):
        prepare([tmp_path / "bad.parquet"], tokenizer(), tmp_path / "o2")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "column.parquet")
    with pytest.raises(DataError, match="expected a column 'text', found body"):
        prepare([tmp_path / "column.parquet"], tokenizer(), tmp_path / "o2")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 \(byte 0xe9 at 3\)"):
        prepare([tmp_path / "latin.txt"], tokenizer(), tmp_path / "o2")
    with pytest.raises(DataError, match=r"nothing\.jsonl: expected a file"):
        prepare([tmp_path / "nothing.jsonl"], tokenizer(), tmp_path / "o2")
    with pytest.raises(DataError, match="expected held-out text, found 0 documents"):
        prepare([inputs().train], tokenizer(), tmp_path / "o2", val_fraction=1e-9)
    with pytest.raises(ConfigError, match="not both"):
        trainer(tmp_path / "run", data={"directory": "x"})


def test_command_writes_a_folder_that_train_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = inputs()
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                *("data", "prepare", "--file", str(data.train), "--out", str(tmp_path / "tokens")),
                *("--tokenizer", str(data.tokenizer), "--val-fraction", "0.2"),
                *("--json", str(tmp_path / "report.json")),
            ]
        )
    assert exit_.value.code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_train_docs"] + report["num_val_docs"] == len(texts(data.train))
    assert f"{report['num_train_tokens']:,} tokens to train on" in capsys.readouterr().out
