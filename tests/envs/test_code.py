"""Answers of code, tested in real sandboxes."""

import json
import os
import time

import pytest

from flash.envs.code import CodeEnv
from flash.envs.code.inside import decoded, encoded
from tests.sandboxes import needs_sandbox

pytestmark = [pytest.mark.slow, needs_sandbox]

DOUBLE = {
    "text": "Double it.",
    "test_list": ["assert double(2) == 4", "assert double('ab') == 'abab'"],
    "challenge_test_list": ["assert sorted(double([2, 1])) == [1, 1, 2, 2]"],
}
SUM = {
    "question_content": "Add two numbers.",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps(
        [{"input": f"{n} 5", "output": str(n + 5), "testtype": "stdin"} for n in (40, 50)]
    ),
}
LONGEST = {
    "question": "The longest word.",
    "input_output": json.dumps(
        {
            "fn_name": "longest",
            "inputs": [[["a", "bcd"]], [["efgh", "i"]], [["j"]]],
            "outputs": ["bcd", "efgh", "j"],
        }
    ),
}
RIGHT = {
    "asserts": (DOUBLE, "def double(x):\n    return x * 2"),
    "programs": (SUM, "print(sum(map(int, input().split())))"),
    "calls": (LONGEST, "def longest(words):\n    return max(words, key=len)"),
}
each_kind = pytest.mark.parametrize("kind", RIGHT)


@pytest.fixture
def env(tmp_path):
    """What asks that one problem."""

    def make(entry, **options):
        path = tmp_path / "problems.jsonl"
        path.write_text(json.dumps(entry) + "\n")
        made = CodeEnv(path=str(path), split="all", **options)
        made.reset(seed=0)
        return made

    return make


@pytest.fixture
def reward(env):
    def of(entry, code, **options):
        text, reward, terminated, truncated, info = env(entry, **options).step(code)
        assert (text, terminated, truncated) == ("", True, False)
        assert info["success"] == (info["passed"] == info["tests"])
        return reward

    return of


@each_kind
def test_code_that_passes_all_tests_earns_1_and_other_code_0(reward, kind):
    entry, code = RIGHT[kind]
    if kind != "programs":  # in which it is what is tested
        code += "\nprint('debugging', flush=True)"
    assert reward(entry, f"So:\n```python\n{code}\n```\n") == 1
    assert reward(entry, "```python\nprint('no')\n```") == 0
    assert reward(entry, "I don't know.") == 0
    assert reward(entry, "") == 0


def test_the_last_block_is_the_answer(reward):
    entry, code = RIGHT["asserts"]
    wrong, right = "```python\ndef double(x): return x\n```", f"```\n{code}\n```"
    assert reward(entry, f"{wrong}\nNo:\n{right}\nThat is it.") == 1
    assert reward(entry, f"{right}\nor\n{wrong}") == 0
    assert reward(entry, code) == 1  # without a block all of it


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def double(x): return x * 2", 1),
        ("def double(x): return 4 if x == 2 else x + x if x == 'ab' else 0", 1 / 2),
        ("def double(x): return 4", 0),  # what is shown does not count
    ],
)
def test_a_fraction_is_of_the_hidden_tests(reward, code, share):
    assert reward(DOUBLE, code, rewards="fraction") == share
    assert reward(DOUBLE, code) == (share == 1)


def test_of_programs_a_fraction_counts_those_after_one_that_failed(reward):
    code = "a, b = map(int, input().split())\nprint(0 if a == 40 else a + b)"
    assert reward(SUM, code, rewards="fraction") == 1 / 2


def test_public_tests_are_told_and_hidden_ones_are_not(env):
    asked = env(DOUBLE, turns=3)
    text, reward, terminated, *_ = asked.step("def double(x): return x + 1")
    assert (reward, terminated) == (0, False)
    assert "assert double(2) == 4\nIt was 3" in text
    assert "ab" not in text
    text, _, terminated, *_ = asked.step("def double(x): raise ValueError('what is it?')")
    assert not terminated
    assert "It was ValueError: what is it?" in text
    assert asked.step("def double(x): return x * 2")[:3] == ("", 1.0, True)
    asked.reset(seed=0)
    assert asked.step("def double(x): return 4")[:3] == ("", 0.0, True)  # a hidden one failed
    with pytest.raises(RuntimeError, match="call reset first"):
        asked.step("def double(x): return x * 2")


def test_what_a_program_wrote_is_told_and_the_last_turn_ends_the_episode(env):
    asked = env(SUM, turns=2)
    text, *_ = asked.step("print(4)")
    assert "Input:\n1 2" in text
    assert "Expected output:\n3" in text
    assert "Your output:\n4" in text
    assert "40" not in text
    text, reward, terminated, *_ = asked.step("print(1 / 0)")
    assert (text, reward, terminated) == ("", 0.0, True)
    asked.reset(seed=0)
    assert "ZeroDivisionError" in asked.step("print(1 / 0)")[0]


