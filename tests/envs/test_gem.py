import pytest

pytest.importorskip("gem", reason="needs the extra 'gem'")

from flash.envs.gem import GemEnv


def test_a_game_is_won_and_what_to_say_next_ends_each_observation():
    env = GemEnv(id="game:GuessTheNumber-v0", config={"max_number": 4, "max_turns": 9})
    text, _ = env.reset(seed=0)
    assert text.endswith("Enter your next guess.")
    for guess in range(1, 5):
        _, reward, ended, _, info = env.step(rf"\boxed{{{guess}}}")
        if ended:
            break
        assert "success" not in info
    assert (reward, ended, info["success"]) == (1.0, True, True)


def test_a_game_that_is_lost_is_no_success():
    env = GemEnv(id="game:GuessTheNumber-v0")
    env.reset(seed=0)
    _, reward, ended, _, info = env.step("no guess")
    assert reward < 1
    assert (ended, info["success"]) == (True, False)


def test_the_splits_have_other_games():
    def boards(split):
        env = GemEnv(id="game:FifteenPuzzle-v0", split=split)
        return {env.reset(seed=seed)[0] for seed in range(20)}

    assert not boards("train") & boards("heldout")


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("game:NoSuch-v0", "id='game:NoSuch-v0' is not one of gem's"),
        ("rg:chain_sum", "id='rg:chain_sum' goes through its rows in order"),
    ],
)
def test_what_has_no_seeded_tasks_is_refused_with_the_remedy(id, said):
    with pytest.raises(ValueError, match=said):
        GemEnv(id=id)
