import pytest

pytest.importorskip("textarena", reason="needs the extra 'textarena'")

from flash.envs.textarena import TextArenaEnv, TextArenaTable


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


def test_at_a_table_each_hears_what_the_others_did_and_is_rewarded_for_its_seat():
    table = TextArenaTable(id="TicTacToe-v0", players=2)
    table.reset(seed=0)
    heard = {}
    for move in ("0", "3", "1", "4"):
        seat, heard[seat] = table.turn()
        assert not table.step(move)
    assert heard[0].startswith("Player 0 placed their symbol (O) in cell 0.")
    assert "\n[3]\nPlayer 1 placed their symbol (X) in cell 3.\n" in heard[0]
    assert "\n[1]\n" in heard[1]
    assert "(X) in cell 4." in table.turn()[1]
    assert table.turn() == (0, ""), "it has been told"
    assert table.step("2")
    assert table.rewards() == [1.0, -1.0]


def test_a_seed_is_a_game_of_its_own_in_each_split():
    def deals(split):
        table = TextArenaTable(id="KuhnPoker-v0", players=2, split=split)
        seen = []
        for seed in range(8):
            table.reset(seed=seed)
            seen.append(table.turn())
        return seen

    assert deals("train") == deals("train") != deals("heldout")


@pytest.mark.parametrize(("id", "players"), [("TicTacToe-v0", 3), ("TowerOfHanoi-v0", 2)])
def test_a_table_is_for_as_many_as_the_game(id, players):
    with pytest.raises(ValueError, match=f"id='{id}' is not for {players} players"):
        TextArenaTable(id=id, players=players)


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
