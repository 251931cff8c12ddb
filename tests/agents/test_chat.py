"""The chat style extends a conversation exactly as the template would render it."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash.agents.chat import ChatStyle
from flash.types import Observation

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_grown_conversation_equals_the_template_of_the_whole(tokenizer):
    style = ChatStyle(tokenizer, system="Act.")
    said = tokenizer.encode("go north", add_special_tokens=False)
    tokens = style.first(Observation(text="A room."))
    tokens += [*said, tokenizer.eos_token_id]
    tokens += style.next(Observation(text="A garden."), [*said, tokenizer.eos_token_id])
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Act."},
            {"role": "user", "content": "A room."},
            {"role": "assistant", "content": "go north"},
            {"role": "user", "content": "A garden."},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(tokens) == whole
    assert tokens == tokenizer.encode(whole, add_special_tokens=False)


def test_a_response_cut_off_before_its_stop_token_is_closed_in_the_next_prompt(tokenizer):
    style = ChatStyle(tokenizer)
    said = tokenizer.encode("go", add_special_tokens=False)
    between = style.next(Observation(text="x"), said)
    assert between[0] == tokenizer.eos_token_id
    assert style.next(Observation(text="x"), [*said, between[0]]) == between[1:]


def test_a_sampled_tokenisation_that_is_not_the_canonical_one_is_kept(tokenizer):
    """Sampled ids are never decoded and encoded again: `next` holds none of them."""
    style = ChatStyle(tokenizer)
    between = style.next(Observation(text="x"), [7, 7, 7])
    assert (
        tokenizer.decode(between)
        == "<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("answer", "said", "action"),
    [
        ("whole", "I think.\ngo north\n", "I think.\ngo north"),
        ("whole", "", ""),
        ("last_line", "I think.\ngo north\n\n", "go north"),
        ("last_line", "Thought: hm\nAction: take apple 1", "take apple 1"),
        ("last_line", "", ""),
        ("tag:answer", "<answer>1</answer>, no: <answer> 2\n3 </answer>.", "2\n3"),
        ("tag:answer", "<answer>1", ""),
        ("tag:answer", "1</answer>", ""),
    ],
)
def test_the_environment_gets_the_whole_answer_or_the_part_that_is_asked_for(
    tokenizer, answer, said, action
):
    style = ChatStyle(tokenizer, answer=answer)
    sampled = tokenizer.encode(said, add_special_tokens=False)
    assert style.action(sampled) == action
    assert style.action([*sampled, tokenizer.eos_token_id]) == action


def test_a_part_of_the_answer_that_there_is_not_is_refused(tokenizer):
    with pytest.raises(ValueError, match="answer='first' must be whole, last_line or tag:NAME"):
        ChatStyle(tokenizer, answer="first")


def test_goal_and_admissible_commands_are_shown(tokenizer):
    style = ChatStyle(tokenizer, instruction="Be brief.")
    info = {"goal": "find the apple", "admissible_commands": ["look", "go north"]}
    text = tokenizer.decode(style.first(Observation(text="A room.", info=info)))
    assert "Your task: find the apple" in text
    assert "You can: look, go north\nBe brief." in text


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="agent.style=plain"):
        ChatStyle(tokenizer)
