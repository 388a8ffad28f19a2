"""SentencePiece BPE model -> Hugging Face `tokenizers`, with identical ids for every text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinylm.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE_MARK = "\u2581"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
# Both sides must agree on these before a conversion is handed out.
_PROBES = (
    "Hello world",
    "  two leading, two trailing  ",
    "\ttab\n\n    indent\r\n",
    "3.14159 2024 007",
    "naïve Ωμέγα 日本語 🦙 e\u0301",
    "\x00\x7f\u200b\ufeff",
    "",
    "</s><unk><0x0A>",
)


def parse_sentencepiece(model: bytes, source: str) -> Any:
    """Decode a serialised SentencePiece ``ModelProto``.

    Args:
        model: Content of a ``.model`` file.
        source: Where it came from, for error messages.

    Raises:
        TokenizerError: The bytes are not a SentencePiece model.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb2

    # protobuf makes the class at run time.
    proto = pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError, which has no type stubs
        raise TokenizerError(f"{source}: not a SentencePiece model ({error}).") from error
    if not proto.pieces:
        raise TokenizerError(f"{source}: not a SentencePiece model (it holds no pieces).")
    return proto


def convert_sentencepiece(model: bytes, source: str) -> Tokenizer:
    """Convert a Llama-style SentencePiece BPE model.

    SentencePiece merges the neighbours whose joined piece has the best score. A BPE merge list
    says the same when it holds every split of every piece, ordered by that score.

    Args:
        model: Content of a ``.model`` file.
        source: Where it came from, for error messages.

    Returns:
        A tokenizer that puts the begin token, where the model has one, before each text.

    Raises:
        TokenizerError: Not a SentencePiece model, or one with a feature that `tokenizers` can't
            reproduce exactly.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    proto = parse_sentencepiece(model, source)
    _check_features(proto, source)
    unknown = next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    prefix = proto.normalizer_spec.add_dummy_prefix
    replace = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE_MARK), replace]) if prefix else replace
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in special]
    )
    bos = special_piece(proto, "bos")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, proto.trainer_spec.bos_id)],
        )
    _check_probes(tokenizer, model, source)
    return tokenizer


def special_piece(proto: Any, kind: str) -> str | None:
    """Return the text of the ``"bos"``, ``"eos"`` or ``"unk"`` piece; None if there is none."""
    index: int = getattr(proto.trainer_spec, f"{kind}_id")
    return str(proto.pieces[index].piece) if 0 <= index < len(proto.pieces) else None


def _check_features(proto: Any, source: str) -> None:
    normalizer = proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    problems = {
        "its algorithm is not BPE": proto.trainer_spec.model_type != _BPE,
        "it normalises Unicode": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it has user-defined or unused pieces": bool(kinds - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}),
        "it has no unknown piece": _UNKNOWN not in kinds,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise TokenizerError(
            f"{source}: expected a Llama-style SentencePiece model (BPE, identity normalisation, "
            f"spaces kept), but {', '.join(found)}. Give a folder or file with its tokenizer.json."
        )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """List every split of every piece into two pieces, best score first."""
    ids = {p.piece: index for index, p in enumerate(proto.pieces) if p.type == _NORMAL}
    ranked = [
        (-proto.pieces[index].score, ids[piece[:cut]], ids[piece[cut:]])
        for piece, index in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    # Among the splits of one piece the order is that of the published Llama 2 merges.
    ranked.sort()
    return [(proto.pieces[left].piece, proto.pieces[right].piece) for _, left, right in ranked]


def _check_probes(tokenizer: Tokenizer, model: bytes, source: str) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    # Plain text never means a special token; set on this object only, it is not serialised.
    tokenizer.encode_special_tokens = True
    for text in _PROBES:
        expected = processor.encode(text)
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != expected:
            raise TokenizerError(
                f"{source}: can't be converted exactly: SentencePiece encodes {text!r} as "
                f"{expected}, the conversion as {found}. Give its tokenizer.json instead."
            )
