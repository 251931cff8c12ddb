"""A trained model as a directory that transformers loads again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, models

from flash.trainer.export import write_weights
from flash.trainer.save import save_beside
from tests.packed import load_packed

SaveModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The only rank."""
    store: Any = dist
    dist.init_process_group("gloo", store=store.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(source: Path, target: Path) -> Path:
    model = load_packed(source)
    target.mkdir()
    write_weights(model, target, dtype=torch.float32, write=True)
    save_beside(model, target, source=str(source))
    return target


@pytest.mark.parametrize(
    "told",
    [
        {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]},  # without do_sample
        {"do_sample": False, "top_k": 20},
        {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
        {"max_length": 20, "min_length": 30},
    ],
)
def test_how_to_generate_stays_as_the_models_makers_said_even_where_it_can_not_be_saved(
    told: dict[str, Any], save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "m")
    (source / "generation_config.json").write_text(json.dumps(told))
    target = saved(source, tmp_path / "saved")
    assert json.loads((target / "generation_config.json").read_text()) == told
    assert load_packed(target).config.num_hidden_layers == 2


def test_what_config_json_says_of_generation_is_saved_in_the_file_for_it(
    save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "m")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config |= {"temperature": 0.6, "top_p": 0.9, "my_own": {"a": 1}}
    (source / "config.json").write_text(json.dumps(config))
    target = saved(source, tmp_path / "saved")
    assert json.loads((target / "generation_config.json").read_text())["temperature"] == 0.6
    assert json.loads((target / "config.json").read_text())["my_own"] == {"a": 1}


def test_a_tokenizer_is_copied_with_all_that_belongs_to_it(
    save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "m")
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template="{{ 1 }}")
    tokenizer.save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ 2 }}")
    (source / "notes.json").write_text("{}")
    target = saved(source, tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(target)
    assert again.get_vocab() == {"a": 0, "b": 1}
    assert again.chat_template == {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    assert not (target / "notes.json").exists()
