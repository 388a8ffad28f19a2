"""Loading, training and saving tokenizers.

A tokenizer is a Hugging Face one with ``pad_token = eos_token`` and right padding. Those that
TinyLM trains are Llama-style SentencePiece BPE models, saved in both forms: ``tokenizer.model``
for SentencePiece (C++), ``tokenizer.json`` for Hugging Face. Both give the same ids.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.errors import DataError, TokenizerError
from tinylm.jsonl import read_jsonl
from tinylm.spm_convert import convert_sentencepiece, parse_sentencepiece, special_piece

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

DEFAULT_TOKENIZER = "meta-llama/Llama-2-7b-hf"
DEFAULT_VOCAB_SIZE = 4096

HF_FILE = "tokenizer.json"
SPM_FILE = "tokenizer.model"
_CONFIG_FILE = "tokenizer_config.json"
# transformers writes these into the config, though they tell nothing about the tokenizer.
_LOADING_KEYS = ("name_or_path", "vocab_file", "tokenizer_file", "is_local", "local_files_only")
_HUB_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_TIMEOUT_SECONDS = 10.0
_WAYS_OUT = (
    "Give a folder or file that holds a tokenizer, make one from your text with "
    "`tinylm tokenizer train`, or rebuild the Llama 2 tokenizer with "
    "`python tools/llama2_tokenizer.py`"
)

# BPE needs no more text than this to rank its pieces; larger inputs are sampled evenly.
_MAX_TRAINING_CHARS = 64_000_000
_MAX_LINE_CHARS = 100_000
# Never inside a piece: line breaks and NUL travel as byte tokens, and SentencePiece drops whole
# lines that hold U+2585, its own mark for unknown characters.
_LINE_BREAKS = re.compile("[\n\x00\u2585]")
_NUM_META_PIECES = 3 + 256  # <unk>, <s>, </s> and one piece per byte
_LLAMA_CHARACTER_COVERAGE = 0.99995
_MIN_CHARACTER_COVERAGE = 0.98  # SentencePiece refuses less


def load_tokenizer(
    source: str | Path = DEFAULT_TOKENIZER, *, vocab_size: int | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with ``pad_token = eos_token`` and right padding.

    A ``tokenizer.json`` is taken exactly as it is written. (``AutoTokenizer`` of transformers 5
    rebuilds a class named ``LlamaTokenizer`` from its vocabulary and then encodes ``" Hello"``
    and ``"Hello"`` alike, unlike SentencePiece.) A lone SentencePiece ``.model`` is converted;
    anything else is left to ``AutoTokenizer``.

    Args:
        source: A folder (a checkpoint too), a ``tokenizer.json``, a SentencePiece ``.model``, or
            a Hugging Face hub id.
        vocab_size: Number of rows of the model's embedding, to check against.

    Raises:
        TokenizerError: Nothing usable at ``source``, no end token, or ids at or above
            ``vocab_size``.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        tokenizer = _load_folder(path)
    elif path.is_file():
        tokenizer = _load_file(path)
    elif _HUB_ID.fullmatch(str(source)) and path.suffix not in (".json", ".model"):
        tokenizer = _load_folder(_download(str(source)))
    else:
        raise TokenizerError(f"tokenizer {str(source)!r}: no such file or folder. {_WAYS_OUT}.")
    _set_padding(tokenizer, str(source))
    found = num_token_ids(tokenizer)
    if vocab_size is not None and found > vocab_size:
        raise TokenizerError(
            f"tokenizer {str(source)!r}: the model's vocabulary has {vocab_size} ids, the "
            f"tokenizer has {found}. Use the tokenizer the model was trained with, or train a "
            f"model with vocab_size {found} or more."
        )
    return tokenizer


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the smallest vocabulary size that holds every id; ids may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Write a tokenizer's files into a folder, the same bytes for the same tokenizer.

    ``tokenizer.model`` is copied along where the tokenizer was loaded from beside one.

    Args:
        tokenizer: A tokenizer from :func:`load_tokenizer`.
        directory: Where to write; made if missing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer.is_fast:
        # State of the latest call, not of the tokenizer.
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(directory)
    config_path = directory / _CONFIG_FILE
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for how_it_was_loaded in _LOADING_KEYS:
        config.pop(how_it_was_loaded, None)
    if tokenizer.is_fast and (directory / HF_FILE).is_file():
        # The one name that every transformers version knows and takes tokenizer.json as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("backend", None)
        # transformers 4 repeats the config's special tokens there, in a form that varies.
        (directory / "special_tokens_map.json").unlink(missing_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    config_path.write_text(text + "\n", encoding="utf-8")
    model = _sentencepiece_source(tokenizer)
    target = directory / SPM_FILE
    if model is not None and model.resolve() != target.resolve():
        shutil.copyfile(model, target)


def train_tokenizer(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    skip_bad_lines: bool = False,
) -> Path:
    """Train a Llama-style SentencePiece BPE tokenizer on JSON lines.

    Byte fallback, digits one by one, no normalisation, spaces kept, ids 0 ``<unk>``, 1 ``<s>``,
    2 ``</s>``, then 256 bytes. As in Llama's, line breaks are byte tokens and indentation has
    pieces of its own. The same text gives the same files on any machine.

    Args:
        files: Files of lines ``{"text": ...}``, plain or gzip.
        out: Folder to write ``tokenizer.model``, ``tokenizer.json`` and its config into.
        vocab_size: Number of ids, all included.
        skip_bad_lines: Leave bad lines out instead of raising.

    Returns:
        ``out`` as a path.

    Raises:
        DataError: A file can't be used.
        TokenizerError: The text is too little for ``vocab_size``, or ``vocab_size`` too small for
            the text; the message says which size works.
    """
    if not files:
        raise DataError("no training files for the tokenizer. Give at least one JSON lines file.")
    names = ", ".join(str(file) for file in files)
    characters: Counter[str] = Counter()
    num_chars = 0
    for line in _training_lines(files, skip_bad_lines):
        characters.update(line)
        num_chars += len(line)
    if not num_chars:
        raise DataError(f"{names}: expected text to train a tokenizer on, found only empty texts.")
    share = min(1.0, _MAX_TRAINING_CHARS / num_chars)
    lines = _training_lines(files, skip_bad_lines)
    model = _train_sentencepiece(
        _take_evenly(lines, share) if share < 1.0 else lines,
        vocab_size=vocab_size,
        character_coverage=_character_coverage(characters, vocab_size),
        source=names,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / SPM_FILE).write_bytes(model)
    tokenizer = _from_sentencepiece(out / SPM_FILE)
    _set_padding(tokenizer, str(out))
    save_tokenizer(tokenizer, out)
    return out


def _set_padding(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if tokenizer.eos_token is None:
        raise TokenizerError(
            f"tokenizer {source!r}: expected an end token (eos_token), found none; it ends "
            f"documents and fills short rows. Name it in {_CONFIG_FILE}."
        )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"


def _load_folder(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / HF_FILE).is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        if (folder / SPM_FILE).is_file():
            return _from_sentencepiece(folder / SPM_FILE)
        if (folder / _CONFIG_FILE).is_file():
            return AutoTokenizer.from_pretrained(str(folder))
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise TokenizerError(
            f"tokenizer folder {folder}: its files can't be read ({_first_line(error)}). "
            f"{_WAYS_OUT}."
        ) from error
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:8]) or "nothing"
    raise TokenizerError(
        f"tokenizer folder {folder}: expected {HF_FILE} or {SPM_FILE}, found {found}. {_WAYS_OUT}."
    )


def _load_file(path: Path) -> PreTrainedTokenizerBase:
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    if path.name == HF_FILE:
        # Special tokens have their names in the files beside it.
        return _load_folder(path.parent)
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise TokenizerError(
            f"tokenizer file {path}: expected a Hugging Face {HF_FILE} or a SentencePiece .model "
            f"({_first_line(error)}). {_WAYS_OUT}."
        ) from error
    return _wrap(backend, name_or_path=str(path))


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    content = path.read_bytes()
    proto = parse_sentencepiece(content, str(path))
    special = {
        f"{kind}_token": piece
        for kind in ("bos", "eos", "unk")
        if (piece := special_piece(proto, kind)) is not None
    }
    # As in SentencePiece itself, "</s>" inside a text is four characters, not the end token.
    return _wrap(
        convert_sentencepiece(content, str(path)),
        name_or_path=str(path),
        split_special_tokens=True,
        **special,
    )


def _wrap(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **kwargs
    )


def _download(hub_id: str) -> Path:
    """Return the local folder of a hub repository's tokenizer files, fetched or cached."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=list(_HUB_FILES), etag_timeout=_HUB_TIMEOUT_SECONDS
            )
        )
    except Exception as error:  # the hub's errors share no base class across its versions
        raise TokenizerError(
            f"tokenizer {hub_id!r}: no such file or folder here, and the Hugging Face hub did not "
            f"give it ({_first_line(error)}). {_WAYS_OUT}; or connect to the network and, for a "
            "gated model, accept its licence and run `hf auth login`."
        ) from error


