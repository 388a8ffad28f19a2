"""Text from tokens that arrive one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Tokens before the new ones that decide about spaces at the joint.
_CONTEXT_TOKENS = 6
_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


class TextStream:
    """Turns tokens into text as they come, never in the middle of a character.

    The concatenated pieces, with :meth:`finish` at the end, are the text that decoding all tokens
    at once adds to the prompt.

    Args:
        tokenizer: A transformers tokenizer.
        prompt_ids: The tokens before the first new one.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._shown = len(self._ids)  # tokens whose text was given
        self._start = 0  # tokens before are no longer decoded

    def add(self, token: int) -> str:
        """Take a token and return the text that is certain now, perhaps none."""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._start = max(self._start, self._shown - _CONTEXT_TOKENS)
        self._shown = len(self._ids)
        return new

    def finish(self) -> str:
        """Return what is left, such as an unfinished character."""
        new = self._new_text()
        self._shown = len(self._ids)
        return new

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
