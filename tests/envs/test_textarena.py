import pytest

pytest.importorskip("textarena", reason="needs the extra 'textarena'")

from flash.envs.textarena import TextArenaEnv


def test_a_game_is_won_in_its_own_moves_and_only_what_is_new_is_told():
    env = TextArenaEnv(id="TowerOfHanoi-v0", config={"num_disks": 2})
    text, _ = env.reset(seed=0)
    assert "Tower of Hanoi with 2 disks" in text
    text, reward, ended, *_ = env.step("A B")  # brackets are added
    assert (reward, ended) == (0.0, False)
    assert "You moved disk 1 from A to B" in text
    assert "Tower of Hanoi with" not in text
    assert "A B" not in text
    env.step("[A C]")
    _, reward, ended, cut_off, info = env.step("[B C]")
    assert (reward, ended, cut_off, info["success"]) == (1.0, True, False, True)
    assert info["turn_count"] == 3


def test_a_game_that_is_lost_is_no_success():
    env = TextArenaEnv(id="TowerOfHanoi-v0")
    env.reset(seed=0)
    while not (answer := env.step("[B C]"))[2]:
        pass
    assert answer[4]["success"] is False
    assert answer[4]["invalid_move"] is True


def test_the_splits_have_other_games():
    def boards(split):
        env = TextArenaEnv(id="Sudoku-v0-easy", split=split)
        return {env.reset(seed=seed)[0] for seed in range(20)}

    assert len(boards("train")) == 20
    assert not boards("train") & boards("heldout")


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("NoSuch-v0", "id='NoSuch-v0' is not one of textarena's"),
        ("TicTacToe-v0", "id='TicTacToe-v0' is for several players"),
        ("PublicGoodsGame-v0", "id='PublicGoodsGame-v0' is for several players"),
    ],
)
def test_what_can_t_be_played_is_refused_with_the_remedy(id, said):
    with pytest.raises(ValueError, match=said):
        TextArenaEnv(id=id)
