import json
from pathlib import Path

import pytest

from flash.config import load, try_environment
from flash.envs.questions import QuestionsEnv

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train_500.jsonl"


@pytest.fixture
def ask(tmp_path):
    """An environment with one question, of that answer."""

    def make(answer: str) -> QuestionsEnv:
        file = tmp_path / "one.jsonl"
        file.write_text(json.dumps({"question": "q 0", "answer": answer}) + "\n")
        try:
            env = QuestionsEnv(path=str(file))
        except ValueError:
            env = QuestionsEnv(path=str(file), split="heldout")
        assert env.reset(seed=3) == ("q 0", {})
        return env

    return make


@pytest.mark.parametrize(
    ("answer", "said", "reward"),
    [
        ("2 + 70 = 72.\n#### 72", "72", 1),
        ("#### 72", "So she sold 70 + 2 = 72 clips.", 1),
        ("#### 72", "72.0", 1),
        ("#### 72", "720", 0),
        ("#### 72", "72, or maybe 73", 0),  # only the last number counts
        ("#### 72", "no idea", 0),
        ("#### 72", "", 0),
        ("#### -1,200", "It lost $-1200.", 1),
        ("Blue  whale", "blue whale", 1),
        ("blue whale", "Blue Whale", 1),
        ("Blue whale", "a blue whale", 0),
    ],
)
def test_the_last_number_is_the_answer_and_words_must_be_equal(ask, answer, said, reward):
    env = ask(answer)
    assert env.step(said) == ("", float(reward), True, False, {"success": bool(reward)})


def test_the_seed_decides_the_question_and_the_splits_share_none(tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps({"question": f"q {n}", "answer": n}) for n in range(100)]
    file.write_text("\n".join(lines))

    def questions(split):
        env = QuestionsEnv(path=str(file), split=split)
        return {env.reset(seed=seed)[0] for seed in range(200)}

    assert questions("train") == questions("train")
    assert questions("heldout")
    assert len(questions("train")) + len(questions("heldout")) == 100
    assert not questions("train") & questions("heldout")


def test_a_file_that_is_none_of_questions_is_named_with_the_line(tmp_path):
    env = load("gsm8k").env
    with pytest.raises(ValueError, match=r"env\.options: path is missing: give a file of JSON Lin"):
        try_environment(env)
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' can't be read: No such file"):
        QuestionsEnv(path=str(tmp_path / "nowhere.jsonl"))
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "q", "answer": "1"}\n{"question": "q"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl', line 2 is not .*KeyError\('answer'\)"):
        QuestionsEnv(path=str(file))


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k_train_500.jsonl")
def test_every_solution_of_gsm8k_is_right():
    solutions = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    right_answers = {entry["question"]: entry["answer"] for entry in solutions}
    config = load("gsm8k", {"env.options.path": str(GSM8K)})
    for split in ("train", "heldout"):
        env = QuestionsEnv(**config.env.options, split=split)
        for seed in range(100):
            question, _ = env.reset(seed=seed)
            assert env.step(right_answers[question].splitlines()[-1])[1] == 1.0
