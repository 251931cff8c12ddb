"""Episodes in task folders, in real sandboxes."""

import dataclasses
import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from transformers import AutoTokenizer

from flash.environments import boundary
from flash.envs.harbor import HarborEnv
from flash.envs.harbor.build import build, writable_folders
from flash.envs.harbor.folder import read_folder
from flash.envs.harbor.verdict import verify
from flash.errors import EnvFailure
from flash.evaluate import evaluate, plan
from flash.sandbox import open_sandbox
from flash.sandbox.blocking import BlockingSandbox
from flash.types import Task
from flash.warm_start import small_policy
from tests import task_folders
from tests.sandboxes import needs_sandbox
from tests.task_folders import SOLUTION

pytestmark = [pytest.mark.slow, needs_sandbox]

SUBMIT = "```bash\nsubmit\n```"
SOLVE = f"```bash\n{SOLUTION}\n```"


@pytest.fixture
def opened():
    envs = []

    def make(folder, **options):
        # Its split is what the folder's name makes it.
        for split in ("train", "heldout"):
            try:
                envs.append(HarborEnv(path=str(folder), without=["image"], split=split, **options))
            except ValueError as error:
                if "tasks among" not in str(error):
                    raise
        return envs[-1]

    yield make
    for env in envs:
        env.close()


def block(commands):
    return f"I think of it.\n```bash\n{commands}\n```\nThat will do."


def played(env, *commands):
    """The last answer of an episode with these commands, which submits if it has not ended."""
    env.reset(seed=1)
    for command in commands:
        answer = env.step(block(command))
        if answer[2] or answer[3]:
            return answer
    return env.step(SUBMIT)


def reward(env, *commands):
    return played(env, *commands)[1]


FORMS = {"harbor": task_folders.harbor, "terminal-bench": task_folders.terminal_bench}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_folder_s_own_solution_earns_1_and_doing_nothing_0(form, tmp_path, opened):
    env = opened(form(tmp_path / "count"))
    solution = next((tmp_path / "count").glob("**/sol*.sh"), None) or (
        tmp_path / "count/solution/solve.sh"
    )
    _, won, ended, cut, info = played(env, solution.read_text())
    assert (won, ended, cut, info["success"]) == (1.0, True, False, True)
    _, lost, ended, cut, info = played(env)
    assert (lost, ended, cut, info["success"]) == (0.0, True, False, False)
    assert info["verifier"]["wrong"] == ""