SECRET = f"secret-{os.urandom(8).hex()}"
SECRETS = {
    "asserts": {"text": "?", "test_list": [f"assert f(1) == '{SECRET}'"]},
    "calls": {"question": "?", "inputs": [[1]], "outputs": [SECRET], "fn_name": "f"},
    "programs": {"question": "?", "inputs": ["1"], "outputs": [SECRET]},
}
LOOK = """
import gc, glob, os, re, sys
def seen():
    yield from (repr(given) for given in (sys.argv, os.environ))
    frame = sys._getframe()
    while frame:
        yield repr(list(frame.f_locals.values()))
        frame = frame.f_back
    for each in gc.get_objects():
        if type(each) in (list, tuple, dict):
            items = list(each.values() if type(each) is dict else each)
            yield from (item for item in items if type(item) is str)
    paths = glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ")
    for folder in ("/work", "/tmp", "/dev/shm", "/run"):
        for path, folders, names in os.walk(folder):
            folders[:] = [each for each in folders if os.path.join(path, each) != sys.prefix]
            paths += [os.path.join(path, name) for name in names]
    for path in paths:
        try:
            yield open(path, errors="replace").read()
        except OSError:
            pass
def f(x):
    found = [re.search("secret-[0-9a-f]+", text) for text in list(seen())]
    return next((each[0] for each in found if each), "")
"""


@pytest.mark.parametrize("kind", SECRETS)
def test_an_expected_value_is_nowhere_where_the_code_runs(reward, kind):
    assert reward(SECRETS[kind], f"print('{SECRET}')\ndef f(x): return '{SECRET}'") == 1
    assert reward(SECRETS[kind], f"{LOOK}\nprint(f(1))", test_seconds=20) == 0


def test_that_look_finds_what_is_there(reward):
    shown = {"question": "?", "inputs": [[SECRET]], "outputs": [SECRET], "fn_name": "f"}
    assert reward(shown, LOOK, test_seconds=20) == 1


EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
"""
CHEATS = {
    "leaves": ("asserts", "exit(0)"),
    "leaves at once": ("programs", "import os; os._exit(0)"),
    "leaves when called": ("calls", "import os\ndef longest(x): os._exit(0)"),
    "is killed": ("asserts", "import os\ndef double(x): os.kill(os.getpid(), 9)"),
    "kills all": ("asserts", "import os\ntry: os.kill(-1, 9)\nfinally: os.kill(1, 9)"),
    "is equal to all": ("calls", f"{EQUAL}\ndef longest(x): return Equal()"),
    "is equal to all within": ("asserts", f"{EQUAL}\ndef double(x): return [Equal()]"),
    "changes what is builtin": (
        "asserts",
        "import builtins\nbuiltins.AssertionError = SystemExit\n"
        "builtins.bool = builtins.all = lambda *_: True\ndef double(x): return 0",
    ),
    "changes what encodes": (
        "asserts",
        "import sys\nsys.modules['__main__'].encoded = lambda value: True\ndef double(x): return 0",
    ),
    "says that it passed": (
        "asserts",
        "import os\nfor stream in range(20):\n    try:\n"
        "        os.write(stream, b'[true, true, true]\\n{\"value\": true}\\n')\n"
        "    except OSError: pass\nos._exit(0)",
    ),
    "says that it passed all": ("programs", "print('OK: 3 of 3 tests passed')"),
    "writes more than is read": (
        "programs",
        "print(str(sum(map(int, input().split()))) + ' ' * 500_000 + 'and more')",
    ),
    "changes files": (
        "programs",
        "open('program.py', 'w').write('print(3)')\n"
        "open('json.py', 'w').write('import os; os._exit(0)')",
    ),
    "nests": (
        "asserts",
        "def double(x):\n    value = []\n    for _ in range(900): value = [value]\n"
        "    return value",
    ),
    "writes what can't be read": (
        "calls",
        "import os\nos.write(3, b'[' * 100_000 + b'\\n\\xff\\n' + b'{\"range\": [0]}\\n' * 9)\n"
        "os._exit(0)",
    ),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheats_earn_nothing(reward, cheat):
    kind, code = CHEATS[cheat]
    assert reward(RIGHT[kind][0], code, rewards="fraction") == 0


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("programs", "import time\ntime.sleep(1000)"),
        ("calls", "import time\ndef longest(words): time.sleep(1000)"),
        ("asserts", "while True: print('x' * 1000)"),
        ("programs", "while True: print('x' * 1000)"),
        ("asserts", "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass"),
        ("calls", "x = []\nwhile True: x.append('x' * 1_000_000)"),
    ],
)
def test_what_would_go_on_for_ever_is_ended(reward, kind, code):
    began = time.monotonic()
    limits = {"test_seconds": 0.3, "answer_seconds": 0.6, "memory_mb": 128}
    assert reward(RIGHT[kind][0], code, rewards="fraction", **limits) == 0
    assert time.monotonic() - began < 20


def test_all_tests_of_an_answer_share_its_time(env):
    entry = {"question": "?", "inputs": ["1"] * 50, "outputs": ["1"] * 50}
    asked = env(entry, test_seconds=1, answer_seconds=1, rewards="fraction")
    *_, info = asked.step("import time\ntime.sleep(0.7)\nprint(1)")
    assert info["passed"] <= 1  # for the second one 0.3 s are left, or less


def test_a_test_may_say_what_it_likes_of_a_value(reward):
    entry = {
        "text": "?",
        "test_imports": ["import math"],
        "test_list": [
            "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6), 'message'",
            "assert set(f([1, 2])) == {1, 2} and len(f([1])) == 1",
            "assert all(x > 0 for x in f((1, 2)))",
            "assert f({'a': 1}) == {'a': 1}",
            "assert not f(None)",
            "assert list(f(range(3))) == [0, 1, 2]",
        ],
    }
    code = (
        "def f(x):\n    if isinstance(x, int): return x ** 0.5\n"
        "    return map(int, x) if isinstance(x, range) else x"
    )
    assert reward(entry, code) == 1
    assert reward(entry, code.replace("0.5", "0.6")) == 0
    assert reward(entry, code.replace("map(int, x)", "()")) == 0


def test_a_set_up_may_need_what_the_answer_defines(reward):
    entry = {
        "text": "?",
        "test_setup_code": "root = Node(1)\nroot.left = Node(2)",
        "test_list": ["assert depth(root) == 2"],
    }
    node = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    depth = "def depth(node): return 1 + depth(node.left) if node else 0"
    assert reward(entry, node + depth) == 1
    assert reward(entry, depth) == 0


def test_a_set_up_that_fails_is_no_answer_s_fault(reward):
    entry = {
        "text": "?",
        "test_setup_code": "import no_such_module",
        "test_list": ["assert f(1) == 1"],
    }
    with pytest.raises(RuntimeError, match=r"(?s)the tests' own set-up failed: .*no_such_module"):
        reward(entry, "def f(x): return x")


def test_values_that_are_too_much_for_a_test_fail_it(reward):
    entry = {"text": "?", "test_list": ["assert len('x' * f(1)) == 1"]}
    assert reward(entry, "def f(x): return 1") == 1
    assert reward(entry, "def f(x): return 10 ** 12") == 0


def test_methods_of_a_solution_are_called_and_usual_names_are_there(reward):
    cases = [{"input": "[1,2,3]\n2", "output": "[2,3]", "testtype": "functional"}]
    entry = {
        "question_content": "?",
        "metadata": json.dumps({"func_name": "last"}),
        "starter_code": "class Solution:\n    def last(self, items: List[int], n: int):\n",
        "public_test_cases": json.dumps(cases),
        "private_test_cases": "[]",
    }
    code = "class Solution:\n    def last(self, items: List[int], n: int):\n        return {}\n"
    assert reward(entry, code.format("tuple(items[-n:])")) == 1  # a tuple counts as a list
    assert reward(entry, code.format("set(items[-n:])")) == 0
    assert reward(entry, "def last(items, n): return items[len(items) - n:]") == 1


def test_a_problem_may_have_tests_of_both_kinds(env):
    shown = [{"input": "2", "output": "4", "testtype": "stdin"}]
    hidden = [{"input": "3", "output": "9", "testtype": "functional"}, *shown]
    asked = env(
        {
            "question_content": "?",
            "metadata": {"func_name": "f"},
            "public_test_cases": shown,
            "private_test_cases": hidden,
        }
    )
    *_, info = asked.step("def f(x): return 9\nif __name__ == '__main__': print(4)")
    assert (info["passed"], info["tests"]) == (3, 3)
    asked.reset(seed=0)
    assert asked.step("def f(x): return 8\nif __name__ == '__main__': print(4)")[4]["passed"] == 2


def test_values_come_out_as_they_went_in():
    values = [
        *(None, True, 3, -2.5, "é\ud800", [1, [2]], (1, (2,)), {1, 2}, frozenset({"a"}), b"\x00"),
        *({(1, 2): {"tuple": [3]}}, {"value": {}}, 1 + 2j, range(1, 9, 2)),
    ]
    for value in values:
        back = decoded(json.loads(json.dumps(encoded(value))))
        assert (back, type(back)) == (value, type(value))
    assert list(decoded(encoded(iter([1, (2,)])))) == [1, (2,)]
    with pytest.raises(TypeError, match="a object is no plain data"):
        encoded([object()])
