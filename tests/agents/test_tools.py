"""Episodes with tools: what is sampled, what is read, and what of it is trained on."""

import numpy as np
import pytest

from flash.agents import ChatStyle, EnvironmentAgent, PlainStyle
from flash.environments.inline import InlineEnvs
from flash.errors import EnvFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.tools.tool import PROBE
from flash.tools.toolset import Toolset
from flash.types import Observation, Task
from tests.tools.templates import HERMES, TEMPLATES, tokenizer_of

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
RESULT = "<|im_start|>user\n<tool_response>\n%s\n</tool_response><|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


class Asks:
    """Asks twice; the reward is how long the answer is."""

    def reset(self, *, seed=None, options=None):
        self.heard = []
        return "2 + 3?", {}

    def step(self, action):
        self.heard.append(action)
        return "and now?", float(len(action)), len(self.heard) == 2, False, {}

    def close(self): ...


async def played(
    said, tmp_path, *, form="hermes", tools=("tests.tools.functions:add",), max_chars=100, **options
):
    """The trajectory in which that is said, the text of all of it, and what the steps were."""
    template, eos = TEMPLATES[form]
    tokenizer = tokenizer_of(template, eos)
    spoken = iter(said)
    env = Asks()
    worker = FakeWorker(
        "w",
        token_s=(0, 0),
        script=lambda prompt, _: tokenizer.encode(next(spoken), add_special_tokens=False),
    )
    async with (
        InferenceHub([worker]) as hub,
        Toolset(tools, [], max_chars=max_chars, log_dir=tmp_path) as toolset,
    ):
        agent = EnvironmentAgent(
            envs=InlineEnvs(lambda: env),
            style=ChatStyle(tokenizer, system="").calling(toolset.schemas),
            tools=toolset,
            max_tokens=500,
            **{"max_sequence_tokens": 4000} | options,
        )
        episode = Episode(1, Task(0), hub=hub)
        trajectory = await agent.play(episode)
    text = tokenizer.decode(trajectory.sequences[-1].token_ids)
    return trajectory, text, env.heard, episode, tokenizer


def sampled(trajectory, tokenizer):
    """What is trained on, response by response."""
    (sequence,) = trajectory.sequences
    return [tokenizer.decode(run) for is_sampled, run in sequence.runs(0) if is_sampled]


async def test_results_are_read_and_only_what_was_said_is_trained_on(tmp_path):
    said = [f"{CALL}\n{CALL}<|im_end|>", "It is 5.<|im_end|>", "so<|im_end|>"]
    trajectory, text, heard, episode, tokenizer = await played(said, tmp_path)
    assert heard == ["It is 5.", "so"]
    assert (trajectory.turns, trajectory.reward) == (3, 10.0)
    assert trajectory.turn_rewards == [0.0, 8.0, 2.0]
    assert trajectory.turn_states == ["2 + 3?", "5\n5", "and now?"]
    assert sampled(trajectory, tokenizer) == said
    asked = f"<|im_start|>user\n2 + 3?<|im_end|>\n{ASSISTANT}"
    between = f"{said[0]}\n{RESULT % 5}{RESULT % 5}{ASSISTANT}"
    rest = f"{said[1]}\n<|im_start|>user\nand now?<|im_end|>\n{ASSISTANT}{said[2]}"
    assert text.endswith(asked + between + rest)
    assert "Adds two numbers." in text.removesuffix(asked + between + rest)
    (sequence,) = trajectory.sequences
    assert np.all(sequence.versions[sequence.loss_mask == 0] == -1)
    assert "tools" in episode.seconds


