"""Chat templates as models bring them: those that serve, and those that are refused by name."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flash.agents.chat import ChatStyle
from flash.config import load
from flash.parts.model import make_style
from flash.types import Observation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def brackets(answer: str) -> str:
    """Turns as Llama 2 and Mistral have them."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
    )


def spelled(template: str, *, eos: str | None = "</s>", special: tuple[str, ...] = (), **more):
    """A tokenizer of bytes with that template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    known = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", *special)
    core.add_special_tokens([AddedToken(token, special=True) for token in known])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **more,
    )


PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% for part in m.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}",
)
SERVE = {
    "an end that is not eos_token": CHATML,
    "words trimmed": CHATML.replace("m.content", "m.content | trim"),
    "content as parts": PARTS,
    "content as parts, or an error": PARTS.replace(
        "{% for part", "{{ m.content[0].text[:0] }}{% for part"
    ),
    "white space before the end": brackets(" {{ m.content }} {{ eos_token }}"),
    "white space after the end": brackets("{{ m.content }}{{ eos_token }}\n\n"),
    "no end at all": brackets(" {{ m.content }}"),
    "no end at all, of turns that begin with a token": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "bos_token in each turn": brackets("{{ m.content }}{{ eos_token }}{{ bos_token }}"),
    "an end after answers alone": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "an end between turns alone": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><|assistant|>{% endif %}"
    ),
    "reasoning begun by the prompt": CHATML.replace("assistant\n", "assistant\n<think>\n"),
    "reasoning left out of the past": CHATML.replace(
        "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
    ),
    "the system message within the first of the user's": brackets("{{ m.content }}{{ eos_token }}")
    .replace("for m in messages", "for m in messages[messages[0].role == 'system':]")
    .replace(
        "[INST] ", "[INST] {{ messages[0].content if loop.first and messages[0].role == 'system' }}"
    ),
    "roles that must alternate": CHATML.replace(
        "<|im_start|>{{ m.role }}",
        "{% set at = loop.index0 - (messages[0].role == 'system') %}"
        "{% if at >= 0 and (m.role == 'user') != (at % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", SERVE.values(), ids=SERVE.keys())
def test_a_conversation_grows_as_the_template_writes_the_whole(template):
    tokenizer = spelled(template)
    style = ChatStyle(tokenizer, system="Act.")
    turns = ["A room. ", "go north", "A garden.", "go south", "A room."]
    tokens = style.first(Observation(text=turns[0]))
    ends = [token for token in style.stop_token_ids if token != tokenizer.eos_token_id]
    end = ends[0] if ends else tokenizer.eos_token_id
    assert tokenizer.eos_token_id in style.stop_token_ids
    for said, text in ((turns[1], turns[2]), (turns[3], turns[4])):
        sampled = [*tokenizer.encode(said, add_special_tokens=False), end]
        tokens += sampled
        tokens += style.next(Observation(text=text), sampled)
    parts = "part" in template
    whole = tokenizer.apply_chat_template(
        [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in zip(
                ("system", "user", "assistant", "user", "assistant", "user"),
                ("Act.", *turns),
                strict=True,
            )
        ],
        tokenize=False,
        add_generation_prompt=True,
    )

    def squeezed(text: str) -> str:
        """Without what may differ: the model's own spaces, an end it alone wrote, its thoughts."""
        without_end = "</s>" not in whole and "<|im_end|>" not in whole
        for token in ("</s>" if without_end else " ", " ", "<think>\n"):
            text = text.replace(token, "")
        return text

    assert squeezed(tokenizer.decode(tokens)) == squeezed(whole)


def test_white_space_before_the_end_is_not_doubled_with_it():
    tokenizer = spelled(SERVE["white space before the end"])
    style = ChatStyle(tokenizer)
    eos = tokenizer.eos_token_id
    closed = style.next(Observation(text="x"), [7, eos])
    assert tokenizer.decode(closed) == "[INST] x [/INST]"
    cut = style.next(Observation(text="x"), [7])
    assert tokenizer.decode(cut) == " </s>[INST] x [/INST]"


