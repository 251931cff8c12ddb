"""Files of other systems, read: YAML with references, scripts with variables."""

from textwrap import dedent

import pytest

from flash.convert.source import read

SCRIPT = r"""
    #!/usr/bin/env bash
    set -x  # a.comment=1 is none
    prompts=32
    longest=$((1024 * 2))
    both=$(((longest + 1024) * prompts))
    NODES=${NODES:-3}
    rollout=${ROLLOUT:=$NODES}
    logger="['console','wandb']"
    python3 -m verl.trainer.main_ppo \
        data.train_batch_size=${prompts} \
        data.max_prompt_length=$longest \
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${both} \
        actor_rollout_ref.actor.optim.lr=1e-6 \
        actor_rollout_ref.model.path="org/model" \
        trainer.logger="${logger}" \
        trainer.nnodes="${NODES}" \
        rollout.nnodes="${rollout}" \
        trainer.val_before_train=False \
        trainer.default_local_dir="runs/${UNKNOWN_OF_ALL}" \
        data.truncation='error' \
        +extra.key=[a,b] $@
    MORE=(
        trainer.save_freq=20
    )
"""


@pytest.fixture
def written(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return read(path)

    return write


def test_a_script_gives_its_words_with_variables_sums_and_defaults_put_in(written, monkeypatch):
    monkeypatch.delenv("NODES", raising=False)
    monkeypatch.delenv("ROLLOUT", raising=False)
    assert dict(written("run.sh", SCRIPT)) == {
        "data.train_batch_size": 32,
        "data.max_prompt_length": 2048,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 98304,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.model.path": "org/model",
        "trainer.logger": ["console", "wandb"],
        "trainer.nnodes": 3,
        "rollout.nnodes": 3,
        "trainer.val_before_train": False,
        "trainer.default_local_dir": "runs/${UNKNOWN_OF_ALL}",
        "data.truncation": "error",
        "extra.key": ["a", "b"],
        "trainer.save_freq": 20,
    }


def test_a_variable_of_the_environment_counts_and_the_scripts_own_before_it(written, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("SIZE", "1")
    script = "SIZE=4\nrun data.train_files=$DATA/a.jsonl data.train_batch_size=$SIZE\n"
    assert dict(written("run.sh", script)) == {
        "data.train_files": "/data/a.jsonl",
        "data.train_batch_size": 4,
    }


def test_of_a_word_that_comes_twice_the_last_counts(written):
    assert dict(written("words.txt", "a.b=1\na.c=2\na.b=3\n")) == {"a.b": 3, "a.c": 2}


def test_yaml_gives_leaves_by_dotted_key_in_its_order(written):
    source = written(
        "config.yaml",
        """
        steps: 3
        actor:
          lr: 1e-6
          devices: [0, 1]
          none: ~
        sets:
          - {name: one, size: 1}
          - {name: two}
        """,
    )
    assert list(source.items()) == [
        ("steps", 3),
        ("actor.lr", 1e-6),
        ("actor.devices", [0, 1]),
        ("actor.none", None),
        ("sets.0.name", "one"),
        ("sets.0.size", 1),
        ("sets.1.name", "two"),
    ]


def test_references_are_resolved_as_omegaconf_would_and_others_stay(written, monkeypatch):
    monkeypatch.setenv("SET_HERE", "from the environment")
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    source = written(
        "config.yaml",
        """
        length: 512
        inner: {length: "${length}", name: "run-${length}", chained: "${inner.length}"}
        env: ${oc.env:SET_HERE}
        default: ${oc.env:NOT_SET_HERE,./runs}
        select: ${oc.select:inner.length,1}
        none: ${oc.env:NOT_SET_HERE}
        date: ${now:%Y}
        itself: ${itself}
        """,
    )
    assert dict(source) == {
        "length": 512,
        "inner.length": 512,
        "inner.name": "run-512",
        "inner.chained": 512,
        "env": "from the environment",
        "default": "./runs",
        "select": 512,
        "none": "${oc.env:NOT_SET_HERE}",
        "date": "${now:%Y}",
        "itself": "${itself}",
    }
