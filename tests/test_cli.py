import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_helpers import Cli, command_line
from training_helpers import VOCAB_SIZE, inputs, losses, trainer, write_jsonl

from tinylm import TinyLM
from tinylm.cli import main
from tinylm.cli_train import _FLAGS
from tinylm.run_settings import load_layer, resolve
from tinylm.text_stream import TextStream
from tinylm.tokenizer import load_tokenizer
from tinylm.training_config import SECTIONS

COMMANDS = (
    ["train"],
    ["eval"],
    ["generate"],
    ["convert"],
    ["tokenizer", "train"],
    ["data", "sample"],
    ["data", "prepare"],
)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(main, capsys)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps."""
    out = tmp_path_factory.mktemp("cli") / "run"
    trainer(out).train()
    return out


def train_arguments(out: Path) -> list[Any]:
    data = inputs()
    return [
        *("train", "--preset", "tinylm-test", "--tokenizer", data.tokenizer),
        *("--train-file", data.train, "--val-file", data.val, "--out", out),
        *("--max-steps", 3, "--warmup-steps", 1, "--batch-size", 2, "--max-seq-len", 32),
        *("--eval-max-tokens", 100, "--sample-tokens", 4, "--no-tensorboard", "--device", "cpu"),
    ]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(cli: Cli, command: list[str]) -> None:
    code, out, _ = cli(*command, "--help")
    assert code == 0
    assert f"Example: tinylm {' '.join(command)} " in " ".join(out.split())


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys\nfrom tinylm.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_setting_is_a_flag_with_a_help_text() -> None:
    flags = {(flag.section, flag.name) for flag in _FLAGS}
    for section, owner in SECTIONS.items():
        for name in owner.__dataclass_fields__:
            assert ((section, name) in flags) != name.endswith("_token_id"), name
    for flag in _FLAGS:
        assert len(flag.parameter.annotation.__metadata__[0].help) > 10, flag.name


def test_from_text_to_text(cli: Cli, tmp_path: Path) -> None:
    data = inputs()
    code, out, err = cli(
        *("tokenizer", "train", "--file", data.train, "--out", tmp_path / "tok"),
        *("--vocab-size", 400),
    )
    assert (code, err) == (0, "") and "400 tokens" in out

    run = tmp_path / "run"
    code, out, err = cli(
        *train_arguments(run), "--tokenizer", tmp_path / "tok", "--json", tmp_path / "train.json"
    )
    assert code == 0, err
    assert "unigram entropy" in out and "Best checkpoint: " in out
    summary = json.loads((tmp_path / "train.json").read_text())
    assert (summary["step"], summary["stopped"]) == (3, False)

    code, out, err = cli("eval", run, "--file", data.val, "--json", tmp_path / "eval.json")
    assert code == 0, err
    result = json.loads((tmp_path / "eval.json").read_text())
    assert f"{result['perplexity']:.4f}" in out and f"{result['bits_per_byte']:.5f}" in out
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    texts = [json.loads(line)["text"] for line in data.val.read_text().splitlines()]
    assert result["num_bytes"] == sum(len(text.encode()) for text in texts)

    prepared = ("--file", data.train, "--val-file", data.val, "--tokenizer", run / "last")
    code, _, err = cli("data", "prepare", *prepared, "--out", tmp_path / "tokens", "--num-proc", 1)
    assert code == 0, err
    code, out, err = cli(
        *("eval", run, "--data", tmp_path / "tokens", "--json", tmp_path / "prepared.json")
    )
    assert code == 0, err
    same = json.loads((tmp_path / "prepared.json").read_text())
    assert same["file"] == str(tmp_path / "tokens")
    for name in ("loss", "bits_per_byte", "num_tokens", "unigram_entropy", "fraction_zero"):
        assert same[name] == result[name]

    code, out, err = cli(
        *("generate", run, "--prompt", "def main(", "--max-new-tokens", 8),
        *("--json", tmp_path / "text.json"),
    )
    assert code == 0, err
    text = json.loads((tmp_path / "text.json").read_text())
    assert out == "def main(" + text["text"] + "\n"
    assert f"[{len(text['ids'])} tokens, " in err


def test_data_sample_writes_both_files(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("data", "sample", "--out", tmp_path / "data", "--max-mb", 0.05)
    assert code == 0, err
    for name in ("train.jsonl", "val.jsonl"):
        assert name in out
        lines = (tmp_path / "data" / name).read_text().splitlines()
        assert lines and all(json.loads(line)["text"] for line in lines)


def test_generate_is_the_models_own_text(cli: Cli, run_dir: Path) -> None:
    code, out, err = cli(
        "generate", run_dir, "--prompt", "import ", "--temperature", 0, "--max-new-tokens", 12
    )
    assert code == 0, err
    model, tokenizer = TinyLM.from_pretrained(run_dir), load_tokenizer(run_dir / "best")
    ids = tokenizer("import ", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12)[0]
    assert out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_generate_repeats_with_the_seed_only(cli: Cli, run_dir: Path) -> None:
    command = ("generate", run_dir, "--prompt", "x", "--temperature", 2, "--max-new-tokens", 20)
    first, again, other = (cli(*command, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("text", ["naïve café → 日本語 🙂!", "a  b\n\tc", "é", "plain words here"])
def test_streamed_pieces_add_up_and_hold_whole_characters(text: str) -> None:
    tokenizer = load_tokenizer(inputs().tokenizer)
    prompt = tokenizer("Say: ")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) or text.isascii()  # bytes of a character come one by one
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    assert start + "".join(pieces) + stream.finish() == whole


def test_streamed_unfinished_character_comes_at_the_end() -> None:
    tokenizer = load_tokenizer(inputs().tokenizer)
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(tokenizer, tokenizer("x")["input_ids"])
    assert [stream.add(token) for token in ids][-2:] == ["", ""]
    assert "\ufffd" in stream.finish()


def assert_clean_error(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    text = " ".join(err.replace("│", " ").split())
    for part in parts:
        assert part in text


def test_errors_of_training_are_one_message_and_exit_code_2(cli: Cli, tmp_path: Path) -> None:
    out, data = tmp_path / "run", inputs()
    base = train_arguments(out)
    missing = tmp_path / "missing.jsonl"
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    cases: list[tuple[list[Any], tuple[str, ...]]] = [
        ([*base, "--train-file", missing], (str(missing), "not found")),
        ([*base, "--train-file", bad], (f"{bad}, line 2", "--skip-bad-lines")),
        ([*base, "--preset", "tinylm-7b"], ("unknown preset 'tinylm-7b'", "tinylm-demo")),
        ([*base, "--vocab-size", 300], ("vocabulary has 300 ids", f"has {VOCAB_SIZE}")),
        ([*base, "--hidden-size", 66], ("hidden_size", "found 66")),
        ([*base, "--tokenizer", tmp_path], ("expected tokenizer.json or tokenizer.model",)),
        ([*base, "--warmup-steps", 3], ("warmup_steps must be less than the run's 3 steps",)),
        ([*base, "--epochs", 1], ("max_steps or epochs, not both",)),
        ([*base, "--out", data.tokenizer], ("not empty", "--resume", "another --out")),
        ([*base, "--out", data.train], ("out must be a directory",)),
        (["train", "--out", out], ("train_file must be given: pass --train-file",)),
        (["train"], ("out must be given: pass --out DIR",)),
        (["train", "--resume"], ("pass its --out DIR",)),
        ([*base, "--schedule", "step"], ("--schedule", "two-stage")),
        ([*base, "--learning-rate", 1], ("No such option", "--learning-rate")),
    ]
    for arguments, parts in cases:
        assert_clean_error(cli(*arguments), *parts)
        assert not out.exists()


def test_errors_of_using_a_model(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    long = " ".join(str(i) for i in range(40))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    cases: list[tuple[list[Any], tuple[str, ...]]] = [
        (["generate", tmp_path / "none", "--prompt", "x"], ("none: expected a checkpoint",)),
        (["generate", run_dir, "--prompt", long], ("context of 32 tokens", "Shorten --prompt")),
        (["generate", run_dir, "--prompt", "x", "--top-p", 2], ("top_p must be in (0, 1]",)),
        (["generate", run_dir, "--prompt", "x", "--precision", "fp8"], ("precision must be",)),
        (["generate", run_dir], ("Missing option", "--prompt")),
        (["eval", run_dir, "--file", tmp_path / "no.jsonl"], ("no.jsonl: not found",)),
        (["eval", run_dir], ("expected text from --file or --data, found neither",)),
        (["eval", run_dir, "--file", empty, "--data", tmp_path], ("found both",)),
        (["eval", run_dir, "--data", tmp_path / "none"], ("none", "tinylm data prepare")),
        (["eval", run_dir, "--file", empty], (str(empty), "no documents")),
        (["eval", run_dir, "--file", latin], (f"{latin}, line 1", "UTF-8")),
        (
            ["eval", run_dir, "--file", inputs().val, "--length", 33],
            ("--length must be at most the model's context of 32 tokens, found 33",),
        ),
        (["data", "sample", "--out", tmp_path, "--max-mb", 0], ("max_bytes must be positive",)),
        (
            ["eval", run_dir, "--file", inputs().val, "--json", empty / "x.json"],
            ("empty.jsonl/x.json: the result can't be written",),
        ),
    ]
    for arguments, parts in cases:
        assert_clean_error(cli(*arguments), *parts)


def test_damaged_checkpoint_is_named(cli: Cli, tmp_path: Path) -> None:
    trainer(tmp_path / "run").train()
    path = (tmp_path / "run" / "best").resolve() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = cli("generate", tmp_path / "run", "--prompt", "x")
    assert_clean_error(result, "model.safetensors: truncated or altered", "Other checkpoints: ")


def test_skipped_lines_are_counted(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", ["A sentence that is fine."])
    bad.write_text(bad.read_text() + "not json\n[]\n")
    code, out, err = cli("eval", run_dir, "--file", bad, "--skip-bad-lines")
    assert code == 0, err
    row = next(line for line in out.splitlines() if "bad lines skipped" in line)
    assert row.split("│")[2].strip() == "2"


def test_eval_reads_windows_of_a_length(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    from tinylm.data import PackedSequences, load_corpus
    from tinylm.evaluate import evaluate

    file = inputs().val
    model = TinyLM.from_pretrained(run_dir)
    corpus = load_corpus(file, load_tokenizer(run_dir / "best"))
    for length, options in ((32, ()), (8, ("--length", 8))):
        code, out, err = cli("eval", run_dir, "--file", file, *options, "--json", tmp_path / "r")
        assert code == 0, err
        assert f"in windows of {length}" in out
        values = json.loads((tmp_path / "r").read_text())
        expected = evaluate(model, PackedSequences(corpus, length))
        assert expected is not None
        assert values["length"] == length
        assert values["num_tokens"] == corpus.num_tokens - 1
        assert values["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert values["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_flags_win_over_the_file_and_the_file_over_defaults(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    data = inputs()
    file.write_text(
        f"""
