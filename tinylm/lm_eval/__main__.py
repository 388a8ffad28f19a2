"""lm-evaluation-harness's own command line, with the model ``tinylm`` registered."""

from __future__ import annotations

import sys

import tinylm.lm_eval  # noqa: F401 (registers the model)
from tinylm.cli_shared import EXIT_USAGE
from tinylm.errors import TinyLMError


def main() -> None:
    """Run it; a TinyLM error ends with one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except TinyLMError as error:
        print(f"tinylm.lm_eval: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
