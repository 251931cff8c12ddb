"""Files of problems, in the shapes that people have; nothing is run."""

import base64
import json
import pickle
import zlib

import pyarrow
import pytest
from pyarrow import parquet

from flash.envs.code.assertions import split
from flash.envs.code.problems import Call, Program, read, split_of, unpacked
from flash.envs.code.testing import same_output
from flash.envs.rows import RowSource


@pytest.fixture
def problems(tmp_path):
    """Those of a file of JSON Lines with these entries."""

    def of(*entries, public=1, unusable="refuse", chosen="all"):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return list(read(RowSource.of(str(path)), split=chosen, public=public, unusable=unusable))

    return of


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


CASES = [{"input": "1 2", "output": "3", "testtype": "stdin"}]
MBPP = {"text": "Double.", "test_list": ["assert f(1) == 2", "assert f(2) == 4"]}
LIVE = {"question_content": "Add.", "public_test_cases": CASES, "private_test_cases": "[]"}
APPS = {"question": "Add.", "inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}


def test_mbpp_shows_its_first_test_and_hides_the_others(problems):
    (one,) = problems(MBPP | {"challenge_test_list": ["assert f(3) == 6"]})
    assert one.question.startswith("Double.")
    assert "assert f(1) == 2" in one.question
    assert "f(2)" not in one.question
    assert [test.source for test in one.public] == ["assert f(1) == 2"]
    assert [test.source for test in one.hidden] == ["assert f(2) == 4", "assert f(3) == 6"]
    (two,) = problems(MBPP | {"prompt": "Twice."}, public=2)
    assert two.question.startswith("Twice.")
    assert (len(two.public), two.hidden) == (2, ())


def test_a_function_that_is_asked_for_may_have_the_name_of_a_builtin_one(problems):
    entry = {"text": "?", "test_list": ["assert list(sum(2, 3)) == list((5,))"]}
    code = "def sum(list, b):\n    return [list + b]"
    (one,) = problems(entry | {"code": code})
    assert (one.public[0].expressions, one.public[0].test) == (
        ("sum(2, 3)",),
        "list(_values[0]) == list((5,))",
    )
    with pytest.raises(ValueError, match="it calls nothing that an answer could define"):
        problems(entry | {"code": "def total("})


@pytest.mark.parametrize("pack", [list, json.dumps, lambda cases: packed(json.dumps(cases))])
def test_livecodebench_s_private_tests_are_read_packed_or_not(problems, pack):
    private = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
    (one,) = problems(LIVE | {"private_test_cases": pack(private)})
    assert one.public == (Program("1 2", "3"),)
    assert one.hidden_tests() == (Program("5 6\n", "11\n"),)
    assert "reads standard input" in one.question


def test_livecodebench_s_functions_have_an_argument_a_line(problems):
    cases = [{"input": '[1, 2]\n"a"', "output": "[true]", "testtype": "functional"}]
    (one,) = problems(
        {
            "question_content": "Do it.",
            "starter_code": "class Solution:\n    def do(self, items, name):",
            "metadata": '{"func_name": "do"}',
            "public_test_cases": json.dumps(cases),
            "private_test_cases": packed(json.dumps(cases)),
        }
    )
    assert one.public == one.hidden_tests() == (Call("do", [[1, 2], "a"], [[True]]),)
    assert "'do'" in one.question
    assert "class Solution:\n    def do(self, items, name):" in one.question


class Runs:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (packed(Runs()), r"its pickle names builtins\.print, and may hold a text alone"),
        (packed(["a"]), "it holds no text"),
        (packed("[1"), "is not JSON"),
        (packed("[]")[:-8], "private_test_cases can't be unpacked: it is not whole"),
        ("no base64", "private_test_cases can't be unpacked"),
        (base64.b64encode(b"no zlib").decode(), "incorrect header"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "can't be unpacked"),
    ],
)
def test_a_pickle_that_is_no_text_is_refused_and_not_run(text, says, capsys):
    with pytest.raises(ValueError, match=says):
        unpacked(text)
    assert capsys.readouterr().out == ""


