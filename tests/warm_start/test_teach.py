"""The small policy's folder: what names it, who can't have one, what a stopped run leaves."""

import itertools
import json
import random
import shutil
import sys

import pytest

from flash.fakes import fake_sample
from flash.types import Observation, Sample, Turn
from flash.warm_start.config import PolicyConfig, WarmStartConfig
from flash.warm_start.teach import _batches, folder_name, key_of, small_model

POLICY = PolicyConfig(layers=1, hidden_size=8, heads=2, max_tokens=16)


class TeachingEnv:
    def vocabulary(self):
        return ["go", "left", "right"]

    def demonstrate(self, task):
        return [Turn(Observation(text="left or right"), "go left")]


class DumbStyle:
    """It can't spell."""

    stop_token_ids = (0,)


class SpellingStyle(DumbStyle):
    def first(self, observation):
        return [1]

    def spell(self, action):
        return [1, 0]


async def make(cache_dir, *envs, style=DumbStyle, on_progress=lambda *_: None, **warm_start):
    return await small_model(
        envs=envs or [TeachingEnv()],
        env_key=[{"name": "maze", "options": {}}],
        make_style=lambda tokenizer: style(),
        policy=POLICY,
        warm_start=WarmStartConfig(**({"steps": 0} | warm_start)),
        threads=1,
        seed=0,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )


def key(*, env=None, seed=0, layers=1, **warm_start):
    options = {"size": 4, "ice": 0.2} if env is None else env
    return folder_name(
        key_of([{"name": "maze", "options": options}]),
        POLICY.model_copy(update={"layers": layers}),
        WarmStartConfig(**warm_start),
        seed,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"env": {"size": 5, "ice": 0.2}},
        {"seed": 1},
        {"layers": 2},
        {"steps": 7},
        {"demonstrations": 7},
        {"observation_weight": 0.0},
    ],
)
def test_other_settings_have_another_folder(changed):
    assert key(**changed) != key()


def test_the_same_settings_in_another_order_have_the_same_folder():
    assert key(env={"ice": 0.2, "size": 4}) == key(env={"size": 4, "ice": 0.2})
    assert key().startswith("maze-")


async def test_a_small_policy_is_made_once_and_kept(tmp_path):
    first = await make(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in first.iterdir()
    }
    (first / "mark").touch()
    assert await make(tmp_path) == first
    assert (first / "mark").exists(), "not made again"
    assert list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize("method", ["vocabulary", "demonstrate"])
async def test_an_environment_that_can_not_teach_is_refused_with_the_remedy(tmp_path, method):
    other = {"vocabulary": "demonstrate", "demonstrate": "vocabulary"}[method]
    env = type("SilentEnv", (), {other: lambda self: []})()
    with pytest.raises(ValueError) as caught:
        await make(tmp_path, env)
    message = str(caught.value)
    assert f"model=small: SilentEnv has no method {method!r}" in message
    assert "set model to a path or a hub name instead" in message
    assert not list(tmp_path.iterdir())


async def test_the_environments_of_several_task_sets_teach_one_policy_in_turn(tmp_path):
    asked = []

    class Sums(TeachingEnv):
        def vocabulary(self):
            return ["one", "two"]

        def demonstrate(self, task):
            asked.append("sums")
            return super().demonstrate(task)

    class Maze(TeachingEnv):
        def demonstrate(self, task):
            asked.append("maze")
            return super().demonstrate(task)

    found = await make(tmp_path, Maze(), Sums(), style=SpellingStyle, steps=1, demonstrations=4)
    assert asked == ["maze", "sums"] * 2
    tokens = json.loads((found / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"left", "right", "one", "two"} <= tokens.keys()


def test_the_same_environments_in_another_order_or_twice_have_the_same_folder():
    maze, sums = {"name": "maze", "options": {"size": 4}}, {"name": "sums", "options": {}}
    assert key_of([maze, sums, maze]) == key_of([sums, maze])
    assert len(key_of([maze, sums, maze])) == 2
    settings = POLICY, WarmStartConfig(), 0
    assert folder_name(key_of([maze, sums]), *settings).startswith("maze+sums-")
    assert folder_name(key_of([maze]), *settings) != folder_name(key_of([maze, sums]), *settings)


class Absent(TeachingEnv):
    def vocabulary(self):
        raise KeyError("no words")


class Odd(TeachingEnv):
    def vocabulary(self):
        return "go left right"


class Numbers(TeachingEnv):
    def vocabulary(self):
        return ["go", 3]


class Leaves(TeachingEnv):
    def demonstrate(self, task):
        sys.exit("no expert")


class Tells(TeachingEnv):
    def demonstrate(self, task):
        return ["go left"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            Absent,
            r"Absent\.vocabulary failed: KeyError: 'no words' in .*test_teach\.py, line \d+: m",
        ),
        (Odd, r"Odd\.vocabulary gave no list of str: 'go left right': mend it, or set model to"),
        (Numbers, r"Numbers\.vocabulary gave no list of str: \['go', 3\]: mend it"),
        (Leaves, r"Leaves\.demonstrate failed: SystemExit: no expert in .*: mend it, or set model"),
        (Tells, r"Tells\.demonstrate gave no list of Turn: \['go left'\]: mend it, or set model"),
    ],
)
async def test_a_teacher_that_fails_is_refused_by_its_method(tmp_path, env, message):
    with pytest.raises(ValueError, match=rf"^model=small: {message}"):
        await make(tmp_path, env(), style=SpellingStyle, steps=1)
    assert not list(tmp_path.iterdir())


async def test_a_style_that_can_not_spell_is_refused_and_nothing_half_made_stays(tmp_path):
    with pytest.raises(ValueError, match=r"DumbStyle has no method 'spell' .* agent\.style=plain"):
        await make(tmp_path, steps=1)
    assert not list(tmp_path.iterdir())


async def test_a_run_that_is_stopped_while_teaching_leaves_nothing_half_taught(tmp_path):
    class Stopped(Exception):
        pass

    def stop(*progress):
        raise Stopped

    with pytest.raises(Stopped):
        await make(tmp_path, style=SpellingStyle, steps=1, on_progress=stop)
    assert not list(tmp_path.iterdir())


async def test_of_two_runs_that_teach_the_same_policy_at_once_the_later_takes_the_earlier_ones(
    tmp_path,
):
    earlier = await make(tmp_path / "elsewhere")

    class SlowEnv(TeachingEnv):
        def vocabulary(self):
            # The other run is done between our look and our end.
            shutil.copytree(earlier, tmp_path / "here" / earlier.name)
            (tmp_path / "here" / earlier.name / "mark").touch()
            return super().vocabulary()

    kept = await make(tmp_path / "here", SlowEnv())
    assert (kept / "mark").exists()
    assert list((tmp_path / "here").iterdir()) == [kept]


def sample(token: int, length: int) -> Sample:
    return fake_sample([token] * length)


def test_each_pass_has_every_demonstration_once_in_a_new_order():
    samples = [sample(n, 2) for n in range(6)]
    batches = list(itertools.islice(_batches(samples, 4, random.Random(0)), 6))
    assert [len(batch) for batch in batches] == [2] * 6, "cut at four tokens"
    order = [int(s.token_ids[0]) for batch in batches for s in batch]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]


def test_a_batch_larger_than_all_demonstrations_goes_on_into_the_next_pass():
    (batch,) = itertools.islice(_batches([sample(0, 3), sample(1, 3)], 10, random.Random(0)), 1)
    assert sum(s.num_tokens for s in batch) == 12
