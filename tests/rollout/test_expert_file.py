"""An expert's file: rows of an export as they are, conversations by the model's template."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash.agents.chat import ChatStyle
from flash.conversation import ChatTemplate
from flash.rollout.expert_file import check_file, read_file
from flash.types import ExpertSequence, Observation

WORDS = ["go", "north", "south", "a", "room", "garden", "be", "brief", "?"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "system", "user", "assistant"]
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token=WORDS[-1]))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[:2]])
    template = CHATML.replace("<|im_start|> ", "<|im_start|>").replace(
        " <|im_end|> ", "<|im_end|>\n"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", chat_template=template
    )


VOCABULARY = len(WORDS) + len(SPECIAL)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(tokenizer: Any, *turns: tuple[str, str]) -> dict[str, Any]:
    """As `flash export` writes them."""
    token_ids: list[int] = []
    mask: list[int] = []
    for read, said in turns:
        of_read, of_said = ids(tokenizer, read), ids(tokenizer, said)
        token_ids += of_read + of_said
        mask += [0] * len(of_read) + [1] * len(of_said)
    sequence = {"token_ids": token_ids, "logprobs": [0.0] * len(mask), "loss_mask": mask}
    return {
        "episode": 3,
        "turns": [{"read": read, "said": said, "reward": 0.0} for read, said in turns],
        "messages": [user("never read"), assistant("here")],
        "sequences": [sequence],
    }


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "e.jsonl"
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows)
    )
    return path


def read(path: Path, tokenizer: Any, max_tokens: int = 100) -> list[list[ExpertSequence]]:
    return read_file(path, tokenizer, vocabulary=VOCABULARY, max_tokens=max_tokens)


# ── exports ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tokens_and_masks_of_an_export_are_taken_as_they_are(tokenizer, tmp_path, suffix):
    rows = [row(tokenizer, ("a room", "go north"), ("garden", "go")), row(tokenizer, ("a", "go"))]
    path = written(tmp_path, rows[0], "", rows[1])
    if suffix == "parquet":
        path = tmp_path / "e.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    check_file(path)
    found = read(path, tokenizer)
    for given, (made,) in zip(rows, found, strict=True):
        assert made.token_ids.tolist() == given["sequences"][0]["token_ids"]
        assert made.loss_mask.tolist() == given["sequences"][0]["loss_mask"]
        assert (made.token_ids.dtype, made.loss_mask.dtype) == (np.int64, np.float32)
    second = 2 if suffix == "parquet" else 3
    assert [made.source for (made,) in found] == [f"{path}:1", f"{path}:{second}"]


def test_an_episode_of_several_sequences_is_one_trajectory(tokenizer, tmp_path):
    one = row(tokenizer, ("a room", "go north"))
    one["sequences"] *= 2
    assert [len(trajectory) for trajectory in read(written(tmp_path, one), tokenizer)] == [2]


def test_what_can_not_be_imitated_is_left_out_counted_and_told(tokenizer, tmp_path, caplog):
    unfinished = {**row(tokenizer, ("a", "go")), "sequences": [], "turns": []}
    long = row(tokenizer, ("a room", "go north"), ("garden", "go south"))
    path = written(tmp_path, unfinished, row(tokenizer, ("a", "go")), long, long)
    with caplog.at_level(logging.WARNING):
        assert len(read(path, tokenizer, max_tokens=6)) == 1
    assert (
        "of 4 trajectories are left out "
        f"1 without a word to imitate (the first: {path}:1), "
        f"2 longer than agent.max_sequence_tokens=6 (the first: {path}:3)"
    ) in caplog.text
    with pytest.raises(ValueError, match=r"has nothing to imitate: 2 longer than .*=6 \(the fi"):
        read(written(tmp_path, long, long), tokenizer, max_tokens=6)


# ── conversations ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["tokenizer", "bytes_tokenizer"])
def test_a_conversation_becomes_what_the_agent_would_have_sampled(kind, tmp_path, request):
    tokenizer = request.getfixturevalue(kind)
    system = {"role": "system", "content": "be brief"}
    turns = [("a room", "go north"), ("garden", "go"), ("a garden", "go south")]
    messages = [message for read, said in turns for message in (user(read), assistant(said))]
    path = written(tmp_path, {"messages": [system, *messages, user("a room")]})
    ((made,),) = read(path, tokenizer, max_tokens=1000)

    style = ChatStyle(tokenizer, system="be brief")
    token_ids = style.first(Observation(text="a room"))
    mask = [0] * len(token_ids)
    for (_, said), following in zip(turns, [*turns[1:], None], strict=True):
        sampled = [*ids(tokenizer, said), *style.stop_token_ids[:1]]
        assert style.action(sampled) == said
        token_ids, mask = token_ids + sampled, mask + [1] * len(sampled)
        if following is not None:
            prompt = style.next(Observation(text=following[0]), sampled)
            token_ids, mask = token_ids + prompt, mask + [0] * len(prompt)
    assert made.token_ids.tolist() == token_ids
    assert made.loss_mask.tolist() == mask


def test_words_have_no_space_before_them_that_only_begins_a_text():
    core = Tokenizer(models.BPE({c: i for i, c in enumerate("▁go\n!")}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken("</s>", special=True)])
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", chat_template=template
    )
    assert ids(spaced, "go") == ids(spaced, "▁go")
    assert ChatTemplate(spaced).words("go") == [*ids(spaced, "go")[1:], spaced.eos_token_id]


# ── what is refused ──────────────────────────────────────────────────────────────────────────


def changed(tokenizer: Any, **change: Any) -> dict[str, Any]:
    one = row(tokenizer, ("a room", "go north"))
    return {**one, "sequences": [{**one["sequences"][0], **change}]}


def tools(tokenizer: Any) -> dict[str, Any]:
    call = {"function": {"name": "go", "arguments": {}}}
    return {"messages": [user("a"), {**assistant(""), "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: "{", r"e.jsonl:2 is no row: Input data was truncated"),
        (lambda t: "[]", r"e.jsonl:2 is no row: Expected `object`, got `array`"),
        (lambda t: {"text": "a"}, r"e.jsonl:2 has neither `messages` nor `sequences`: give rows"),
        (lambda t: {"messages": [user("a")]}, r"e.jsonl:2: no message is by 'assistant'"),
        (tools, r"e.jsonl:2: an assistant's message is not a text alone"),
        (lambda t: {"messages": "a"}, r"e.jsonl:2 is no row: Expected `array \| null`"),
        (lambda t: changed(t, token_ids=[1, 2]), r":2: 2 token_ids with a loss_mask of 4"),
        (lambda t: changed(t, loss_mask=[0, 0, -1, 1]), r":2: loss_mask must be .* at least 0"),
        (lambda t: changed(t, loss_mask=None), r":2 is no row: .*`\$.sequences\[0\].loss_mask`"),
        (
            lambda t: changed(t, token_ids=[3, 4, 0, 999]),
            r":2: token 999 is none of the model's 14",
        ),
        (lambda t: changed(t, token_ids=[3, 4, 0, -1]), r":2: token -1 is none of the model's 14"),
        (lambda t: changed(t, token_ids=[3, 4, 0, 1 << 63]), r":2: a token id is no id"),
        (
            lambda t: changed(t, token_ids=[3, 4, 0, 2]),
            r":2: its tokens are 'go south' here, and were 'go north': another tokenizer wrote it",
        ),
    ],
)
def test_a_row_that_is_wrong_is_named_with_its_place(tokenizer, tmp_path, make, said):
    path = written(tmp_path, row(tokenizer, ("a", "go")), make(tokenizer))
    with pytest.raises(ValueError, match=rf"^rollout\.expert\.file: .*{said}"):
        read(path, tokenizer)


def test_a_file_that_is_none_is_told_before_its_rows_are_read(tmp_path):
    path = tmp_path / "e.parquet"
    for content, said in ((None, "is not there: name a file"), (b"no", "is no Parquet that can")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            check_file(path)
    with pytest.raises(ValueError, match="is no file: name a file"):
        check_file(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"e\.parquet:1 has neither `messages` nor `sequences`"):
        check_file(path)
    parquet.write_table(pyarrow.table({"messages": ["a"]}), path)
    with pytest.raises(ValueError, match=r"e\.parquet:1 is no row: Expected `array \| null`"):
        check_file(path)
    (tmp_path / "e.jsonl").write_bytes(b"\n")
    with pytest.raises(ValueError, match="holds no row"):
        check_file(tmp_path / "e.jsonl")


def test_without_pyarrow_parquet_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "e.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs pyarrow, which is not installed .*JSON lines"):
        check_file(tmp_path / "e.parquet")


def test_a_tokenizer_without_a_chat_template_takes_no_conversations(tokenizer, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    path = written(tmp_path, {"messages": [user("a"), assistant("go")]})
    with pytest.raises(ValueError, match="has no chat template"):
        read(path, bare)
