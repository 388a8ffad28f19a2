"""tinylm_export: from a TinyLM checkpoint to ONNX and its runtimes."""

if __name__ != "tinylm_export":
    raise ImportError(
        f"this folder installs as 'tinylm_export' and was imported as {__name__!r}; "
        "run `pip install -e .` in the project's root and import tinylm_export."
    )
