"""Checkpoint <-> Hugging Face directory, and what a BitNet checkpoint can give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from cli_helpers import Cli, command_line
from model_helpers import make_model, ragged_batch
from safetensors.torch import load_file, save_file
from tolerances import assert_equal
from torch import Tensor
from training_helpers import inputs
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM
from transformers.integrations import bitnet as theirs

from tinylm import TinyLM
from tinylm.checkpoint import save_model
from tinylm.cli import main
from tinylm.errors import CheckpointError
from tinylm.huggingface import from_huggingface, to_huggingface
from tinylm.huggingface.bitnet import import_bitnet
from tinylm.quantization import master_weight, ternarize
from tinylm.tokenizer import load_tokenizer

Tensors = dict[str, Tensor]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(main, capsys)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Run their functions without torch.compile, which needs a C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = load_tokenizer(inputs().tokenizer)
    model = make_model(seed=5, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    return save_model(tmp_path / "checkpoint", model, tokenizer=tokenizer)


def test_there_and_back_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    to_huggingface(checkpoint, tmp_path / "hf")
    back = from_huggingface(tmp_path / "hf", tmp_path / "back")
    sums = (back / "SHA256SUMS").read_text(encoding="utf-8")
    assert "tokenizer.json" in sums
    assert sums == (checkpoint / "SHA256SUMS").read_text(encoding="utf-8")
    ids = ragged_batch(vocab_size=384).input_ids
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_equal(loaded(ids).logits, TinyLM.from_pretrained(checkpoint)(ids))
    to_huggingface(back, tmp_path / "hf")  # an earlier model is replaced


def test_commands(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, _ = cli("convert", checkpoint, "--to", "huggingface", "--out", tmp_path / "hf")
    assert (code, out) == (0, f"{tmp_path / 'hf'}: loads after `import tinylm.huggingface`\n")
    code, out, _ = cli("convert", tmp_path / "hf", "--to", "checkpoint", "--out", tmp_path / "back")
    assert (code, out) == (0, f"{tmp_path / 'back'}: checkpoint\n")
    assert TinyLM.from_pretrained(tmp_path / "back").config.eos_token_id == 2
    code, _, said = cli("generate", tmp_path / "hf", "--prompt", "def")
    assert code == 2 and f"`tinylm convert {tmp_path / 'hf'} --to checkpoint" in said
    texts = []
    for directory in (checkpoint, tmp_path / "back"):
        options = ("--prompt", "def", "--max-new-tokens", 8, "--seed", 3)
        texts.append(cli("generate", directory, *options)[:2])
    assert texts[0] == texts[1]


def test_half_precision_becomes_float32(checkpoint: Path, tmp_path: Path) -> None:
    to_huggingface(checkpoint, tmp_path / "hf")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    model = TinyLM.from_pretrained(from_huggingface(tmp_path / "half", tmp_path / "back"))
    expected = half.model.embed_tokens.weight.float()
    assert_equal(model.embed_tokens.weight, expected)


def test_bad_sources(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none", "--to", "huggingface"], "expected a checkpoint"),
        (
            [tmp_path / "none", "--to", "checkpoint"],
            "expected a model's directory with config.json",
        ),
        ([checkpoint, "--to", "huggingface", "--partial"], "--partial is for a BitNet checkpoint"),
        ([checkpoint, "--to", "checkpoint", "--partial"], "--partial is for BitNet checkpoints"),
    ]
    for arguments, message in cases:
        code, _, err = cli("convert", *arguments, "--out", tmp_path / "out")
        assert code == 2
        assert message in err
        assert not (tmp_path / "out").exists()
    code, _, err = cli("convert", checkpoint, "--to", "huggingface", "--out", tmp_path / "other")
    assert code == 2
    assert "holds no model.safetensors, so it is not replaced" in err
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = cli("convert", tmp_path / "other", "--to", "checkpoint", "--out", tmp_path / "x")
    assert code == 2
    assert "expected model_type 'tinylm', found 'llama'" in err


def bitnet_model(**changes: Any) -> BitNetForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    model = BitNetForCausalLM(BitNetConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def write(folder: Path, model: BitNetForCausalLM, tensors: Tensors, **config: Any) -> Path:
    """Write a directory as the hub has them; sharded, so that the index is read too."""
    folder.mkdir()
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n].contiguous() for n in names if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = {**json.loads(model.config.to_json_string(use_diff=False)), **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def float_tensors(model: BitNetForCausalLM) -> Tensors:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def packed_tensors(model: BitNetForCausalLM, linear_class: str) -> Tensors:
    """Pack linear layers with their own function, and their scale in the class's convention."""
    tensors = float_tensors(model)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        codes, scale = ternarize(tensors[name])
        tensors[name] = theirs.pack_weights(codes.clone())
        tensors[f"{name}_scale"] = (scale if linear_class == "autobitlinear" else 1 / scale).view(1)
    return tensors


