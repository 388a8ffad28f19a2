"""Rebuild the Llama 2 tokenizer from the npm package `llama-tokenizer-js`.

The vocabulary is Meta's, under the Llama 2 licence, so it is fetched at set-up and never kept in
this repository. The result is a folder that `--tokenizer` takes.

Example: python tools/llama2_tokenizer.py
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tinylm.errors import TokenizerError
from tinylm.paths import cache_dir
from tinylm.spm_convert import SPACE_MARK
from tinylm.tokenizer import HF_FILE, SPM_FILE, load_tokenizer, save_tokenizer

PACKAGE = "llama-tokenizer-js@1.2.2"
SOURCE_FILE = "package/llama-tokenizer.js"
NUM_TOKENS, NUM_MERGES = 32000, 61249
SHA256 = {
    "llama_vocab_base64": "0f97b4337921e6e7e9b4620fc73338ee570aecd3c16038bc23870a887e995045",
    "llama_merges_binary": "8d3881127fb4ad6d0983ccf96fd737e06d23705d4558583da667c05a637726e9",
}
NUM_META_PIECES = 3 + 256  # <unk>, <s>, </s> and one piece per byte
SPACES_SCORE = -1e9  # the pieces made only of spaces merge after all others
NPM_TIMEOUT_SECONDS = 120


def build(out: Path) -> Path:
    """Fetch the vocabulary and write the tokenizer, in both forms, into a folder.

    Args:
        out: New or empty folder; left alone when it already holds the tokenizer.

    Returns:
        ``out``.

    Raises:
        TokenizerError: npm is missing or fails, what it gave is not the expected vocabulary, or
            ``out`` holds other files.
    """
    if (out / HF_FILE).is_file() and (out / SPM_FILE).is_file():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenizerError(
            f"{out}: expected a new or empty folder, found something else. Name another with --out."
        )
    vocab, merges = unpack(fetch_source())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out.parent) as scratch:
        ready = Path(scratch, "tokenizer")
        ready.mkdir()
        (ready / SPM_FILE).write_bytes(sentencepiece_model(vocab))
        # Converted from the SentencePiece form, so the two forms can't differ; the merges that
        # the conversion derives from the scores are checked against the published ones.
        tokenizer = load_tokenizer(ready, vocab_size=NUM_TOKENS)
        save_tokenizer(tokenizer, ready)
        _check(ready, merges)
        ready.rename(out)
    return out


def fetch_source() -> str:
    """Return the JavaScript source that holds the vocabulary, by way of `npm pack`.

    Raises:
        TokenizerError: npm is missing or fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise TokenizerError(
            f"npm is needed to fetch {PACKAGE}, and was not found. Install Node.js, or give "
            "--tokenizer a folder with a Llama 2 tokenizer."
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", PACKAGE, "--silent", "--fetch-retries=1", "--ignore-scripts"]
        try:
            subprocess.run(
                command,
                cwd=scratch,
                check=True,
                capture_output=True,
                text=True,
                timeout=NPM_TIMEOUT_SECONDS,
            )
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as package:
                member = package.extractfile(SOURCE_FILE)
                if member is None:
                    raise KeyError(SOURCE_FILE)
                return member.read().decode("utf-8")
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
        except (subprocess.TimeoutExpired, ValueError, KeyError, tarfile.TarError) as error:
            reason = str(error)
    raise TokenizerError(
        f"`npm pack {PACKAGE}` did not give the package ({reason}). Check the network, or give "
        "--tokenizer a folder with a Llama 2 tokenizer."
    )


def unpack(source: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Read the tokens, by id, and the merges, best first, out of the JavaScript source.

    Raises:
        TokenizerError: The source does not hold the Llama 2 vocabulary.
    """
    blobs = {}
    for name, expected in SHA256.items():
        match = re.search(rf'{name} = "([A-Za-z0-9+/=]+)"', source)
        blobs[name] = base64.b64decode(match[1]) if match else b""
        found = hashlib.sha256(blobs[name]).hexdigest()
        if found != expected:
            raise TokenizerError(
                f"{PACKAGE}: {name} expected with SHA-256 {expected}, found {found}. The package "
                "has changed; do not use it."
            )
    vocab = blobs["llama_vocab_base64"].decode("utf-8").split("\n")
    binary = blobs["llama_merges_binary"]
    pairs = [(vocab[left], vocab[right]) for left, right in struct.iter_unpack("<HH", binary)]
    if (len(vocab), len(pairs)) != (NUM_TOKENS, NUM_MERGES):
        raise TokenizerError(
            f"{PACKAGE}: {NUM_TOKENS} tokens and {NUM_MERGES} merges expected, found {len(vocab)} "
            f"and {len(pairs)}."
        )
    return vocab, pairs


def sentencepiece_model(vocab: list[str]) -> bytes:
    """Return the vocabulary as a serialised SentencePiece BPE model.

    A piece's score is minus its rank after the meta pieces, as SentencePiece's trainer gives it.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb2

    # protobuf makes the class at run time.
    model = pb2.ModelProto()  # type: ignore[attr-defined]
    kinds = pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]
    for index, token in enumerate(vocab):
        piece = model.pieces.add(piece=token)
        if index == 0:
            piece.type = kinds.UNKNOWN
        elif index < 3:
            piece.type = kinds.CONTROL
        elif index < NUM_META_PIECES:
            piece.type = kinds.BYTE
        else:
            only_spaces = set(token) == {SPACE_MARK}
            piece.score = SPACES_SCORE if only_spaces else float(NUM_META_PIECES - index)
            piece.type = kinds.NORMAL
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(vocab)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(model.SerializeToString(deterministic=True))


def _check(folder: Path, merges: list[tuple[str, str]]) -> None:
    written = json.loads((folder / HF_FILE).read_text(encoding="utf-8"))["model"]["merges"]
    # tokenizers before 0.20 wrote a merge as one string.
    pairs = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in written
    ]
    if pairs != merges:
        raise TokenizerError(
            f"{PACKAGE}: the merges derived from the scores are not the published."
        )
    tokenizer = load_tokenizer(folder, vocab_size=NUM_TOKENS)
    found = tokenizer("Hello world")["input_ids"]
    if found != [1, 15043, 3186]:
        raise TokenizerError(
            f"{PACKAGE}: 'Hello world' expected as [1, 15043, 3186], found {found}."
        )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Rebuild the Llama 2 tokenizer from an npm package.",
        epilog="Example: python tools/llama2_tokenizer.py --out llama2-tokenizer",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=cache_dir() / "llama2-tokenizer",
        help="folder to write (default: %(default)s)",
    )
    out = parser.parse_args().out.expanduser()
    try:
        print(build(out))
    except (TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
