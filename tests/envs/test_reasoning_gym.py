import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra 'reasoning'")

from flash.envs.reasoning_gym import CURRICULA, DATASETS, ReasoningGymEnv
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


def test_several_datasets_have_their_share_and_each_seed_its_own():
    sums = {"weight": 3, "config": EASY}
    env = ReasoningGymEnv(datasets={"chain_sum": sums, "letter_counting": {}})
    names = [env.reset(seed=seed)[1]["dataset"] for seed in range(200)]
    assert 120 < names.count("chain_sum") < 180
    assert names == [env.reset(seed=seed)[1]["dataset"] for seed in range(200)]
    for seed in range(20):
        (turn,) = env.demonstrate(Task(seed))
        assert env.step(turn.action)[1] == 1.0


def test_what_the_dataset_says_of_a_problem_is_in_the_info():
    _, info = ReasoningGymEnv(config=EASY).reset(seed=3)
    assert info["metadata"]["source_dataset"] == info["dataset"] == "chain_sum"


def test_a_level_is_the_curriculum_s_and_config_comes_before_it():
    def terms(**options):
        env = ReasoningGymEnv(dataset="chain_sum", **options)
        return max(env.reset(seed=seed)[0].count(" + ") for seed in range(100))

    assert terms(level=0) < terms(level=3)
    assert terms(level=3, config={"min_terms": 2, "max_terms": 2}) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": 99}, "level=99 of chain_sum must be between 0 and"),
        ({"dataset": "composite", "level": 0}, "composite has no curriculum"),
        (
            {"dataset": "knight_swap", "level": 0},
            "level of dataset knight_swap is wrong: min_nodes",
        ),
        (
            {"config": {"max_term": 2}},
            "config or level of dataset chain_sum is wrong: .*'max_term'",
        ),
        ({"datasets": {}}, "has none"),
        ({"datasets": {"chain_sum": {"weight": 0}}}, "chain_sum.weight=0 must be a number above 0"),
        ({"datasets": {"chain_sum": {"size": 3}}}, r"chain_sum has \['size'\]"),
        ({"datasets": {"chain_sum": {}}, "config": EASY}, "give either"),
        ({"split": "test"}, "split='test'"),
    ],
)
def test_what_is_wrong_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        ReasoningGymEnv(**options)


def test_an_answer_that_the_verifier_fails_to_read_earns_nothing():
    env = ReasoningGymEnv(dataset="prime_factorization")
    env.reset(seed=3)
    _, reward, _, _, info = env.step("x")
    assert (reward, info["success"]) == (0.0, False)
    assert "invalid literal" in info["unreadable"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
def test_each_dataset_has_problems_and_takes_any_answer(name):
    env = ReasoningGymEnv(dataset=name)
    text, _ = env.reset(seed=3)
    assert text
    for answer in ("", "x", "3"):
        assert env.step(answer)[1] in (0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CURRICULA) - {"knight_swap"}))
def test_each_curriculum_s_first_level_has_problems(name):
    assert ReasoningGymEnv(dataset=name, level=0).reset(seed=3)[0]
