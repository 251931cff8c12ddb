"""Models whose files are not whole, or don't fit together, told by their headers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from flash.trainer.model_files import check_files, check_vocabulary

SaveModel = Callable[..., Path]
Model: Any = transformers.AutoModelForCausalLM
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001.safetensors", "model-00002.safetensors"


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def cut(directory: Path, *, kept: int | None = None) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2 if kept is None else kept])


def in_shards(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    places = {name: FIRST if "layers.0" in name else SECOND for name in weights}
    for file in (FIRST, SECOND):
        save_file(
            {name: weights[name] for name in weights if places[name] == file}, directory / file
        )
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / WEIGHTS).unlink()


def without_second_shard(directory: Path) -> None:
    in_shards(directory)
    (directory / SECOND).unlink()


def with_a_weight_only_in_the_index(directory: Path) -> None:
    in_shards(directory)
    places = json.loads((directory / INDEX).read_text())["weight_map"]
    places["model.layers.0.no.weight"] = FIRST
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))


def as_pickle(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def cut_pickle(directory: Path) -> None:
    as_pickle(directory)
    whole = (directory / "pytorch_model.bin").read_bytes()
    (directory / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "keep", [lambda directory: None, in_shards, as_pickle], ids=["one file", "shards", "pickle"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_taken_in_each_form(
    keep: Callable[[Path], None], tied: bool, save_model: SaveModel, tmp_path: Path
) -> None:
    directory = save_model(tmp_path / "m", tied=tied)
    keep(directory)
    assert check_files(str(directory), field="model").num_hidden_layers == 2


LACKS_LAYERS = r"its files lack 18 weights, model\.layers\.2\.input_layernorm\.weight and others"
BROKEN = {
    "layers lack": (lambda d: configure(d, num_hidden_layers=4), LACKS_LAYERS),
    "a weight lacks": (
        lambda d: edit(d, lambda w: w.pop("model.norm.weight")),
        r"its files lack the weight model\.norm\.weight: give the weights and the config",
    ),
    "too many layers": (
        lambda d: configure(d, num_hidden_layers=1),
        r"hold 9 weights, model\.layers\.1\.input_layernorm\.weight and others, which its config",
    ),
    "an alien weight": (
        lambda d: edit(d, lambda w: w.update({"v_head.weight": torch.zeros(1, 32)})),
        r"its files hold the weight v_head\.weight, which its config\.json has no place for",
    ),
    "other widths": (
        lambda d: configure(d, intermediate_size=48),
        r"model\.layers\.0\.mlp\.down_proj\.weight is \[32, 64\] in its files, and \[32, 48\] by",
    ),
    "another vocabulary": (
        lambda d: configure(d, vocab_size=90),
        r"model\.embed_tokens\.weight is \[97, 32\] in its files, and \[90, 32\] by its config",
    ),
    "cut": (cut, r"model\.safetensors can't be read, it is cut or damaged: fetch the model again"),
    "cut in its header": (lambda d: cut(d, kept=20), r"model\.safetensors can't be read"),
    "empty": (lambda d: cut(d, kept=0), r"model\.safetensors can't be read"),
    "cut pickle": (cut_pickle, r"pytorch_model\.bin can't be read"),
    "a shard is missing": (
        without_second_shard,
        r"model-00002\.safetensors is missing, which model\.safetensors\.index\.json names",
    ),
    "an index of more": (
        with_a_weight_only_in_the_index,
        r"model-00001\.safetensors lacks model\.layers\.0\.no\.weight, which model\.saf",
    ),
    "no index": (
        lambda d: (in_shards(d), (d / INDEX).write_text("[]")),
        r"model\.safetensors\.index\.json is no index .*: fetch the model again",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), r"there are no weights \(model\.safetensors,"),
    "an alien type": (
        lambda d: configure(d, model_type="zorp"),
        r"model_type='zorp', which this version of transformers does not know: give another model",
    ),
    "code of its own": (
        lambda d: configure(d, model_type="zorp", auto_map={"AutoConfig": "code.Config"}),
        r"does not know; code that comes with a model is not run: give another model",
    ),
    "no type": (
        lambda d: (d / "config.json").write_text("{}"),
        r"config\.json names no model_type .*: fetch the model again",
    ),
    "no JSON": (
        lambda d: (d / "config.json").write_text('{"model_type": '),
        r"config\.json names no model_type .*: fetch the model again",
    ),
    "no language model": (
        lambda d: configure(d, model_type="vit"),
        r"\(model_type='vit'\) makes no causal language model: give one that is, or correct its",
    ),
    "sizes that can't be": (
        lambda d: configure(d, num_attention_heads=0),
        r"config\.json .*: (give one that is, or )?correct",
    ),
    "quantized": (
        lambda d: configure(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config, and quantized weights can't be trained: give the model that they we",
    ),
    "a window without width": (
        lambda d: configure(d, layer_types=["sliding_attention", "full_attention"]),
        r"layer_types with sliding_attention, but no sliding_window: give the window, or full_atte",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_is_refused_in_one_line_that_names_what_and_the_remedy(
    kind: str, save_model: SaveModel, tmp_path: Path
) -> None:
    directory = save_model(tmp_path / "m")
    break_it, pattern = BROKEN[kind]
    break_it(directory)  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=pattern) as caught:
        check_files(str(directory), field="model")
    assert str(caught.value).startswith(f"model={str(directory)!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("bloom", {}, "computes attention by itself, which would mix packed sequences"),
        ("llama4_text", {}, r"layers of the types \['chunked_attention'\]"),
        ("mamba", {}, r"layers of the types \['linear_attention'\]"),
        ("gemma2", {}, "Gemma2Attention needs 'softcap' in attention: not supported"),
        ("gpt_oss", {"num_local_experts": 2}, "needs 's_aux' in attention: not supported"),
    ],
)
def test_a_type_whose_attention_is_not_ours_is_refused_by_name(
    kind: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    Model.from_config(of_type(kind, **settings)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type='{kind}'.*{why}"):
        check_files(str(tmp_path), field="model")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "opt", "gpt2", "gemma3_text"])
def test_types_that_can_be_trained_are_taken(kind: str, tmp_path: Path) -> None:
    Model.from_config(of_type(kind)).save_pretrained(tmp_path)
    check_files(str(tmp_path), field="model")


def of_type(kind: str, **settings: Any) -> Any:
    """A configuration with two small layers; names that a type does not know are passed over."""
    settings = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "ffn_dim": 16, "word_embed_proj_dim": 16,
        "max_position_embeddings": 128, "num_experts": 2, "num_local_experts": 2,
        "moe_intermediate_size": 16, "intermediate_size_mlp": 16, **settings,
    }  # fmt: skip
    if kind in ("gpt2", "bloom", "mamba"):
        del settings["num_key_value_heads"], settings["head_dim"]
    if kind == "mamba":
        del settings["num_attention_heads"]
    return transformers.AutoConfig.for_model(kind, **settings)


def tokenizer_of(size: int, **settings: Any) -> Any:
    core = Tokenizer(models.WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **settings)


@pytest.mark.parametrize("added", [[], ["<|im_start|>"]])
def test_a_tokenizer_larger_than_the_model_is_refused(
    added: list[str], save_model: SaveModel, tmp_path: Path
) -> None:
    directory = save_model(tmp_path / "m")
    config = check_files(str(directory), field="model")
    tokenizer = tokenizer_of(97 if added else 99, additional_special_tokens=added)
    tokenizer.save_pretrained(directory)
    with pytest.raises(
        ValueError, match=r"larger than the model: \d tokens, the first '.*' with t"
    ):
        check_vocabulary(tokenizer, config, source=str(directory))
    check_vocabulary(tokenizer_of(97), config, source=str(directory))


def test_a_placeholder_of_images_past_the_embedding_is_no_word(
    save_model: SaveModel, tmp_path: Path
) -> None:
    directory = save_model(tmp_path / "m")
    tokenizer = tokenizer_of(97, extra_special_tokens={"image_token": "<image>"})
    tokenizer.save_pretrained(directory)
    assert tokenizer.get_vocab()["<image>"] == 97
    check_vocabulary(tokenizer, check_files(str(directory), field="model"), source=str(directory))


def test_heads_that_the_ranks_of_a_pass_do_not_divide_are_refused(
    save_model: SaveModel, tmp_path: Path
) -> None:
    directory = str(save_model(tmp_path / "m"))
    check_files(directory, field="model", sequence_ranks=4)
    with pytest.raises(
        ValueError,
        match=r"^model='.*/m': trainer\.sequence_ranks=3 does not divide the model's 4 attention "
        r"heads, .*: use a divisor of 4$",
    ):
        check_files(directory, field="model", sequence_ranks=3)
