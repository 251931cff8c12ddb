"""A small policy is a Hugging Face directory whose tokens are the words of an environment."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flash.warm_start.small_policy import create

VOCABULARY = ["go to", "open", "drawer 1", "drawer 12", "drawer", "you see", "Put a", "+", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return create(tmp_path_factory.mktemp("policy"), VOCABULARY, layers=2, hidden_size=32, heads=2)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Go to drawer 1.", ["go to", "drawer 1"]),
        ("go to drawer 12", ["go to", "drawer 12"]),
        ("go to drawer 123", ["go to", "drawer", "<unk>"]),
        ("You see a drawer 1,\n\nand the  drawer 12", ["you see", "drawer 1", "drawer 12"]),
        ("put a drawer", ["put a", "drawer"]),
        ("3+3", ["3", "+", "3"]),
        ("reopen", ["<unk>"]),
        ("open zebra", ["open", "<unk>"]),
        ("<act>go to<stop>", ["<act>", "go to", "<stop>"]),
        ("", []),
    ],
)
def test_texts_become_phrases(tokenizer, text, tokens):
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(token_ids) == tokens


def test_the_phrases_come_back_as_the_command(tokenizer):
    token_ids = tokenizer.encode("go to drawer 12", add_special_tokens=False)
    assert tokenizer.decode(token_ids) == "go to drawer 12"


def test_the_model_scores_its_own_vocabulary(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    token_ids = torch.tensor([tokenizer.encode("open drawer 1", add_special_tokens=False)])
    with torch.inference_mode():
        assert model(token_ids).logits.shape == (1, 2, len(tokenizer))


def test_the_same_seed_gives_the_same_weights_and_no_one_elses_random_state_moves(folder, tmp_path):
    def digest(path):
        return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()

    sizes = {"layers": 2, "hidden_size": 32, "heads": 2}
    before = torch.get_rng_state()
    same = create(tmp_path / "same", VOCABULARY, **sizes)
    other = create(tmp_path / "other", VOCABULARY, seed=1, **sizes)
    assert torch.equal(before, torch.get_rng_state())
    assert digest(same) == digest(folder) != digest(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": 0}, "layers=0"),
        ({"hidden_size": 30, "heads": 4}, "hidden_size=30"),
        ({"heads": 0}, "heads"),
    ],
)
def test_a_size_that_can_not_be_is_refused_by_name(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        create(tmp_path, VOCABULARY, **options)


def test_an_empty_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary"):
        create(tmp_path, [" "])


def test_nothing_is_drawn_while_it_is_made_and_bars_elsewhere_stay(tmp_path, capfd):
    transformers_logging.enable_progress_bar()
    create(tmp_path, VOCABULARY, layers=1, hidden_size=16, heads=2)
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()