preset: tinylm-test
model: {{max_seq_len: 32, dropout: 0.2}}
data: {{train_file: {data.train}, val_file: {data.val}, tokenizer: {data.tokenizer}}}
schedule: {{kind: linear, lr: 3e-3, warmup_steps: 1}}
training: {{epochs: 3, batch_size: 2}}
evaluation: {{eval_max_tokens: 100, sample_tokens: 0}}
logging: {{tensorboard: false, log_every: 1}}
"""
    )
    out = tmp_path / "run"
    code, _, err = cli("train", "--config", file, "--out", out, "--lr", 1e-3, "--max-steps", 2)
    assert code == 0, err
    used = json.loads((out / "training_config.json").read_text())
    assert used["schedule"]["lr"] == 1e-3  # flag over file
    assert (used["training"]["max_steps"], used["training"]["epochs"]) == (2, None)
    assert (used["schedule"]["kind"], used["model"]["dropout"]) == ("linear", 0.2)  # file
    assert (used["optimizer"]["weight_decay"], used["model"]["hidden_size"]) == (0.1, 64)  # default
    assert used["data"]["train_file"] == str(data.train)

    # What a run leaves behind makes the same run again.
    again = tmp_path / "again"
    code, _, err = cli("train", "--config", out / "training_config.json", "--out", again)
    assert code == 0, err
    assert losses(again) == losses(out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lr: 1}", "c.yaml: unknown key 'optimizer.lr'. Did you mean schedule.lr"),
        (
            "training: {batchsize: 1}",
            "unknown key 'training.batchsize'. Did you mean training.batch",
        ),
        ("trainig: {batch_size: 1}", "unknown key 'trainig'. Did you mean training"),
        ("lr: 1", "unknown key 'lr'. Did you mean schedule.lr"),
        ("training: {batch_size: big}", "training.batch_size must be of type int, found 'big'"),
        ("training: {batch_size: true}", "training.batch_size must be of type int, found True"),
        ("checkpoint: {save_every: 0}", "save_every must be above zero, found 0"),
        ("schedule: {lr: fast}", "schedule.lr must be of type float, found 'fast'"),
        ("training: 5", "training must be a section, found 5"),
        ("- a\n- b", "expected sections, found list"),
        ("a: [", "not valid YAML"),
        ("model: {model_type: llama}", "model.model_type must be 'tinylm'"),
    ],
)
def test_bad_config_files(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert_clean_error(cli(*train_arguments(tmp_path / "run"), "--config", file), message)
    assert not (tmp_path / "run").exists()


def test_json_and_yaml_files_mean_the_same(tmp_path: Path) -> None:
    values = {"training": {"batch_size": 3}, "schedule": {"lr": 0.001}, "model": {"dropout": 0}}
    (tmp_path / "c.json").write_text(json.dumps(values))
    (tmp_path / "c.yml").write_text(yaml.safe_dump(values))
    layers = [load_layer(tmp_path / name) for name in ("c.json", "c.yml")]
    assert layers[0] == layers[1]
    flags = {"out": "x", "data": {"train_file": "a", "val_file": "b"}}
    config = resolve(flags, layers[0])
    assert (config.training.batch_size, config.schedule.lr, config.model.dropout) == (3, 0.001, 0.0)
    assert config.model.hidden_size == 1024  # the default preset
    assert config.data.tokenizer == "meta-llama/Llama-2-7b-hf"


def test_resume_needs_no_other_flag(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli(*train_arguments(out))[0] == 0
    code, text, err = cli("train", "--out", out, "--resume", "--max-steps", 5, "--log-every", 1)
    assert code == 0, err
    assert "Training done at step 5 of 5" in text
    assert [step for step, _ in losses(out)] == [3, 4, 5]
    assert torch.isfinite(TinyLM.from_pretrained(out).embed_tokens.weight).all()


def test_recipe_stands_below_file_and_flags(cli: Cli, tmp_path: Path) -> None:
    flags = {"out": "x", "data": {"train_file": "a", "val_file": "b"}}
    plain = resolve(flags, {})
    assert (plain.schedule.kind, plain.schedule.lr) == ("cosine", 2e-4)  # the specification
    assert resolve({**flags, "recipe": "default"}, {}) == plain
    config = resolve({**flags, "recipe": "two-stage"}, {})
    schedule = config.schedule
    assert (schedule.kind, schedule.lr, schedule.second_lr) == ("two-stage", 1.5e-3, 1e-3)
    assert (schedule.second_stage_start, schedule.warmup_steps) == (0.5, 375)
    assert config.optimizer == plain.optimizer and config.training == plain.training
    mixed = resolve(
        {**flags, "schedule": {"lr": 1e-3}},
        {"recipe": "two-stage", "schedule": {"warmup_steps": 9}},
    )
    assert (mixed.schedule.kind, mixed.schedule.lr, mixed.schedule.warmup_steps) == (
        ("two-stage", 1e-3, 9)
    )
    result = cli(*train_arguments(tmp_path / "run"), "--recipe", "three-stage")
    assert_clean_error(result, "recipe must be one of default, two-stage, found 'three-stage'")


def test_a_dense_twin_is_evaluated_too(cli: Cli, tmp_path: Path) -> None:
    trainer(tmp_path / "run", model={"dense": True}, training={"max_steps": 3}).train()
    code, out, err = cli("eval", tmp_path / "run", "--file", inputs().val, "--max-tokens", 100)
    assert code == 0, err
    assert "token perplexity" in out and "ternary codes" not in out