async def test_of_each_turn_a_sample_has_all_that_was_before_it_as_its_prompt(tmp_path):
    said = [f"{CALL}<|im_end|>", "5<|im_end|>", "so<|im_end|>"]
    trajectory, _, _, _, tokenizer = await played(said, tmp_path, samples="turns")
    for sequence, words in zip(trajectory.sequences, said, strict=True):
        end = tokenizer.encode(words, add_special_tokens=False)
        assert sequence.token_ids[-len(end) :].tolist() == end
        assert sequence.loss_mask.sum() == len(end)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("<tool_call>{</tool_call><|im_end|>", "No tool was called: it is not in the format of"),
        (CALL, "No tool was called: the answer was cut off"),
        (CALL.replace("add", "sub") + "<|im_end|>", "Error: there is no tool 'sub'"),
    ],
)
async def test_a_call_that_is_wrong_is_told_and_may_be_mended(tmp_path, wrong, told):
    said = [wrong, f"{CALL}<|im_end|>", "5<|im_end|>", "so<|im_end|>"]
    trajectory, text, heard, _, tokenizer = await played(said, tmp_path)
    assert heard == ["5", "so"]
    assert text.count(told) == 1
    assert text.index(told) < text.index(RESULT % 5)
    assert sampled(trajectory, tokenizer) == said


async def test_rounds_of_tools_are_among_the_responses_that_are_allowed(tmp_path):
    said = [f"{CALL}<|im_end|>"] * 3
    trajectory, text, heard, _, _ = await played(said, tmp_path, max_turns=3)
    assert heard == []
    assert (trajectory.turns, trajectory.reward, trajectory.success) == (3, 0.0, False)
    assert trajectory.turn_rewards == [0.0, 0.0, 0.0]
    assert trajectory.turn_states == ["2 + 3?", "5", "5"]
    assert text.count(RESULT % 5) == 2, "nobody reads the last one"


async def test_results_that_leave_no_room_end_the_episode_before_them(tmp_path):
    said = [f"{CALL}<|im_end|>"]
    whole, _, _, _, _ = await played([*said, "5<|im_end|>", "<|im_end|>"], tmp_path)
    (sequence,) = whole.sequences
    first = [run for _, run in sequence.runs(0)]
    up_to = sum(map(len, first[:3]))  # with the result
    trajectory, _, heard, _, tokenizer = await played(said, tmp_path, max_sequence_tokens=up_to)
    assert heard == []
    assert sampled(trajectory, tokenizer) == said
    assert trajectory.sequences[0].num_tokens == up_to - len(first[2])


async def test_llama_and_harmony_call_tools_too(tmp_path):
    call = '{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>'
    _, _, heard, _, _ = await played(
        [call, "5<|eot_id|>", "so<|eot_id|>"], tmp_path, form="llama3_json"
    )
    assert heard == ["5", "so"]
    to = "<|channel|>commentary to=functions.add<|message|>"
    harmony = [
        f'<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{to}{{"a": 2, "b": 3}}<|call|>',
        "<|channel|>final<|message|>5<|return|>",
        "<|channel|>final<|message|>so<|return|>",
    ]
    _, text, heard, _, _ = await played(harmony, tmp_path, form="harmony")
    assert heard == ["5", "so"]
    assert "<|call|><|start|>functions.add to=assistant<|channel|>commentary<|message|>5" in text


async def test_a_tool_at_fault_fails_the_episode(tmp_path):
    said = ['<tool_call>\n{"name": "surrogate", "arguments": {}}\n</tool_call><|im_end|>']
    with pytest.raises(EnvFailure, match="tool 'surrogate'"):
        await played(said, tmp_path, tools=["tests.tools.functions:surrogate"])


async def test_tools_are_for_a_style_that_reads_calls(tmp_path):
    tokenizer = tokenizer_of(*TEMPLATES["hermes"])
    async with Toolset([], [], log_dir=tmp_path) as tools:
        with pytest.raises(ValueError, match=r"use ChatStyle\.calling"):
            EnvironmentAgent(
                envs=InlineEnvs(Asks), style=PlainStyle(tokenizer), tools=tools, max_tokens=1
            )


def test_later_observations_are_written_as_the_template_writes_them_beside_tools():
    template = HERMES.replace(
        "{% if m.role == 'tool' %}",
        "{% if tools and m.role == 'user' %}<|im_start|>user\n(tools) {{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'tool' %}",
    )
    tokenizer = tokenizer_of(template)
    style = ChatStyle(tokenizer, system="").calling([PROBE])
    said = tokenizer.encode("5<|im_end|>", add_special_tokens=False)
    told = tokenizer.decode(style.next(Observation(text="and now?"), said))
    assert told == f"\n<|im_start|>user\n(tools) and now?<|im_end|>\n{ASSISTANT}"