def test_what_begins_the_next_turn_is_no_end_of_an_answer():
    tokenizer = spelled(SERVE["no end at all, of turns that begin with a token"])
    style = ChatStyle(tokenizer)
    assert style.stop_token_ids == (tokenizer.eos_token_id,)
    between = style.next(Observation(text="x"), [7, tokenizer.eos_token_id])
    assert tokenizer.decode(between) == "<|user|>x<|assistant|>"


def test_bos_token_is_not_doubled_by_a_tokenizer_that_adds_one_to_every_text():
    tokenizer = spelled("{{ bos_token }}" + CHATML)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer.encode("a").count(bos) == 1
    style = ChatStyle(tokenizer)
    assert style.first(Observation(text="A room.")).count(bos) == 1
    assert style.next(Observation(text="A garden."), [7]).count(bos) == 0


def test_a_turn_that_ended_by_another_stop_token_is_not_ended_again():
    style = ChatStyle(tokenizer := spelled(CHATML))
    between = style.next(Observation(text="x"), [7, tokenizer.eos_token_id])
    assert tokenizer.decode(between).startswith("\n<|im_start|>user")


def test_the_stop_tokens_are_those_of_template_tokenizer_and_generation_config(tmp_path):
    tokenizer = spelled(CHATML, special=("<|eom|>",))
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>", "<|eom|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[1:]}))
    kept = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ChatStyle(kept).stop_token_ids == tuple(ids)


def test_an_end_that_is_an_added_token_but_no_special_one_is_a_stop_token():
    tokenizer = spelled(CHATML.replace("<|im_end|>", "<END>"))
    tokenizer.add_tokens(AddedToken("<END>", special=False))
    style = ChatStyle(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<END>")
    assert style.stop_token_ids[0] == end
    assert style.action([*tokenizer.encode("go", add_special_tokens=False), end]) == "go"


LAST_ONLY = CHATML.replace("in messages", "in messages[-1:]")
REFUSED = {
    "past turns dropped": (LAST_ONLY, "shows the system message 0 times"),
    "answers dropped": (
        CHATML.replace("in messages", "in messages if m.role != 'assistant'"),
        "shows an answer 0 times",
    ),
    "answers cut off": (CHATML.replace("m.content }}", "m.content[:3] }}"), "0 times"),
    "an observation twice": (
        CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content if m.role == 'user' }}"),
        "shows an observation 2 times",
    ),
    "no system message": (
        CHATML.replace("{{ m.role }}", "{{ raise_exception('no system') if m.role == 'system' }}"),
        "no system: set agent.style_options.system=''",
    ),
    "the system message within the last of the user's": (
        CHATML.replace("in messages", "in messages[messages[0].role == 'system':]").replace(
            "{{ m.content }}",
            "{{ messages[0].content if loop.last and messages[0].role == 'system' }}"
            "{{ m.content }}",
        ),
        "set agent.style_options.system=''",
    ),
    "one turn alone": (
        "{{ raise_exception('one turn') if messages | length > 2 }}" + CHATML,
        "one turn: set agent.style_options.system='', or use agent.style=plain, or another model",
    ),
    "no start of the answer": (CHATML.partition("{% if")[0], "turn by turn: use agent.style=plain"),
    "turns that are counted": (
        CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}"),
        "turn by turn: use agent.style=plain",
    ),
    "an end that is no token": (
        CHATML.replace("<|im_end|>", "<|done|>"),
        "ends an answer with '<|done|>', which is no token of its tokenizer",
    ),
    "a template that is none": ("{{ messages", "refuses the messages"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_a_template_in_which_no_conversation_can_grow_is_refused_with_the_remedy(template, why):
    config = load("frozen_lake", {"agent.style": "chat"})
    with pytest.raises(ValueError) as refusal:
        make_style(config, spelled(template))
    assert str(refusal.value).startswith("agent.style='chat' with the tokenizer of model='small': ")
    assert why in str(refusal.value)
    assert "another model" in str(refusal.value)


def test_without_a_system_message_a_template_that_has_none_serves():
    template, _ = REFUSED["no system message"]
    assert ChatStyle(spelled(template), system="")


def test_a_model_whose_answers_nothing_ends_is_refused():
    template = SERVE["no end at all"].replace("eos_token", "''")
    with pytest.raises(ValueError, match="no token ends an answer: the tokenizer has no eos_token"):
        ChatStyle(spelled(template, eos=None))
