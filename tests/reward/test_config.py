"""The `reward` section: what it understands, and what it says of mistakes."""

import pytest

from flash import config as configuration
from flash.reward.config import EnvReward, JudgeReward, ProcessReward

SCORING = """
def score(transcript): return 1.0
async def judge(transcript): return 1.0
async def empty(): return 1.0
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "some_rewards.py").write_text(SCORING)
    monkeypatch.syspath_prepend(tmp_path)


def parsed(reward):
    return configuration.parse({"env": "frozen_lake", "reward": reward}).reward


def test_the_environments_own_reward_is_the_default_and_a_name_is_enough():
    assert configuration.parse({"env": "frozen_lake"}).reward == EnvReward()
    assert parsed("env") == EnvReward()
    assert parsed("judge") == JudgeReward()
    process = parsed({"name": "process", "run": "some_rewards:score", "concurrency": 4})
    assert process == ProcessReward(run="some_rewards:score", concurrency=4)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("jugde", "did you mean judge?"),
        ({"name": "function"}, "reward.run is missing"),
        ({"name": "function", "run": "some_rewards:score"}, "use reward.name=process"),
        ({"name": "process", "run": "some_rewards:judge"}, "use reward.name=function"),
        ({"name": "process", "run": "some_rewards:nothing"}, "can't be imported"),
        ({"name": "function", "run": "some_rewards:empty"}, "must take the episode"),
        ({"name": "judge", "timeout": 3}, "did you mean timeout_s?"),
        ({"name": "judge", "run": "a:b"}, "unknown field of judge (function, process have it)"),
        ({"name": "judge", "timeout_s": 0}, "reward.timeout_s=0: must be greater than 0"),
        ({"name": "judge", "url": "api.org", "model": "m"}, "write https://host/v1"),
        ({"name": "judge", "url": "http://api.org"}, "reward.model='': give both"),
        ({"name": "judge", "prompt": "{texts}"}, "reward.prompt: KeyError"),
    ],
)
def test_a_mistake_is_told_with_field_value_and_remedy(reward, message):
    with pytest.raises(ValueError) as caught:
        parsed(reward)
    assert message in str(caught.value)
