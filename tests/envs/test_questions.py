import contextlib
import gzip
import json
import socket
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from flash.config import try_environment
from flash.environments.config import EnvConfig
from flash.envs.questions import QuestionsEnv

HELD_OUT = {"q 4", "q 6", "q 15", "q 18"}  # of q 0 to q 19, by zlib.crc32
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train_500.jsonl"


@pytest.fixture
def ask(tmp_path):
    """An environment with one question, of that answer."""

    def make(answer: object) -> QuestionsEnv:
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
        *((72, said, 1) for said in ("72.", "+72", "$72", "72 €", "72%", "**72**", "\\boxed{72}")),
        *(("$72.00", said, 1) for said in ("72", "x = 72", "10/2 + 67 = 72", "It is 72, I think.")),
        *(("1,200", said, 1) for said in ("1200", "1,200.0", "$1,200", "1,200 dollars")),
        *((-5, said, 1) for said in ("-5", "\u22125", "-$5", "$-5", "-5.0", "x=-5")),
        *((0.5, said, 1) for said in (".5", "0.50", "$.5", "+.5", "50 or .5")),
        (1e22, "10000000000000000000000", 1),
        ("1e3", "1E3", 1),  # a text
        *((12, said, 0) for said in ("12abc", "abc12", "1,2", "12km", "12_0", "012,000", "-12")),
        *(
            (2, said, 0)
            for said in ("1,2", "1/2", "5:2", "4-2", "v1.2", "1.1.2", "10^2", "5\u00d72")
        ),
        *((1000, said, 0) for said in ("1e3", "1_000", "1,0,00", "10,00", "1000,5", "0,001,000")),
        *(
            (3, said, 0)
            for said in ("1e3", "x3", "3rd", "3/4", "2024-05-3", "", " ", ".", "-", "$")
        ),
        ("3/4", "3/4", 1),
        ("3/4", "4", 0),
        ("blue whale", "", 0),
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
    few = {f"q {n}" for n in range(20)}
    assert questions("heldout") & few == HELD_OUT, "on every machine"


def test_a_source_that_is_none_of_questions_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"env\.options: path='' must name files .* on the hub"):
        try_environment(EnvConfig(name="questions"))
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' can't be read: No such file"):
        QuestionsEnv(path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match=r"question='a\.' must name a field"):
        QuestionsEnv(path="a.jsonl", question="a.")
    with pytest.raises(ValueError, match="split='test' must be 'train', 'heldout' or 'all'"):
        QuestionsEnv(path="a.jsonl", split="test")
    file = tmp_path / "other.jsonl"
    file.write_text('{"question": "q", "reply": "1"}\n')
    with pytest.raises(ValueError, match=r"line 1: it has no 'question\.text': 'text' is not in"):
        QuestionsEnv(path=str(file), question="question.text", answer="reply")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "q", "answer": null}', "answer=null must be a text or a number"),
        ('{"question": "q", "answer": ["1"]}', r'answer=\["1"\] must be a text or a number'),
        ('{"question": "q", "answer": true}', "answer=true must be a text or a number"),
        ('{"question": "q", "answer": NaN}', "answer=NaN must be a text or a number"),
        ('{"question": "q", "answer": " "}', 'answer=" " is empty, so that nothing could be right'),
        ('{"question": "q", "answer": "so 1 ####"}', 'answer="so 1 ####" is empty'),
        ('{"question": " ", "answer": "1"}', 'question=" " must be a text that is not empty'),
        ('{"question": 5, "answer": "1"}', "question=5 must be a text"),
        ('{"question": "\\ud800", "answer": "1"}', ".* surrogates not allowed"),
        ('["q", "1"]', "it has no 'question': 'question' is not in"),
        ('{"question": "q"}', "it has no 'answer': 'answer' is not in {\"question\": \"q\"}"),
        ("5", "it has no 'question': 'question' is not in 5"),
    ],
)
def test_a_wrong_line_is_named_with_its_number_and_field(tmp_path, line, says):
    file = tmp_path / "bad.jsonl"
    good = '{"question": "q", "answer": 1}'
    file.write_bytes(f"\ufeff{good}\r\n\r\n{line}\r\n{good}".encode())
    with pytest.raises(ValueError, match=rf"bad\.jsonl', line 3: {says}"):
        QuestionsEnv(path=str(file))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "q", "answer": "1"', "Expecting ',' delimiter at character 3"),
        ("[" * 100_000, ".*recursion"),
        ("1" * 5000, ".*digits"),
    ],
)
def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path, line, says):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "q", "answer": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl', line 2 is not JSON: {says}"):
        QuestionsEnv(path=str(file))


def test_answers_of_any_kind_may_be_beside_each_other(tmp_path):
    """Also what looks like a time, and has none of the digits lost."""
    answers = [1, "blue", "2024-05-03", 0.1, 10**22, "#### 7", "007"]
    file = tmp_path / "mixed.jsonl"
    rows = [{"question": f"q {n}", "answer": a, "id": [n, str(n)][n % 2]} for n, a in
            enumerate(answers)]  # fmt: skip
    file.write_text("\n\n".join(map(json.dumps, rows)))
    means = [Decimal(1), "blue", "2024-05-03", Decimal("0.1"), Decimal(10**22), Decimal(7)]
    assert list(_asked(path=str(file)).values()) == [*means, Decimal(7)]


