"""ALFWorld as a gymnasium environment."""

from pathlib import Path

import gymnasium
import pytest

pytest.importorskip("alfworld")

from flash.envs.alfworld import HELD_OUT_PLANS, TASK_TYPES, AlfWorldEnv, generate
from flash.types import Task

SMALL = {"max_receptacles": 8, "max_objects": 10}


def test_gymnasium_makes_it_and_its_texts_lie_in_its_spaces():
    env = gymnasium.make("flash/AlfWorld-v0", max_turns=3, **SMALL)
    text, info = env.reset(seed=3)
    assert text in env.observation_space
    assert text.endswith(f"Your task is to: {info['goal']}.")
    for command in info["admissible_commands"]:
        assert command in env.action_space
    assert env.step("look")[0] in env.observation_space
    env.close()


def test_the_seed_decides_the_game_and_the_split_its_floor_plan():
    env, again = AlfWorldEnv(), AlfWorldEnv()
    assert env.reset(seed=7) == again.reset(seed=7)
    assert env.reset(seed=7) != again.reset(seed=8)
    assert generate(7, split="heldout").floor_plan in HELD_OUT_PLANS
    assert AlfWorldEnv(split="heldout").reset(seed=7)[0] != env.reset(seed=7)[0]
    assert env.reset()[0] != env.reset()[0]  # without a seed, gymnasium's own chance


def test_the_winning_command_alone_is_worth_1_and_ends_the_episode():
    game = generate(1, **SMALL)
    env = AlfWorldEnv(max_turns=len(game.walkthrough), **SMALL)
    env.reset(seed=1)
    steps = [env.step(command) for command in game.walkthrough]
    assert [step[1] for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert [step[2] for step in steps] == [False] * (len(steps) - 1) + [True]
    assert not any(step[3] for step in steps)  # won at the last turn is won, not truncated
    assert steps[-1][4]["success"] is True
    assert "success" not in steps[0][4]


def test_the_last_turn_truncates_without_success():
    env = AlfWorldEnv(max_turns=2, **SMALL)
    _, info = env.reset(seed=1)
    assert env.step("dance") == ("Nothing happens.", 0.0, False, False, info)
    _, reward, terminated, truncated, info = env.step("dance")
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)


@pytest.mark.parametrize("admissible", ["none", "info", "text"])
def test_admissible_commands_stand_where_asked(admissible):
    env = AlfWorldEnv(admissible=admissible, **SMALL)
    text, info = env.reset(seed=1)
    assert ("admissible_commands" in info) == (admissible != "none")
    assert ("Available commands: " in text) == (admissible == "text")


def test_games_of_a_folder_are_chosen_by_seed_and_type(tmp_path):
    for index, task_type in enumerate(TASK_TYPES):
        game = generate(index, task_types=[task_type], **SMALL)
        game.write(tmp_path / game.name / "game.tw-pddl")
    game.write(tmp_path / "unnamed" / "trial" / "game.tw-pddl")
    env = AlfWorldEnv(games=tmp_path)
    goals = {env.reset(seed=seed)[1]["goal"] for seed in range(7)}
    assert len(goals) == 6
    assert env.reset(seed=7) == env.reset(seed=0)
    two = AlfWorldEnv(games=tmp_path, task_types=["pick_two_obj_and_place"])
    assert {two.reset(seed=seed)[1]["goal"] for seed in range(5)} == {game.goal}


def test_a_game_file_can_be_asked_for_by_name(tmp_path):
    game = generate(99, **SMALL)
    game.write(tmp_path / "game.tw-pddl")
    env = AlfWorldEnv()
    assert env.reset(seed=0, options={"game": tmp_path / "game.tw-pddl"})[1]["goal"] == game.goal


def test_demonstrations_are_repeatable_mostly_win_and_mark_their_detours():
    env = AlfWorldEnv(max_turns=20, **SMALL)
    demonstrations = [env.demonstrate(Task(seed)) for seed in range(40)]
    assert demonstrations == [env.demonstrate(Task(seed)) for seed in range(40)]
    won = 0
    for seed, turns in enumerate(demonstrations):
        text, _ = env.reset(seed=seed)
        for turn in turns:
            assert turn.observation.text == text
            text, *_, info = env.step(turn.action)
        won += info["success"]
    assert won >= 38
    detours = [not turn.imitate for turns in demonstrations for turn in turns]
    assert 0.05 < sum(detours) / len(detours) < 0.3
    straight = AlfWorldEnv(detours=0, **SMALL).demonstrate(Task(0))
    assert all(turn.imitate for turn in straight)


def test_a_wandering_teacher_is_imitated_and_still_shows_how_a_game_ends():
    tidy = AlfWorldEnv(max_turns=12, detours=0, **SMALL)
    untidy = AlfWorldEnv(max_turns=12, detours=0, wander=0.4, **SMALL)
    lengths = {True: 0, False: 0}
    for seed in range(20):
        assert all(turn.imitate for turn in untidy.demonstrate(Task(seed)))
        lengths[False] += len(untidy.demonstrate(Task(seed)))
        lengths[True] += len(tidy.demonstrate(Task(seed)))
    assert lengths[False] > 1.3 * lengths[True]


def test_every_word_of_demonstrations_is_in_the_vocabulary(tmp_path):
    from transformers import AutoTokenizer  # noqa: PLC0415

    from flash.warm_start.small_policy import create  # noqa: PLC0415

    env = AlfWorldEnv()
    create(tmp_path, env.vocabulary(), layers=1, hidden_size=8, heads=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for seed in range(60):
        for turn in env.demonstrate(Task(seed)):
            for text in (turn.observation.text, turn.action):
                assert tokenizer.unk_token_id not in tokenizer.encode(text), text
            if turn.imitate:
                assert tokenizer.decode(tokenizer.encode(turn.action)) == turn.action


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "thor"}, "engine='thor'"),
        ({"split": "test"}, "split='test'"),
        ({"task_types": ["pick"]}, "task_types='pick'"),
        ({"games": Path("/nowhere")}, "games='/nowhere'"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"admissible": "yes"}, "admissible='yes'"),
        ({"detours": 1.0}, "detours=1.0"),
        ({"wander": -0.1}, "wander=-0.1"),
        ({"detours": 0.5, "wander": 0.5}, "below 1"),
    ],
)
def test_an_option_that_can_not_be_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        AlfWorldEnv(**options)


def test_a_folder_without_fitting_games_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no game.tw-pddl"):
        AlfWorldEnv(games=tmp_path)
