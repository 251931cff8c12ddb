import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra 'reasoning'")

from flash.envs.reasoning_gym import ReasoningGymEnv
from flash.types import Task

EASY = {"max_terms": 2, "max_digits": 1}


def test_the_right_answer_earns_one_and_ends_the_episode():
    env = ReasoningGymEnv(config=EASY)
    for seed in range(20):
        (turn,) = env.demonstrate(Task(seed))
        _, reward, terminated, _, info = env.step(turn.action)
        assert (reward, terminated, info["success"]) == (1.0, True, True)


def test_an_answer_that_merely_contains_the_solution_earns_nothing():
    env = ReasoningGymEnv(dataset="letter_counting")
    (turn,) = env.demonstrate(Task(3))
    env.reset(seed=3)
    spray = " ".join(str(n) for n in range(20))
    assert turn.action in spray.split()
    assert env.step(spray)[1] == 0.0


def test_the_seed_decides_the_problem_and_the_splits_share_no_question():
    def questions(split):
        env = ReasoningGymEnv(config=EASY, split=split)
        return {env.reset(seed=seed)[0] for seed in range(200)}

    assert questions("train") == questions("train")
    assert not questions("train") & questions("heldout")


def test_the_vocabulary_covers_questions_and_answers():
    env = ReasoningGymEnv(config=EASY)
    words = set(env.vocabulary())
    for seed in range(50):
        (turn,) = env.demonstrate(Task(seed))
        assert {*turn.observation.text.split(), *turn.action.split()} <= words


def test_an_unknown_dataset_is_named():
    with pytest.raises(ValueError, match="dataset='sums'"):
        ReasoningGymEnv(dataset="sums")
