"""Errors that a user can act on.

Every message names the thing, what was expected, what was found, and the way out. The command
line prints such an error without a traceback and exits with code 2.
"""


class TinyLMError(ValueError):
    """Base of every error that comes from a user's input rather than from a bug."""


class ConfigError(TinyLMError):
    """A configuration value is missing, unknown or out of range."""


class DataError(TinyLMError):
    """A training or evaluation file can't be used."""


class TokenizerError(TinyLMError):
    """A tokenizer can't be loaded, or doesn't fit the model."""


class CheckpointError(TinyLMError):
    """A checkpoint is missing, incomplete, altered, or belongs to another model."""


class TrainingDivergedError(TinyLMError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class ExportError(TinyLMError):
    """A model can't be exported, or an exported directory can't be used."""


class NativeError(TinyLMError):
    """The native library can't be built, found or used."""


class NativeToolError(NativeError):
    """A tool or header that the native build needs is not on this machine."""
