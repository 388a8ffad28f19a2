"""Checks of Python, its packages, ONNX Runtime and the tokenizers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from tinylm.errors import TinyLMError
from tinylm.paths import cache_dir
from tinylm_export.doctor_check import Check
from tinylm_export.machine import installed_versions

MIN_PYTHON = (3, 10)
LLAMA2_FOLDER = "llama2-tokenizer"  # where tools/llama2_tokenizer.py puts it


def check_python(version: tuple[int, int, int] = sys.version_info[:3]) -> Check:
    """Check the interpreter's version."""
    found = ".".join(map(str, version))
    needed_for = "everything"
    if version[:2] >= MIN_PYTHON:
        return Check(name="Python", status="ok", found=found, needed_for=needed_for)
    lowest = ".".join(map(str, MIN_PYTHON))
    return Check(
        name="Python",
        status="problem",
        found=f"{found}, expected {lowest} or newer",
        needed_for=needed_for,
        command=f"python{lowest} -m venv .venv",
    )


def check_requirements(requirements: list[str] | None = None) -> Check:
    """Check the packages that tinylm declares, extras apart.

    Args:
        requirements: As in a package's metadata; default tinylm's own.
    """
    from packaging.requirements import Requirement

    name, needed_for = "Python packages", "training and export"
    if requirements is None:
        try:
            requirements = metadata.requires("tinylm") or []
        except metadata.PackageNotFoundError:
            return Check(
                name=name,
                status="missing",
                found="tinylm itself is not installed",
                needed_for=needed_for,
                command="pip install -e '.[cpu]'",
            )
    parsed = [Requirement(text) for text in requirements]
    needed = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    have = installed_versions(tuple(r.name for r in needed))
    absent = [r for r in needed if r.name not in have]
    old = [r for r in needed if r.name in have and not r.specifier.contains(have[r.name], True)]
    if not absent and not old:
        shown = ("torch", "transformers", "onnx", "onnx-ir")
        found = ", ".join(f"{package} {have[package]}" for package in shown if package in have)
        return Check(name=name, status="ok", found=found or "all there", needed_for=needed_for)
    problems = [f"{r.name} not found" for r in absent]
    problems += [f"{r.name} {have[r.name]}, expected {r.specifier}" for r in old]
    return Check(
        name=name,
        status="missing" if absent else "problem",
        found="; ".join(problems),
        needed_for=needed_for,
        command="pip install " + " ".join(f"'{r.name}{r.specifier}'" for r in absent + old),
    )


def check_onnxruntime_package(installed: Mapping[str, str]) -> Check:
    """Check that exactly one of the two ONNX Runtime packages is installed.

    Args:
        installed: Versions of ``onnxruntime`` and ``onnxruntime-gpu``, those that are there.
    """
    name, needed_for = "ONNX Runtime", "running, checking and measuring exported models"
    found = ", ".join(f"{package} {version}" for package, version in installed.items())
    if len(installed) > 1:
        return Check(
            name=name,
            status="problem",
            found=f"{found}: both install the same files, and one overwrites the other",
            needed_for=needed_for,
            command="pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'tinylm[cpu]'"
            "  # or 'tinylm[gpu]' on a CUDA machine",
        )
    if not installed:
        return Check(
            name=name,
            status="missing",
            found="neither onnxruntime nor onnxruntime-gpu",
            needed_for=needed_for,
            command="pip install 'tinylm[cpu]'  # or 'tinylm[gpu]' on a CUDA machine",
        )
    return Check(name=name, status="ok", found=found, needed_for=needed_for)


def check_default_tokenizer() -> Check:
    """Check whether the default tokenizer is on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from tinylm.tokenizer import DEFAULT_TOKENIZER, HF_FILE, SPM_FILE

    name, needed_for = "Default tokenizer", "`tinylm train` without --tokenizer"
    for file in (HF_FILE, SPM_FILE):
        path = try_to_load_from_cache(DEFAULT_TOKENIZER, file)
        if isinstance(path, str):
            found = f"{DEFAULT_TOKENIZER} in the Hugging Face cache"
            return Check(name=name, status="ok", found=found, needed_for=needed_for)
    return Check(
        name=name,
        status="optional",
        found=f"{DEFAULT_TOKENIZER} is not in the Hugging Face cache",
        needed_for=needed_for,
        command=f"hf auth login && hf download {DEFAULT_TOKENIZER} --include 'tokenizer*'"
        "  # or give --tokenizer a folder",
    )


def check_llama2_tokenizer(folder: Path | None = None) -> Check:
    """Check the Llama 2 tokenizer that ``tools/llama2_tokenizer.py`` builds.

    Args:
        folder: Default: in TinyLM's cache.
    """
    from tinylm.tokenizer import load_tokenizer

    name, needed_for = "Llama 2 tokenizer", "training with Llama 2's vocabulary without the hub"
    folder = folder or cache_dir() / LLAMA2_FOLDER
    command = "python tools/llama2_tokenizer.py"
    if not folder.exists():
        return Check(
            name=name,
            status="optional",
            found=f"not in {folder}",
            needed_for=needed_for,
            command=command,
        )
    try:
        ids = load_tokenizer(folder)("Hello world")["input_ids"]
    except TinyLMError as error:
        found = str(error)
    else:
        if ids == [1, 15043, 3186]:
            return Check(name=name, status="ok", found=str(folder), needed_for=needed_for)
        found = f"{folder}: 'Hello world' expected as [1, 15043, 3186], found {ids}"
    return Check(
        name=name,
        status="problem",
        found=found,
        needed_for=needed_for,
        command=f"rm -r '{folder}' && {command}",
    )