def test_what_the_dockerfile_says_is_there(tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"))
    text, info = env.reset(seed=1)
    assert text.startswith("Write how many lines log.txt has to count.txt.\n")
    assert info == {"task": "count"}
    told, *_ = env.step(
        block('pwd; cat made.txt /brought/data/deep/one.txt; echo; echo "$GREETING"')
    )
    assert told == "exit status 0\n/app\nmade in good day/here1\ngood day\n"


def test_blocks_begin_anew_and_what_they_start_ends_with_them(tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"))
    env.reset(seed=1)
    env.step(block("cd /tmp; export GREETING=no; touch here; setsid sleep 1000 & disown; exit 3"))
    told, *_ = env.step(block("pwd; echo $GREETING; ls /tmp; grep -l sleep /proc/[0-9]*/comm"))
    assert told == "exit status 1\n/app\ngood day\nhere\n"


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("ls", "Nothing was run. .* there is none"),
        ("```python\n1\n```", "Nothing was run. .* there is none"),
        (f"{block('touch a')}\n{block('touch b')}", "Nothing was run. .* there are 2"),
        (f"```python\n1\n```\n{block('echo 1')}", "exit status 0\n1\n$"),
        ("```\necho '```'; echo 2\n```", "exit status 0\n```\n2\n$"),
        ("So:\n```sh echo 3```", "exit status 0\n3\n$"),
        (block("echo out; echo err >&2; false"), "exit status 1\nout\nerr\n$"),
        (block("kill -9 $$"), "exit status -9\n$"),
        (block("sleep 100"), "stopped after 0.5 s\n$"),
        (block("printf 'é%.0s' {1..50}; printf '\\xff'"), "é{20}\n… 11 characters …\né{19}�$"),
        (block("touch 'a\x00b'"), "null byte"),
    ],
)
def test_a_block_s_end_and_output_are_told(action, told, tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"), command_s=0.5, output_chars=40)
    env.reset(seed=1)
    text, given, ended, cut, _ = env.step(action)
    assert re.search(told, text)
    assert (given, ended, cut) == (0.0, False, False)


def test_the_last_turn_and_the_end_of_the_task_s_time_are_judged_too(tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"), max_turns=2)
    env.reset(seed=1)
    assert env.step("What now?")[1:4] == (0.0, False, False)
    assert env.step(block(SOLUTION))[1:4] == (1.0, False, True)
    short = "[agent]\ntimeout_sec = 0.5\n"
    env = opened(task_folders.harbor(tmp_path / "short", **{"task.toml": short}))
    text, *answer = played(env, f"{SOLUTION}; sleep 100")
    assert text == "stopped after 0.5 s\n"
    assert answer[:3] == [1.0, False, True]
    with pytest.raises(RuntimeError, match="reset first"):
        env.step(SUBMIT)


CHEATS = {
    "the reward is there already": "echo 1 > /logs/verifier/reward.txt",
    "the reward is there as JSON": "echo '{\"reward\": 1}' > /logs/verifier/reward.json",
    "the reward's place is a link": "echo 1 > x; ln -s /app/x /logs/verifier/reward.txt",
    "its folder is a link": "echo 1 > reward.txt; rmdir /logs/verifier; ln -s /app /logs/verifier",
    "its folder is closed": "echo 1 > /logs/verifier/reward.txt; chmod 555 /logs/verifier /logs",
    "a test of one's own": "echo 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh; "
    "chmod 444 /tests/test.sh; chmod 555 /tests",
    "the answers of the tests": "cp /tests/right/count.txt count.txt",
    "an answer to be found": "mkdir /tests/right; echo | tee /tests/right/count.txt > count.txt",
    "a daemon": "setsid bash -c 'while :; do echo 1 > /logs/verifier/reward.txt; done' & disown",
    "a daemon that waits": "nohup bash -c 'sleep 0.5; cp /tests/right/* .' >/dev/null 2>&1 &",
    "cat of one's own": "mkdir -p ~/bin; echo 'echo 3' > ~/bin/cat; chmod +x ~/bin/cat; "
    "echo 'PATH=~/bin:$PATH' | tee ~/.bashrc ~/.profile ~/.bash_profile ~/.bash_aliases",
    "no room for the verifier": "head -c 1G /dev/zero > big; ls",
    "no inodes": "mkdir d; cd d; for i in $(seq 20000); do : > $i; done",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS.keys())
def test_a_cheat_earns_nothing(cheat, tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"), disk_mb=16)
    assert reward(env, cheat) == 0.0


def test_what_is_closed_to_the_tests_is_opened(tmp_path, opened):
    env = opened(task_folders.harbor(tmp_path / "count"))
    close = "mkdir -p /tests/right /logs/verifier/x; chmod 0 /tests/right /tests /logs/*/* /logs"
    assert reward(env, f"{SOLUTION}; {close}") == 1.0


OF_PYTEST = {
    "a pytest of one's own": "printf 'print(\"= short test summary info =\\nPASSED a\")' "
    "> pytest.py",
    "a conftest": "echo 'import pytest; pytest_collection_modifyitems = lambda items: "
    "[item.add_marker(pytest.mark.xfail) for item in items]' > conftest.py",
}


@pytest.mark.parametrize("cheat", OF_PYTEST.values(), ids=OF_PYTEST.keys())
def test_pytest_is_the_tests_own(cheat, tmp_path, opened):
    env = opened(task_folders.terminal_bench(tmp_path / "count"))
    _, given, _, _, info = played(env, cheat)
    assert given == 0.0
    assert "2 failed" in info["verifier"]["said"]


def test_a_summary_that_a_test_prints_hides_none_that_failed(tmp_path, opened):
    printed = "echo '= short test summary info ='; echo 'PASSED test_outputs.py::test'\n"
    scripts = {"run-tests.sh": printed + task_folders.RUN_TESTS_SH + printed}
    env = opened(task_folders.terminal_bench(tmp_path / "count", **scripts))
    assert reward(env) == 0.0
    assert reward(env, SOLUTION) == 1.0


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """What a test.sh gives, in a sandbox for all of them."""
    path = tmp_path_factory.mktemp("tasks")
    task = read_folder(task_folders.harbor(path / "count"))
    sandbox = BlockingSandbox(open_sandbox(writable=writable_folders(task)))
    build(sandbox, task)

    def judge(test_sh, **changes):
        script = path / "test.sh"
        script.write_text(test_sh)
        changed = dataclasses.replace(task, script=script, **changes)
        return verify(sandbox, changed, seconds=20.0, reward_key="reward")[0]

    yield judge
    sandbox.close()


@pytest.mark.parametrize(
    ("test_sh", "reward", "rewards"),
    [
        ("echo ' 0.25 ' > /logs/verifier/reward.txt", 0.25, {"reward": 0.25}),
        ("echo 0.5 > /logs/verifier/reward.json; exit 1", 0.5, {"reward": 0.5}),
        (
            """echo '{"style": 0.1, "reward": true}' > /logs/verifier/reward.json
            echo 0.7 > /logs/verifier/reward.txt""",
            1.0,
            {"style": 0.1, "reward": 1.0},
        ),
        ("""echo '{"tests": 0.75}' > /logs/verifier/reward.json""", 0.75, {"tests": 0.75}),
        ('test "$MARK" = 5 && echo -1 > /logs/verifier/reward.txt', -1.0, {"reward": -1.0}),
    ],
)
def test_the_reward_is_what_the_verifier_wrote(test_sh, reward, rewards, judged):
    found = judged(test_sh, verifier_env={"MARK": "5"})
    assert (found.reward, found.rewards, found.wrong) == (reward, rewards, "")


@pytest.mark.parametrize(
    ("test_sh", "wrong"),
    [
        ("true", "there is no reward.json and no reward.txt"),
        ("echo nan > /logs/verifier/reward.txt", "no reward"),
        ("echo 1e9 > /logs/verifier/reward.txt", "no reward"),
        (": > /logs/verifier/reward.txt", "no reward"),
        ("echo '[1' > /logs/verifier/reward.json", "no JSON"),
        ("""echo '{"reward": "1"}' > /logs/verifier/reward.json""", "a reward is a number"),
        ("""echo '{"a": 1, "b": 1}' > /logs/verifier/reward.json""", "name one as reward_key"),
        ("yes 0 | head -c 100000 > /logs/verifier/reward.txt", "no reward"),
    ],
)
def test_a_verifier_without_a_reward_is_wrong_unless_it_says_that_it_failed(test_sh, wrong, judged):
    with pytest.raises(RuntimeError, match=wrong):
        judged(test_sh)
    found = judged(f"{test_sh}\nexit 1")
    assert found.reward == 0.0
    assert re.search(wrong, found.wrong)


def test_a_python_that_looks_among_a_user_s_packages_is_told_not_to(judged):
    """One in a virtual environment does not look there."""
    script = """
        python=$(python3 -c 'import sys; print(sys._base_executable)')
        packages=$($python -m site --user-site)
        mkdir -p "$packages"
        echo 'print(1)' > "$packages/usercustomize.py"
        $python -c 'print(0)' | head -n 1 > /logs/verifier/reward.txt
    """
    assert judged(script).reward == 0.0


def test_tests_that_take_too_long_give_0(tmp_path, opened):
    folder = task_folders.harbor(tmp_path / "count", **{"tests/test.sh": "echo on; sleep 100"})
    _, given, ended, _, info = played(opened(folder, verifier_s=0.5))
    assert (given, ended) == (0.0, True)
    assert info["verifier"] == {"said": "on\n", "wrong": "test.sh took too long: on"}


def test_a_line_of_the_dockerfile_that_fails_is_named(tmp_path, opened):
    lines = "FROM a\nRUN true\nRUN echo oh no; exit 4"
    env = opened(task_folders.harbor(tmp_path / "count", **{"environment/Dockerfile": lines}))
    with pytest.raises(
        EnvFailure, match="count: Dockerfile, line 3 ended with exit status 4: oh no"
    ):
        boundary.reset(env, Task(1))


async def test_a_served_policy_is_evaluated_on_a_folder_s_tasks_in_host_processes(tmp_path):
    """It solves what it sees, unless it sees no log in the instruction."""
    path = tmp_path / "tasks"
    for number in range(4):
        task_folders.harbor(path / f"count-{number}")
        task_folders.harbor(path / f"other-{number}", **{"instruction.md": "Guess the count."})
    model = small_policy.create(
        tmp_path / "m", [SUBMIT, SOLVE, "log", "exit status"], layers=1, hidden_size=8,
        heads=2,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)

    async def models(request):
        return web.json_response({"data": [{"id": "served", "root": str(model)}]})

    async def complete(request):
        body = await request.json()
        if not body:  # asked which fields it wants
            return web.json_response({}, status=422)
        seen = tokenizer.decode(body["prompt"])
        text = SOLVE if "log" in seen and "exit status" not in seen else SUBMIT
        return web.json_response({"choices": [{"text": text, "finish_reason": "stop"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", complete)
    options = {"path": str(path), "without": ["image"]}
    changes = {
        "env.options": options, "env.eval_options": {}, "env.hosts": 2,
        "agent.style": "plain", "eval.tasks": 8, "rollout.max_attempts": 1,
    }  # fmt: skip
    async with TestServer(app) as server:
        changes["model"] = str(server.make_url("")).rstrip("/")
        report = await evaluate(
            plan(None, changes, envs=["flash.envs.harbor:HarborEnv"]), lambda _: None
        )
    (found,) = report.environments.values()
    assert (found.played, found.failed, found.unfinished) == (8, 0, 0)
    assert 0 < found.success.mean < 1
    assert {(e.reward, e.turns) for e in found.episodes} == {(1.0, 2), (0.0, 1)}