def test_a_file_in_another_encoding_is_named_with_the_remedy(tmp_path):
    file = tmp_path / "one.jsonl"
    line = '{"question": "q", "answer": "é"}\n'
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        file.write_bytes(line.encode(encoding))
        with pytest.raises(ValueError, match=r"one\.jsonl' can't be read: 'utf-8' .* in UTF-8"):
            QuestionsEnv(path=str(file))
    listed = tmp_path / "listed.json"  # which the library reads by itself
    listed.write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"listed\.json' is not UTF-8 .*: save it as UTF-8"):
        QuestionsEnv(path=str(listed))
    file.write_bytes(b'{"question": "q", "answer": 1}\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match=r"one\.jsonl' .*UTF-8"):
        QuestionsEnv(path=str(file))


@pytest.mark.parametrize(
    "written",
    [
        "\r\n".join,
        "\r".join,
        lambda lines: "\ufeff" + "\n".join(lines),
        lambda lines: "\n\n \n".join(lines) + "\n\n",
    ],
    ids=["carriage returns and line feeds", "carriage returns", "byte order mark", "blank lines"],
)
@pytest.mark.parametrize("odd", ["", "\u2028", "\x85", "\u2029", "\x1c", "\x0b"], ids=ascii)
def test_files_as_tools_write_them_hold_the_same_questions(tmp_path, written, odd):
    file = tmp_path / "questions.jsonl"
    texts = [f"What is{odd}{number}?" for number in range(20)]
    kept = odd in "\x1c\x0b"  # JSON wants them escaped
    lines = [json.dumps({"question": t, "answer": 1}, ensure_ascii=kept) for t in texts]
    file.write_bytes(written(lines).encode())
    found = set()
    for split in ("train", "heldout"):
        env = QuestionsEnv(path=str(file), split=split)
        found |= {env.reset(seed=seed)[0] for seed in range(20)}
    assert found == set(texts)


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path):
    file = tmp_path / "many.jsonl"
    lines = [json.dumps({"question": f"q {n}", "answer": n}) for n in range(100_000)]
    file.write_text("\n".join(lines))
    QuestionsEnv(path=str(file))  # reads it
    for split in ("train", "heldout"):
        began = time.process_time()
        for seed in range(1000):
            env = QuestionsEnv(path=str(file), split=split)
            env.reset(seed=seed)
            env.close()
            spent = time.process_time() - began
            assert spent < 0.5, "an episode costs microseconds, not milliseconds"
    file.write_text(json.dumps({"question": "new", "answer": 1}) + "\n")
    splits = []
    for split in ("train", "heldout"):
        with contextlib.suppress(ValueError):
            splits.append(QuestionsEnv(path=str(file), split=split).reset(seed=0)[0])
    assert splits == ["new"]


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k_train_500.jsonl")
def test_every_solution_of_gsm8k_is_right():
    solutions = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    right_answers = {entry["question"]: entry["answer"] for entry in solutions}
    for split in ("train", "heldout"):
        env = QuestionsEnv(path=str(GSM8K), split=split)
        for seed in range(100):
            question, _ = env.reset(seed=seed)
            assert env.step(right_answers[question].splitlines()[-1])[1] == 1.0


def _parquet(folder: Path, columns: dict[str, Any]) -> str:
    path = folder / "questions.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    "answers", [["1 + 1 = 2\n#### 2"] * 40, [2] * 40, [2.0] * 40, [Decimal("2.00")] * 40]
)
def test_a_parquet_file_asks_what_json_lines_ask(tmp_path, answers):
    questions = [f"q {number}" for number in range(40)]
    rows = _parquet(tmp_path, {"question": questions, "answer": answers})
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"question": q, "answer": 2}) + "\n" for q in questions))
    for split in ("train", "heldout"):
        of_rows = QuestionsEnv(path=rows, split=split)
        of_lines = QuestionsEnv(path=str(lines), split=split)
        for seed in range(40):
            assert of_rows.reset(seed=seed) == of_lines.reset(seed=seed)
            assert of_rows.step("It is 2.")[1] == 1
            assert of_rows.step("It is 3.")[1] == 0


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"question": ["a", "b"], "answer": ["1", None]}, "row 2: answer=null must be a text"),
        ({"question": ["a", ""], "answer": [1, 2]}, "row 2: question="),
        ({"question": ["a"], "answer": [float("nan")]}, "row 1: answer="),
        ({"question": ["a"], "answer": [True]}, "row 1: answer=true must be"),
    ],
)
def test_a_row_that_is_no_problem_is_named_with_its_field(tmp_path, columns, told):
    with pytest.raises(ValueError, match=told):
        QuestionsEnv(path=_parquet(tmp_path, columns))


