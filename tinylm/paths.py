"""Where TinyLM keeps what can be made again: tokenised text and fetched vocabularies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return ``$TINYLM_CACHE``, else ``$XDG_CACHE_HOME/tinylm``, else ``~/.cache/tinylm``."""
    own = os.environ.get("TINYLM_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tinylm"