def _sentencepiece_source(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Return the SentencePiece file the tokenizer was loaded from, or beside."""
    origin = Path(tokenizer.name_or_path)
    if not tokenizer.name_or_path or not origin.exists():
        return None
    model = origin if origin.suffix == ".model" else origin / SPM_FILE
    return model if model.is_file() else None


def _training_lines(files: Sequence[str | Path], skip_bad_lines: bool) -> Iterator[str]:
    for file in files:
        for text in read_jsonl(file, skip_bad_lines=skip_bad_lines):
            for line in _LINE_BREAKS.split(text):
                for start in range(0, len(line), _MAX_LINE_CHARS):
                    yield line[start : start + _MAX_LINE_CHARS]


def _take_evenly(lines: Iterator[str], share: float) -> Iterator[str]:
    """Yield about ``share`` of the lines, evenly spaced."""
    for index, line in enumerate(lines):
        if int((index + 1) * share) > int(index * share):
            yield line


def _character_coverage(characters: Counter[str], vocab_size: int) -> float:
    """Return Llama's coverage, or less where single characters would fill the vocabulary.

    At most a quarter of the free ids go to single characters, so far as SentencePiece allows it.
    """
    room = max(1, (vocab_size - _NUM_META_PIECES) // 4)
    covered = sum(count for _, count in characters.most_common(room))
    coverage = covered / characters.total()
    return min(_LLAMA_CHARACTER_COVERAGE, max(_MIN_CHARACTER_COVERAGE, coverage))


def _train_sentencepiece(
    lines: Iterator[str], *, vocab_size: int, character_coverage: float, source: str
) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * _MAX_LINE_CHARS,
            # Written into the model file, so never the machine's own number.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_training_problem(str(error), vocab_size, source)) from error
    return model.getvalue()


def _training_problem(message: str, vocab_size: int, source: str) -> str:
    if limit := re.search(r"value <= (\d+)", message):
        return (
            f"{source}: too little text for a vocabulary of {vocab_size}. The largest that works "
            f"is {limit[1]}; use that, or give more text."
        )
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{source}: a vocabulary of {vocab_size} can't hold the bytes and the characters of "
            f"this text. Use at least {needed[1]}; a few thousand is a good choice."
        )
    return f"{source}: SentencePiece can't train on it ({message})."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
