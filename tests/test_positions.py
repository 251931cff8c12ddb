"""How long a text a model reads, by its config.json."""

import json

import pytest

from flash import config as configuration
from flash.positions import check_positions, positions_of


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 256}, 256),
        ({"max_seq_len": 512}, 512),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
        ({"max_position_embeddings": 4096, "text_config": {"hidden_size": 8}}, 4096),
        ({"hidden_size": 8}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": 100, "rope_scaling": None}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 4}}, 400),
        (
            {
                "max_position_embeddings": 32_768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32_768,
                },
            },
            131_072,
        ),
        (
            {
                "max_position_embeddings": 131_072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131_072,
        ),
        (
            {
                "max_position_embeddings": 100,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            800,
        ),
    ],
)
def test_positions_are_those_that_the_model_was_made_or_stretched_for(config, positions):
    assert positions_of(config) == positions


def test_sequences_longer_than_the_model_reads_are_refused_with_the_remedy():
    check_positions({"n_positions": 256}, model="m", max_sequence_tokens=256)
    check_positions({}, model="m", max_sequence_tokens=10**6)
    with pytest.raises(ValueError, match=r"max_sequence_tokens=257 exceeds the 256 positions of"):
        check_positions({"n_positions": 256}, model="m", max_sequence_tokens=257)


def test_they_are_refused_when_the_configuration_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_positions": 256}))
    fields = {"model": str(tmp_path), "agent.max_tokens": 8}
    configuration.load("frozen_lake", {**fields, "agent.max_sequence_tokens": 256})
    with pytest.raises(ValueError, match=r"max_sequence_tokens=512 .*: set it to 256 or less"):
        configuration.load("frozen_lake", {**fields, "agent.max_sequence_tokens": 512})


@pytest.mark.parametrize(
    ("text", "says"), [("{", "config.json can't be read"), ("[]", "config.json holds no settings")]
)
def test_a_model_whose_config_is_none_is_refused_by_name(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        configuration.load("frozen_lake", {"model": str(tmp_path)})