def feed_forward(model: BitNetForCausalLM, layer: int, x: Tensor) -> Tensor:
    """Their norm and feed-forward, with their quantisers."""
    block = model.model.layers[layer]
    for name in ("gate_proj", "up_proj", "down_proj"):
        old = getattr(block.mlp, name)
        new = theirs.AutoBitLinear(old.in_features, old.out_features, bias=False, online_quant=True)
        new.load_state_dict({"weight": old.weight.detach()})
        setattr(block.mlp, name, new)
    return block.mlp(block.post_attention_layernorm(x))


@torch.no_grad()
def test_what_fits_computes_the_same(tmp_path: Path) -> None:
    model = bitnet_model()
    directory = write(tmp_path / "bitnet", model, float_tensors(model))
    result = import_bitnet(directory, partial=True)
    ours = result.model
    assert not any(".self_attn." in name for name in result.taken)
    assert all(".self_attn." in name for name in (*result.left, *result.fresh))
    assert len(result.left) == 2 * 5
    x = torch.randn(2, 5, 64)
    for layer in range(2):
        block = ours.layers[layer]
        tolerances.HUGGING_FACE_FLOAT.assert_close(
            block.get_submodule("mlp")(block.get_submodule("post_attention_layernorm")(x)),
            feed_forward(model, layer, x),
        )
    tolerances.HUGGING_FACE_FLOAT.assert_close(
        ours.lm_head(ours.norm(x)), model.lm_head(model.model.norm(x))
    )
    assert_equal(ours.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_packed_codes_and_scales_are_kept(tmp_path: Path, linear_class: str, tie: bool) -> None:
    model = bitnet_model(tie_word_embeddings=tie)
    tensors = packed_tensors(model, linear_class)
    if tie:
        del tensors["lm_head.weight"]
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    directory = write(tmp_path / "b", model, tensors, quantization_config=quantization)
    ours = import_bitnet(directory, partial=True).model
    assert ours.config.tie_embeddings is tie
    assert ours.config.rope_theta == 500000.0
    for name in ("gate_proj", "up_proj", "down_proj"):
        for layer in range(2):
            source = model.get_parameter(f"model.layers.{layer}.mlp.{name}.weight")
            codes, scale = ternarize(source.detach())
            found = ours.bit_linears()[f"layers.{layer}.mlp.{name}"].weight_codes()
            assert_equal(found[0].float(), codes)
            # 1 / (1 / scale) in float32 may be one rounding off.
            rtol = 0.0 if linear_class == "autobitlinear" else 2**-22
            torch.testing.assert_close(found[1], scale, rtol=rtol, atol=0.0)


def test_import_is_refused_with_the_reason(tmp_path: Path, cli: Cli) -> None:
    model = bitnet_model()
    directory = write(tmp_path / "bitnet", model, float_tensors(model))
    code, _, err = cli("convert", directory, "--to", "checkpoint", "--out", tmp_path / "out")
    assert code == 2
    assert not (tmp_path / "out").exists()
    for part in (
        "keys and values per head",
        "model.layers.*.self_attn.k_proj.weight [32, 64] (2)",
        "model.layers.*.self_attn.attn_sub_norm.weight [64] (2)",
        "kv_a_proj, kv_a_layernorm, kv_b_proj",
        "--partial",
    ):
        assert part in err
    code, out, _ = cli(
        "convert", directory, "--to", "checkpoint", "--out", tmp_path / "out", "--partial"
    )
    assert code == 0
    assert "15 tensors taken, 10 without a place, 12 fresh ones in attention" in out
    assert TinyLM.from_pretrained(tmp_path / "out").config.intermediate_size == 176
    relu = write(tmp_path / "relu", model, float_tensors(model), hidden_act="relu2")
    code, _, err = cli("convert", relu, "--to", "checkpoint", "--out", tmp_path / "no")
    assert code == 2
    assert "keys and values per head" in err
    assert "hidden_act must be 'silu', found 'relu2'" in err
    assert "--partial" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu2"}, "hidden_act must be 'silu', found 'relu2'"),
        ({"quantization_config": {"use_rms_norm": True}}, "use_rms_norm must be false"),
        ({"quantization_config": {}}, "weight_scale tensors and no quantization_config"),
        ({"quantization_config": {"linear_class": "x"}}, "must be bitlinear or autobitlinear"),
        ({"vocab_size": 97}, r"embed_tokens.weight: expected \[97, 64\], found \[96, 64\]"),
        ({"num_hidden_layers": 1}, "no place for model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "expected a tensor model.layers.2.input_layernorm.weight"),
        ({"model_type": "llama"}, "expected model_type 'bitnet', found 'llama'"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = bitnet_model()
    config = {"quantization_config": {"linear_class": "autobitlinear"}, **change}
    directory = write(tmp_path / "b", model, packed_tensors(model, "autobitlinear"), **config)
    with pytest.raises(CheckpointError, match=message):
        import_bitnet(directory, partial=True)


def test_damaged_tensors(tmp_path: Path) -> None:
    model = bitnet_model()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = packed_tensors(model, "autobitlinear")
    damaged = tensors[name].clone()
    damaged[2, 3] |= 0b1100  # lane 1: rows 44 and on
    config = {"quantization_config": {"linear_class": "autobitlinear"}}
    for number, (change, message) in enumerate(
        [
            ({name: damaged}, f"{name}: code 3 at row 46, column 3"),
            ({name: tensors[name][1:]}, r"expected packed uint8 \[44, 64\], found \[43, 64\]"),
            ({f"{name}_scale": torch.tensor([float("nan")])}, "expected a scale of 1e-05 or more"),
            ({name: torch.full((176, 64), 0.5)}, "expected codes -1, 0 or 1"),
        ]
    ):
        directory = write(tmp_path / str(number), model, {**tensors, **change}, **config)
        with pytest.raises(CheckpointError, match=message):
            import_bitnet(directory, partial=True)
    del tensors[f"{name}_scale"]
    directory = write(tmp_path / "no-scale", model, tensors, **config)
    with pytest.raises(CheckpointError, match=f"expected {name}_scale beside packed codes"):
        import_bitnet(directory, partial=True)
    file = directory / "model-00001-of-00002.safetensors"
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file"):
        import_bitnet(directory, partial=True)


@pytest.mark.parametrize("seed", range(20))
def test_master_weight_has_these_codes_and_this_scale(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (17, 44)
    share = 0.02 + 0.95 * float(torch.rand((), generator=generator))
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    codes = (signs * (torch.rand(shape, generator=generator) < share)).float()
    scale = torch.rand((), generator=generator).pow(4).add(1e-5)
    found_codes, found_scale = ternarize(master_weight(codes, scale))
    assert_equal(found_codes, codes)
    assert_equal(found_scale, scale)
    assert_equal(master_weight(torch.zeros(shape), scale), torch.zeros(shape))
