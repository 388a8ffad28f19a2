"""The lm-evaluation-harness adapter: checkpoint and ONNX directories, local tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from model_helpers import make_model
from tolerances import LOG_LIKELIHOOD
from training_helpers import inputs

try:
    import lm_eval
except ImportError:
    pytest.skip(
        "NOT TESTED: lm-eval is not installed; pip install 'tinylm[eval]'", allow_module_level=True
    )

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tinylm import TinyLM
from tinylm.checkpoint import save_model
from tinylm.errors import CheckpointError, ConfigError, DataError, ExportError
from tinylm.lm_eval import TinyLMHarness, open_runtime
from tinylm.lm_eval.__main__ import main
from tinylm.text_stream import TextStream
from tinylm.tokenizer import load_tokenizer
from tinylm_export.to_onnx import export_onnx

CONTEXT = 48
TEXTS = [
    "def rows(self):\n    return self._rows\n",
    "Return the number of tokens. " * 12,  # several windows
    "x",
    "The cache holds the latent and its scale, for each token and layer; nothing else is kept.",
]
CHOICES = [
    {"question": "The model takes", "choices": ["ids", "a mask", "the logits"], "answer": 1},
    {"question": "def __init__(self", "choices": [") -> None:", ", x)"], "answer": 0},
    {"question": "Return the", "choices": ["number of rows", "batch", "x"], "answer": 2},
    {"question": " ".join(TEXTS[3:]), "choices": ["Yes", "No"], "answer": 0},
]
PAIRS = [(doc["question"], f" {choice}") for doc in CHOICES for choice in doc["choices"]]
PAIRS += [("", TEXTS[0]), (" ", "x")]


class Directories(NamedTuple):
    checkpoint: Path
    onnx: Path  # with a cache, logits at the last token
    all_logits: Path
    plain: Path  # without a cache


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = load_tokenizer(inputs().tokenizer)
    model = make_model(
        seed=5,
        tie_embeddings=False,
        vocab_size=len(tokenizer),
        max_seq_len=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    checkpoint = save_model(folder / "checkpoint", model, tokenizer=tokenizer)
    return Directories(
        checkpoint,
        export_onnx(checkpoint, folder / "onnx"),
        export_onnx(checkpoint, folder / "all", all_logits=True),
        export_onnx(checkpoint, folder / "plain", task="text-generation"),
    )


def harness(directory: Path, batch_size: int = 3, **options: Any) -> TinyLMHarness:
    return TinyLMHarness(str(directory), batch_size=batch_size, **options)


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def scores(lm: TinyLMHarness, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, list[bool]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    return torch.tensor([score for score, _ in found]), [greedy for _, greedy in found]


def rolling(lm: TinyLMHarness, texts: list[str]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        items = requests("loglikelihood_rolling", [(text,) for text in texts])
        return torch.tensor(lm.loglikelihood_rolling(items, disable_tqdm=True))


def continuations(lm: TinyLMHarness, jobs: list[tuple[str, dict[str, Any]]]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return lm.generate_until(requests("generate_until", jobs), disable_tqdm=True)


@torch.no_grad()
def log_probabilities(model: TinyLM, ids: list[int]) -> torch.Tensor:
    """What the model gives to each token but the first, [len - 1, V]."""
    return model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)


def test_log_likelihoods_are_the_models(directories: Directories) -> None:
    model, tokenizer = (
        TinyLM.from_pretrained(directories.checkpoint),
        load_tokenizer(directories.checkpoint),
    )
    found, greedy = scores(harness(directories.checkpoint), PAIRS)
    for (context, continuation), score, top in zip(PAIRS, found, greedy, strict=True):
        whole = tokenizer(context + continuation)["input_ids"]
        num = len(whole) - len(tokenizer(context.rstrip())["input_ids"])
        ids = whole[-(CONTEXT + 1) :]
        rows = log_probabilities(model, ids)[-num:]
        wanted = torch.tensor(ids[-num:])
        LOG_LIKELIHOOD.assert_close(score, rows.gather(1, wanted[:, None]).sum())
        assert top == bool((rows.argmax(-1) == wanted).all())


def test_a_greedy_continuation_is_greedy(directories: Directories) -> None:
    model, lm = TinyLM.from_pretrained(directories.checkpoint), harness(directories.checkpoint)
    context = lm.tok_encode("def rows(")
    made = model.generate(torch.tensor([context]), max_new_tokens=4)[0, len(context) :].tolist()
    other = [*made[:3], (made[3] + 1) % model.config.vocab_size]
    found = lm._loglikelihood_tokens(
        [(None, context, made), (None, context, other)], disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_rolling_likelihoods_are_the_models(directories: Directories) -> None:
    model, lm = TinyLM.from_pretrained(directories.checkpoint), harness(directories.checkpoint)
    found = rolling(lm, [*TEXTS, ""])
    expected = []
    for text in TEXTS:
        tokens = lm.tok_encode(text)  # with the token that begins a document
        assert tokens[0] == lm.prefix_token_id == 1
        start, total = 1, torch.zeros((), dtype=torch.float64)
        while start < len(tokens):
            end = min(start + CONTEXT, len(tokens))
            window = tokens[max(0, end - 1 - CONTEXT) : end]  # the last one has a full context
            rows = log_probabilities(model, window)[-(end - start) :]
            total += rows.gather(1, torch.tensor(tokens[start:end])[:, None]).sum()
            start = end
        expected.append(total)
    LOG_LIKELIHOOD.assert_close(found[:-1], torch.stack(expected))
    assert found[-1] == 0.0


@pytest.mark.parametrize("kind", ["checkpoint", "onnx", "all_logits", "plain"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batch_size_and_runtime_do_not_matter(
    directories: Directories, kind: str, batch_size: int
) -> None:
    expected = harness(directories.checkpoint)
    lm = harness(getattr(directories, kind), batch_size)
    found, greedy = scores(lm, PAIRS)
    wanted, wanted_greedy = scores(expected, PAIRS)
    LOG_LIKELIHOOD.assert_close(found, wanted)
    assert greedy == wanted_greedy
    LOG_LIKELIHOOD.assert_close(rolling(lm, TEXTS), rolling(expected, TEXTS))
    if kind != "plain":
        jobs = [(text, {"until": [], "max_gen_toks": 6}) for text in TEXTS]
        assert continuations(lm, jobs) == continuations(expected, jobs)


def test_generation_is_the_models(directories: Directories) -> None:
    model, lm = TinyLM.from_pretrained(directories.checkpoint), harness(directories.checkpoint)
    jobs: list[tuple[str, dict[str, Any]]] = []
    expected = []
    for text in (*TEXTS, ""):
        ids = lm.tok_encode(text)[-(CONTEXT - 10) :]  # the prompt leaves room for what is asked
        out = model.generate(torch.tensor([ids]), max_new_tokens=10)[0, len(ids) :].tolist()
        pieces = TextStream(lm.tokenizer, ids)
        made = "".join(pieces.add(token) for token in out) + pieces.finish()
        jobs.append((text, {"until": "never there", "max_gen_toks": 10, "do_sample": False}))
        expected.append(made)
        stop = made[3:5]
        jobs.append((text, {"until": [stop, "\x00"], "max_gen_toks": 10, "temperature": 0}))
        expected.append(made[: made.find(stop)])
    assert len(set(expected)) > 5, "the test needs texts that differ"
    assert continuations(lm, jobs) == expected
    assert continuations(harness(directories.checkpoint, 1), jobs) == expected


def test_sampling_follows_the_seed_and_not_the_batch(directories: Directories) -> None:
    options = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "max_gen_toks": 8}
    jobs = [(text, {**options, "seed": seed}) for text in TEXTS for seed in (0, 1)]
    found = continuations(harness(directories.checkpoint), jobs)
    assert found == continuations(harness(directories.checkpoint, 8), jobs[::-1])[::-1]
    assert any(a != b for a, b in zip(found[::2], found[1::2], strict=True))


def test_long_contexts_lose_their_beginning_and_warn_once(directories: Directories) -> None:
    lm = harness(directories.checkpoint)
    pair = (TEXTS[1] * 2, " The")
    with pytest.warns(RuntimeWarning, match="context of 48 tokens") as caught:
        for _ in range(2):
            lm.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)
    assert len(caught) == 1


def test_last_token_graphs_say_that_they_are_slow(directories: Directories) -> None:
    lm = harness(directories.onnx)
    with pytest.warns(RuntimeWarning, match="--all-logits") as caught:
        for _ in range(2):
            lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)
    assert len(caught) == 1


def test_bad_arguments(directories: Directories, tmp_path: Path) -> None:
    path = str(directories.checkpoint)
    for options, error, message in (
        (
            {"batch_size": "auto"},
            ConfigError,
            "batch_size must be a positive integer, found 'auto'",
        ),
        ({"batch_size": 0}, ConfigError, "batch_size must be"),
        ({"max_batch_size": 64}, ConfigError, "max_batch_size is for automatic"),
        ({"precision": "fp64"}, ConfigError, "precision must be one of"),
        ({"device": "nowhere"}, ConfigError, "device must be"),
        ({"pretrained": str(tmp_path)}, CheckpointError, "an empty directory.*model.onnx"),
        (
            {"pretrained": str(directories.onnx), "device": "cuda:1"},
            ConfigError,
            "device must be auto or cpu for a directory with model.onnx, found 'cuda:1'",
        ),
        (
            {"pretrained": str(directories.onnx), "precision": "bf16"},
            ConfigError,
            "precision must be fp32 for a directory with model.onnx",
        ),
    ):
        with pytest.raises(error, match=message):
            TinyLMHarness(**{"pretrained": path, **options})
    lm = harness(directories.checkpoint)
    with pytest.raises(DataError, match="1 to 48 tokens"):
        lm.loglikelihood(requests("loglikelihood", [("x", TEXTS[1])]), disable_tqdm=True)
    for arguments, message in (
        ({"beams": 4}, "unknown beams"),
        ({"max_gen_toks": 48}, "max_gen_toks must leave room"),
        ({"max_gen_toks": -1}, "max_gen_toks must be a positive integer"),
        ({"do_sample": True, "top_p": 2}, "top_p must be"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            continuations(lm, [("x", arguments)])
    with pytest.raises(ExportError, match="no cache"):
        continuations(harness(directories.plain), [("x", {})])


def test_runtimes_are_announced(directories: Directories) -> None:
    assert type(open_runtime(directories.onnx)).__name__ == "OnnxRuntime"
    assert type(open_runtime(directories.checkpoint)).__name__ == "TorchRuntime"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks over two local JSON files."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [{"text": text, "start": text[:20], "end": text[20:40]} for text in TEXTS]
    for name, rows in {"choices": CHOICES, "texts": texts}.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def task(name: str, data: str, **fields: Any) -> None:
        files = {"test": str(folder / f"{data}.json")}
        values = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **fields,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    task(
        "tinylm_choices",
        "choices",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    task(
        "tinylm_bits",
        "texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    task(
        "tinylm_continue",
        "texts",
        output_type="generate_until",
        doc_to_text="{{start}}",
        doc_to_target="{{end}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


TASK_NAMES = ["tinylm_choices", "tinylm_bits", "tinylm_continue"]


def run_tasks(folder: Path, directory: Path, batch_size: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = lm_eval.simple_evaluate(
            model="tinylm",
            model_args={"pretrained": str(directory)},
            tasks=TASK_NAMES,
            batch_size=batch_size,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    assert result is not None
    return result


def test_local_tasks(directories: Directories, tasks: Path) -> None:
    whole = run_tasks(tasks, directories.checkpoint, 4)
    results = whole["results"]
    lm = harness(directories.checkpoint)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    nats = -float(rolling(lm, TEXTS).sum()) / num_bytes
    found = results["tinylm_bits"]["bits_per_byte,none"]
    LOG_LIKELIHOOD.assert_close(torch.tensor(found), torch.tensor(nats / 0.6931471805599453))
    hits, start = 0, 0
    values, _ = scores(lm, PAIRS)
    for doc in CHOICES:
        end = start + len(doc["choices"])
        hits += int(values[start:end].argmax()) == doc["answer"]
        start = end
    assert results["tinylm_choices"]["acc,none"] == hits / len(CHOICES)
    made = [sample["resps"][0][0] for sample in whole["samples"]["tinylm_continue"]]
    jobs = [(text[:20], {"until": ["\n"], "max_gen_toks": 8}) for text in TEXTS]
    assert made == continuations(lm, jobs)
    for directory, batch_size in ((directories.checkpoint, 1), (directories.all_logits, 3)):
        other = run_tasks(tasks, directory, batch_size)["results"]
        for task, metrics in results.items():
            for name, value in metrics.items():
                if isinstance(value, float):
                    LOG_LIKELIHOOD.assert_close(
                        torch.tensor(other[task][name]), torch.tensor(value)
                    )


def arguments(pretrained: Path, tasks: Path, out: Path) -> list[str]:
    options = ["run", "--model", "tinylm", "--model_args", f"pretrained={pretrained}"]
    options += ["--tasks", "tinylm_bits", "--include_path", str(tasks), "--batch_size", "2"]
    return [*options, "--output_path", str(out)]


@pytest.mark.slow
def test_command(directories: Directories, tasks: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tinylm.lm_eval"),
            *arguments(directories.checkpoint, tasks, tmp_path / "out.json"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout
    (written,) = tmp_path.rglob("*.json")
    assert "tinylm_bits" in json.loads(written.read_text())["results"]


@pytest.mark.slow
def test_command_names_the_problem(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *arguments(tmp_path / "none", tasks, tmp_path / "o")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"tinylm.lm_eval: {tmp_path / 'none'}: expected a checkpoint" in capsys.readouterr().err
