import random

import pytest

from flash.config import load, try_environment
from flash.envs.code import FormulasEnv
from flash.types import Task
from tests.sandboxes import needs_sandbox

pytestmark = needs_sandbox


def test_what_the_words_say_is_what_the_code_computes():
    env = FormulasEnv(operators=3)
    for seed in range(50):
        problem = env.problem(seed)
        (turn,) = env.demonstrate(Task(seed))
        assert turn.observation.text == problem.question == env.reset(seed=seed)[0]
        names: dict[str, object] = {}
        exec(turn.action, names)
        for test in (*problem.public, *problem.hidden_tests()):
            assert names["f"](*test.arguments) == test.expected[0]


def test_words_are_read_as_they_are_written():
    asked = {FormulasEnv(operators=2).problem(seed).question for seed in range(300)}
    assert max(each.count(" of ") for each in asked) == 2
    assert "Write f(x, y, z) in Python: the sum of y and 7" in asked


def test_slips_are_as_frequent_as_was_asked():
    careful, careless = FormulasEnv(), FormulasEnv(slips=0.3)
    same = 0
    for seed in range(300):
        same += careful.demonstrate(Task(seed)) == careless.demonstrate(Task(seed))
    # Of a formula's 3 or 5 signs each stays with 0.7, and with a share of 0.3 is drawn anew.
    assert 60 < same < 140


def test_the_splits_share_no_formula():
    train, heldout = (FormulasEnv(split=split) for split in ("train", "heldout"))
    seeds = random.Random(0).sample(range(2**31), 200)
    assert {train.problem(s).question for s in seeds}.isdisjoint(
        heldout.problem(s).question for s in seeds
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"operators": 0}, "operators=0 must be a whole number, at least 1"),
        ({"slips": 1}, "slips=1 must be 0 or more and below 1"),
        ({"split": "all"}, "split='all' must be 'train' or 'heldout'"),
        ({"turns": 1.5}, "turns=1.5 must be a whole number, at least 1"),
        ({"rewards": "some"}, "rewards='some' must be 'all' or 'fraction'"),
        ({"memory_mb": 1}, "memory_mb=1 must be a whole number, at least 64"),
        ({"test_seconds": 0}, "test_seconds=0 must be above 0, and at most answer_seconds=30"),
        ({"answer_seconds": 1}, "test_seconds=6.0 must be above 0, and at most answer_seconds=1"),
        ({"sandbox": "none"}, "sandbox='none' must be 'local'"),
    ],
)
def test_an_option_that_can_not_be_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        FormulasEnv(**options)


def test_what_waits_for_sandboxes_is_refused_in_the_event_loop():
    env = load("formulas").env
    try_environment(env)
    with pytest.raises(ValueError, match=r"env\.hosts=0 would have env\.name='flash\.envs\.code"):
        try_environment(load("formulas", {"env.hosts": 0}).env)


@pytest.mark.slow
def test_a_formula_is_tested_in_a_sandbox():
    env = FormulasEnv()
    env.reset(seed=7)
    (turn,) = env.demonstrate(Task(7))
    env.reset(seed=7)
    assert env.step(turn.action)[1] == 1
    env.reset(seed=7)
    assert env.step(turn.action.replace("return", "return 1 +"))[1] == 0