def test_a_file_that_only_says_it_is_parquet_is_refused(tmp_path):
    path = tmp_path / "none.parquet"
    path.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"none\.parquet' can't be read: Parquet magic bytes"):
        QuestionsEnv(path=str(path))


def _asked(**options: Any) -> dict[str, str | Decimal]:
    """All questions with their answers."""
    env = QuestionsEnv(**{"split": "all", **options})
    return {env.reset(seed=seed)[0]: env._answer for seed in range(100)}


def test_every_kind_of_file_folder_and_pattern_asks_the_same(tmp_path):
    rows = {"question": [f"q {n}" for n in range(20)], "answer": [*range(20)]}
    expected = {f"q {n}": Decimal(n) for n in range(20)}
    folder = tmp_path / "of_lines"
    folder.mkdir()
    lines = [json.dumps({"question": q, "answer": n}) + "\n" for n, q in enumerate(expected)]
    (folder / "a.jsonl").write_text("".join(lines[:7]))
    (folder / "b.jsonl").write_text("".join(lines[7:]))
    table = tmp_path / "questions.csv"
    table.write_text("question,answer\n" + "".join(f"q {n},{n}\n" for n in range(20)))
    tabs = tmp_path / "questions.tsv"
    tabs.write_text(table.read_text().replace(",", "\t"))
    listed = tmp_path / "questions.json"
    listed.write_text(json.dumps([json.loads(line) for line in lines]))
    packed = tmp_path / "questions.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(lines).encode()))
    for path in (
        _parquet(tmp_path, rows), str(folder), f"{folder}/*.jsonl", str(table), str(tabs),
        [str(folder / "a.jsonl"), str(folder / "b.jsonl")], str(listed), str(packed),
    ):  # fmt: skip
        assert _asked(path=path) == expected, path


def test_nobody_is_told_of_files_of_this_machine(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: asked.append(given) or [])
    file = tmp_path / "told.jsonl"
    file.write_text('{"question": "q 0", "answer": 1}\n')
    QuestionsEnv(path=str(file), split="all")
    assert not asked


def test_fields_may_have_other_names_and_be_within_others(tmp_path):
    prompts = [[{"role": "user", "content": f"q {n}"}] for n in range(5)]
    marks = [{"style": "rule", "ground_truth": str(n)} for n in range(5)]
    path = _parquet(tmp_path, {"prompt": prompts, "reward_model": marks})
    asked = _asked(path=path, question="prompt.0.content", answer="reward_model.ground_truth")
    assert asked == {f"q {n}": Decimal(n) for n in range(5)}
    with pytest.raises(ValueError, match=r"row 1: it has no 'prompt\.1\.content': '1' is not in"):
        _asked(path=path, question="prompt.1.content", answer="reward_model.ground_truth")


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    path = _parquet(tmp_path, {"question": ["a"], "reply": [1]})
    with pytest.raises(ValueError, match=r"no field 'answer': it has 'question', 'reply'; name .*"):
        QuestionsEnv(path=path)


def test_a_data_set_s_own_splits_and_parts_of_them_are_read(tmp_path):
    for split, first in (("train", 0), ("test", 100)):
        rows = [{"question": f"q {n}", "answer": n} for n in range(first, first + 10)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path)
    assert set(_asked(path=path)) == {f"q {n}" for n in range(10)}
    assert set(_asked(path=path, data_split="test")) == {f"q {n}" for n in range(100, 110)}
    assert set(_asked(path=path, data_split="train[2:4]")) == {"q 2", "q 3"}
    with pytest.raises(ValueError, match=r"can't be read: Unknown split \"dev\".*: correct"):
        _asked(path=path, data_split="dev")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": ["a.jsonl", "b.csv"]}, r"files of \.csv, \.jsonl: give files of one kind"),
        ({"path": "notes.txt"}, r"files of \.txt: give files of one kind of \.jsonl"),
        ({"path": "empty.jsonl"}, r"path='empty\.jsonl' can't be read: .* no data"),
        ({"path": "a.jsonl", "revision": "main"}, "revision='main' is of a data set on the hub"),
        ({"path": "a.jsonl", "subset": "main"}, "subset='main' is of a data set on the hub"),
        ({"path": "empty.json"}, r"path='empty\.json' has no rows"),
        ({"path": "a.jsonl", "data_split": 1}, "data_split=1 must be a text"),
        ({"path": "plain"}, r"files of no suffix: give files of one kind of \.jsonl"),
        ({"path": 5}, "path=5 must name files"),
        ({"path": [1]}, r"path=\[1\] must name files"),
        ({"path": "*.parquet"}, r"path='\*\.parquet' can't be read: No such file"),
        ({"path": "."}, "path='.' can't be read: "),
    ],
)
def test_a_source_that_can_t_be_is_named_with_its_option(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": 1}\n')
    (tmp_path / "b.csv").write_text("question,answer\nq,1\n")
    for name in ("empty.jsonl", "empty.json", "notes.txt", "plain"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=says):
        QuestionsEnv(**options)
