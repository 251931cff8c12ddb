"""The plain style spells prompts that a small policy can follow, and reads its commands back."""

import pytest
from transformers import AutoTokenizer

from flash.agents.plain import PlainStyle
from flash.types import Observation, Turn
from flash.warm_start.demonstrations import to_sample
from flash.warm_start.small_policy import create

VOCABULARY = ["go to", "take", "from", "drawer 1", "mug 2", "you arrive at", "nothing happens",
              "put some", "mug", "on", "desk"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = create(
        tmp_path_factory.mktemp("policy"), VOCABULARY, layers=1, hidden_size=16, heads=2
    )
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def style(tokenizer):
    return PlainStyle(tokenizer)


def seen(text: str, goal: str | None = "put some mug on desk") -> Observation:
    return Observation(text=text, info={} if goal is None else {"goal": goal})


def words(tokenizer, token_ids):
    return tokenizer.convert_ids_to_tokens(token_ids)


def test_the_goal_and_the_action_marker_end_every_prompt(style, tokenizer):
    first = style.first(seen("You arrive at drawer 1. Go to desk: put some mug on desk."))
    goal = ["put some", "mug", "on", "desk"]
    assert words(tokenizer, first) == ["you arrive at", "drawer 1", "go to", "desk", *goal, "<act>"]
    after = style.next(seen("Nothing happens."), style.spell("go to drawer 1"))
    assert words(tokenizer, after) == ["nothing happens", *goal, "<act>"]


def test_a_goal_can_be_left_out_and_an_environment_may_have_none(tokenizer):
    quiet = PlainStyle(tokenizer, repeat_goal=False)
    assert words(tokenizer, quiet.next(seen("Nothing happens."), [])) == [
        "<stop>", "nothing happens", "<act>"
    ]  # fmt: skip
    assert words(tokenizer, PlainStyle(tokenizer).first(seen("Go to", None))) == ["go to", "<act>"]


def test_a_goal_of_another_game_is_not_remembered(style, tokenizer):
    style.first(seen("Nothing happens.", "put some mug on desk"))
    other = style.first(seen("Nothing happens.", "take mug from desk"))
    assert words(tokenizer, other) == ["nothing happens", "take", "mug", "from", "desk", "<act>"]


def test_an_action_cut_off_before_its_stop_token_is_closed_in_the_next_prompt(style):
    whole = style.spell("take mug 2 from drawer 1")
    closed = style.next(seen("Nothing happens."), whole)
    cut = style.next(seen("Nothing happens."), whole[:-1])
    assert cut == [style.stop_token_ids[0], *closed]


@pytest.mark.parametrize("command", ["take mug 2 from drawer 1", "go to drawer 1", ""])
def test_a_command_is_spelled_and_read_back_unchanged(style, command):
    assert style.spell(command)[-1] == style.stop_token_ids[0]
    assert style.action(style.spell(command)) == command
    assert style.action(style.spell(command)[:-1]) == command


def test_a_marker_inside_an_action_is_not_hidden(style, tokenizer):
    marker = tokenizer.convert_tokens_to_ids("<act>")
    assert style.action([marker, *style.spell("go to drawer 1")]) == "<act> go to drawer 1"


def test_a_tokenizer_that_can_not_end_an_action_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    endless = AutoTokenizer.from_pretrained(tmp_path)
    endless.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        PlainStyle(endless)


def test_the_chat_template_of_a_small_policy_reads_as_the_plain_style(style, tokenizer):
    """So that an agent with a chat client meets what the warm start has taught."""
    goal = "put some mug on desk"
    said = style.spell("go to desk")
    plain = style.first(seen("You arrive at drawer 1.")) + said
    plain += style.next(seen("Nothing happens."), said)
    messages = [
        {"role": "user", "content": f"You arrive at drawer 1. {goal}"},
        {"role": "assistant", "content": style.action(said)},
        {"role": "user", "content": f"Nothing happens. {goal}"},
    ]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert words(tokenizer, chat) == words(tokenizer, plain)
    begun = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert chat[: len(begun)] == begun


def test_a_demonstration_weighs_actions_observations_and_detours(style, tokenizer):
    turns = [
        Turn(seen("You arrive at drawer 1."), "go to desk", imitate=False),
        Turn(seen("Nothing happens."), "take mug 2 from drawer 1"),
    ]
    sample = to_sample(turns, style, action_weight=1.0, observation_weight=0.25)
    detour, action = style.spell("go to desk"), style.spell("take mug 2 from drawer 1")
    first = style.first(turns[0].observation)
    second = style.next(turns[1].observation, detour)
    assert sample.token_ids.tolist() == [*first, *detour, *second, *action]
    assert sample.loss_mask.tolist() == (
        [0.25] * len(first) + [0.0] * len(detour) + [0.25] * len(second) + [1.0] * len(action)
    )
    assert not len(sample.sampled_versions()) or (sample.versions == -1).all()
    with pytest.raises(ValueError, match="turns"):
        to_sample([], style)
