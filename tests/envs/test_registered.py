import pytest

from flash.envs.registered import make


def test_an_environment_comes_with_the_wrappers_that_its_registration_asks_for():
    env = make(id="flash.envs.frozen_lake:flash/FrozenLakeText-v0", max_episode_steps=1)
    env.reset(seed=0)
    assert env.step("right")[3] is True


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("CartPole-v1", "id='CartPole-v1' has observation_space=Box"),
        ("flash/NoSuch-v0", "can't be made by gymnasium"),
    ],
)
def test_what_speaks_no_text_or_is_not_registered_is_refused_with_the_remedy(id, said):
    with pytest.raises(ValueError, match=said):
        make(id=id)