def test_packed_tests_that_are_none_are_told_when_they_are_read(problems):
    (one,) = problems(LIVE | {"public_test_cases": "[]", "private_test_cases": packed("[]")})
    with pytest.raises(
        ValueError, match="private_test_cases is empty, and so is public_test_cases"
    ):
        one.hidden_tests()


def test_inputs_and_outputs_are_found_where_people_have_them(problems):
    tests = {"inputs": APPS["inputs"], "outputs": APPS["outputs"]}
    message = [{"role": "user", "content": "Add."}]
    for entry in (
        APPS,
        {"question": "Add.", "input_output": json.dumps(tests)},
        {"question": "Add.", "input_output": json.dumps(tests), "solutions": "[]"},
        {"prompt": message, "reward_model": {"ground_truth": json.dumps(tests)}},
        {"problem": "Add.", "inputs": [["1 2"], ["3 4"]], "outputs": [["3"], ["7"]]},
    ):
        (one,) = problems(entry)
        assert one.question.startswith("Add.")
        assert one.public == (Program("1 2", "3"),)
        assert one.hidden_tests() == (Program("3 4", "7"),)


def test_with_a_function_inputs_are_arguments(problems):
    (one,) = problems(
        {"question": "?", "fn_name": "f", "inputs": [[1, "a"], "2\n3"], "outputs": [[5], "[6]"]}
    )
    assert one.public == (Call("f", [1, "a"], [[5], 5]),)  # of APPS, in a list of its own or not
    assert one.hidden == (Call("f", [2, 3], [[6], 6]),)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"question": "?"}, "it has no tests: give test_list .*; it has 'question'"),
        ({}, "it has no tests.*; it has none"),
        ([], "it is not an object with a question and tests"),
        (MBPP | {"text": " "}, "it has no question: give question.*; it has 'text', 'test_list'"),
        (MBPP | {"test_list": []}, "test_list is empty"),
        (MBPP | {"test_list": "assert f() == 1"}, 'test_list="assert .*" must be a list of texts'),
        (MBPP | {"test_setup_code": 1}, "test_setup_code=1 must be a text"),
        (MBPP | {"test_setup_code": "a b"}, "test_imports or test_setup_code: it is not Python"),
        (APPS | {"fn_name": 1}, "fn_name=1 must be a text"),
        (MBPP | {"test_list": ["f(1) == 1"]}, r"test_list\[0\]=.*: it must be a single assert"),
        (MBPP | {"test_list": ["assert f(1) =="]}, r"test_list\[0\]=.*: it is not Python"),
        (MBPP | {"test_list": ["assert f"]}, "it names 'f' without calling it"),
        (MBPP | {"test_list": ["assert 1 == 1"]}, "it calls nothing that an answer could define"),
        (
            MBPP | {"test_list": ["assert all(f(x) == y for x, y in [(1, 2)])"]},
            "it calls 'f' within a loop",
        ),
        (LIVE | {"public_test_cases": "[1]"}, r"public_test_cases\[0\]=1 must have input and out"),
        (LIVE | {"public_test_cases": "[]"}, "public_test_cases and private_test_cases are empty"),
        (LIVE | {"public_test_cases": "{"}, "is not JSON"),
        (LIVE | {"metadata": "[]"}, 'metadata="\\[\\]" must be an object, or JSON of one'),
        (LIVE | {"public_test_cases": [CASES[0] | {"testtype": "functional"}]}, "has a func_name"),
        (APPS | {"outputs": ["3"]}, "it has 2 inputs and 1 outputs"),
        (APPS | {"inputs": [], "outputs": []}, "it has 0 inputs and 0 outputs"),
        (APPS | {"inputs": "1 2"}, "inputs and outputs must be lists"),
        (
            APPS | {"inputs": [1, 2]},
            "inputs and outputs have 1: .*; what is called needs a fn_name",
        ),
        (APPS | {"fn_name": "f", "inputs": [1, 2]}, "it must be a list of f's arguments"),
        (APPS | {"question": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_a_problem_that_can_not_be_tested_is_named_with_its_line(problems, entry, says):
    with pytest.raises(ValueError, match=rf"problems\.jsonl', line 2: .*{says}"):
        problems(APPS, entry)
    assert len(problems(APPS, entry, unusable="skip")) == 1


def test_what_is_left_out_is_told(problems, caplog):
    problems(APPS, {}, {}, unusable="skip")
    assert "2 of 3 problems are left out: path=" in caplog.text
    assert "line 2: it has no tests" in caplog.text
    with pytest.raises(ValueError, match="has no all problems: give more"):
        problems({}, unusable="skip")


def test_the_splits_share_no_problem(problems):
    entries = [APPS | {"question": f"Add {number}."} for number in range(40)]
    train, heldout = (problems(*entries, chosen=chosen) for chosen in ("train", "heldout"))
    assert {split_of(one.question) for one in train} == {"train"}
    assert {one.question for one in train}.isdisjoint(one.question for one in heldout)
    assert len(train) + len(heldout) == len(problems(*entries)) == 40


def test_json_and_parquet_hold_what_json_lines_hold(problems, tmp_path):
    entries = [MBPP | {"text": str(number)} for number in range(3)]
    wanted = problems(*entries)
    (tmp_path / "problems.json").write_text(json.dumps(entries))
    parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "problems.parquet")
    for name in ("problems.json", "problems.parquet"):
        source = RowSource.of(str(tmp_path / name))
        assert list(read(source, split="all", public=1, unusable="refuse")) == wanted


def test_a_line_that_is_not_json_is_named(problems, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(APPS)}\n\n{{\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl', line 3 is not JSON"):
        read(RowSource.of(str(path)), split="all", public=1, unusable="skip")


def test_of_many_rows_a_seed_s_is_read_alone(problems):
    entries = [APPS | {"question": f"Add {number}."} for number in range(40)]
    seen = [one.question.splitlines()[0] for one in problems(*entries)]
    assert seen == [f"Add {number}." for number in range(40)]


@pytest.mark.parametrize(
    ("source", "expressions", "test"),
    [
        ("assert f(1) == 2", ["f(1)"], "_values[0] == 2"),
        ("assert set(f(g(1))[0]) == {2}, 'no'", ["f(g(1))[0]"], "set(_values[0]) == {2}"),
        ("assert not S(2).push(1).top", ["S(2).push(1).top"], "not _values[0]"),
        ("assert f(1) < g(2)", ["f(1)", "g(2)"], "_values[0] < _values[1]"),
        ("assert math.isclose(f(1), 2.5)", ["f(1)"], "math.isclose(_values[0], 2.5)"),
        ("assert [x for x in f(1)] == [1]", ["f(1)"], "[x for x in _values[0]] == [1]"),
    ],
)
def test_an_assertion_is_split_into_what_is_asked_and_what_must_hold(source, expressions, test):
    found = split(source, frozenset({"math"}))
    assert list(found.expressions) == expressions
    assert found.test == test


@pytest.mark.parametrize(
    ("written", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3", True),
        ("1  2", "1 2", True),  # numbers
        ("a  b", "a b", False),
        ("1\n2", "1 2", False),
        ("1.50", "1.5", True),
        ("1e2", "100", True),
        ("1.4999999", "1.5", False),
        ("50000000000000001", "50000000000000000", False),
        ("nan", "nan", True),
        ("nan", "1", False),
        ("1", "nan", False),
        ("inf", "1", False),
        ("9e999999", "-9e999999", False),
        ("yes", "YES", False),
        ("", "0", False),
        ("a \n b", "a\nb", True),
    ],
)
def test_outputs_are_compared_as_livecodebench_does(written, wanted, same):
    assert same_output(written, wanted) == same


def test_a_tolerance_is_for_numbers_with_a_point():
    assert same_output("1.4999999", "1.5", 1e-6)
    assert same_output("2000001", "2000000.0", 1e-6)
    assert not same_output("1.499", "1.5", 1e-6)
    assert not same_output("2000001", "2000000", 1e-6)
    assert not same_output("nan", "1.5", 1e-6)
    assert not same_output("inf", "1.5", 1e-6)
