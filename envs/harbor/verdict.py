"""What an episode in a task folder was worth, by the task's own tests."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from flash.answers import number, shown
from flash.sandbox.blocking import BlockingSandbox
from flash.sandbox.sandbox import FileFailure

from .build import HOME, LOGS, TESTS, how_it_ended
from .folder import TaskFolder

_REWARDS = f"{LOGS}/verifier"
_LARGEST_FILE = 64_000  # bytes
_LARGEST_REWARD = 1_000.0
_SUMMARY = re.compile(r"=+ short test summary info =+")
_RESULT = re.compile(r"(PASSED|FAILED|SKIPPED|XFAIL|XPASS|ERROR)\b")
_GOOD = {"PASSED", "SKIPPED", "XFAIL"}
# A pytest.py that the agent left in its folder, or among a user's packages, is not the tests'.
_OWN_MODULES = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "PYTHONPATH": TESTS}
# Who closes a folder to its owner is its owner.
_EMPTY = f"""
chmod -R u+rwX {TESTS} {LOGS}
find {TESTS} {LOGS} -mindepth 1 -delete && mkdir -p {_REWARDS} {LOGS}/agent {LOGS}/artifacts
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reward, all rewards by their names, and why there was none that the tests gave."""

    reward: float
    rewards: dict[str, float] = field(default_factory=dict)
    wrong: str = ""


def verify(
    sandbox: BlockingSandbox, task: TaskFolder, *, seconds: float, reward_key: str
) -> tuple[Verdict, str]:
    """Brings the tests in, where nothing of the agent's runs or lies, and has them judge.

    Returns what they wrote to their standard streams too. What the agent can have caused is a
    reward of 0; RuntimeError for a verifier that says it went well, and told no reward.
    """
    try:
        emptied = sandbox.run(["sh", "-c", _EMPTY], cwd="/")
        if emptied.returncode != 0:
            return Verdict(0.0, wrong=f"emptying {TESTS} and {LOGS} {how_it_ended(emptied)}"), ""
        if task.tests.is_dir():
            sandbox.copy_in(task.tests, TESTS)
        sandbox.write(f"{TESTS}/{task.script.name}", task.script.read_bytes())
    except FileFailure as failure:
        return Verdict(0.0, wrong=f"there was no room for the tests: {failure}"), ""
    outcome = sandbox.run(
        ["bash", "-c", f"exec 2>&1; exec bash {TESTS}/{task.script.name}"],
        env={"HOME": HOME, **_OWN_MODULES, **task.env, **task.verifier_env},
        cwd=task.folder,
        seconds=seconds,
    )
    said = outcome.stdout.decode(errors="replace")
    if outcome.ended != "exited":
        return Verdict(0.0, wrong=f"{task.script.name} {how_it_ended(outcome)}"), said
    if task.marking == "pytest summary":
        return _of_summary(said), said
    try:
        return _of_files(sandbox, reward_key), said
    except ValueError as error:
        wrong = f"{task.name}: {error}; {task.script.name} {how_it_ended(outcome)}"
        if outcome.returncode == 0:
            raise RuntimeError(wrong) from error
        return Verdict(0.0, wrong=wrong), said


def _of_summary(said: str) -> Verdict:
    """Of pytest's `-rA`: 1 if there are tests, and none went wrong, else 0.

    What stands after the first such heading counts, so that one which a test prints hides nothing.
    """
    parts = _SUMMARY.split(said, maxsplit=1)
    lines = parts[1].splitlines() if len(parts) == 2 else ()
    results = [found[1] for line in lines if (found := _RESULT.match(line))]
    if not results:
        return Verdict(0.0, wrong="there is no summary of pytest that names a test")
    return Verdict(float(all(result in _GOOD for result in results)))


def _of_files(sandbox: BlockingSandbox, key: str) -> Verdict:
    """ValueError says what is wrong with them."""
    for name, read in (("reward.json", _of_json), ("reward.txt", _of_text)):
        content = sandbox.run(["head", "-c", str(_LARGEST_FILE), f"{_REWARDS}/{name}"])
        if content.returncode == 0:
            return read(content.stdout, key)
    raise ValueError("there is no reward.json and no reward.txt")


def _of_json(content: bytes, key: str) -> Verdict:
    """A number, or numbers by name, of which `key` is the reward, or the only one."""
    try:
        given = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"reward.json={shown(content)} is no JSON: {error}") from error
    named: dict[str, Any] = given if isinstance(given, dict) else {key: given}
    rewards = {name: _reward("reward.json", value) for name, value in named.items()}
    if key not in rewards and len(rewards) != 1:
        raise ValueError(f"reward.json has {shown(sorted(rewards))}: name one as reward_key")
    return Verdict(rewards[key] if key in rewards else next(iter(rewards.values())), rewards)


def _of_text(content: bytes, key: str) -> Verdict:
    try:
        reward = _reward("reward.txt", float(content))
    except ValueError as error:
        raise ValueError(f"reward.txt={shown(content)} is no reward") from error
    return Verdict(reward, {key: reward})


def _reward(name: str, value: object) -> float:
    reward = number(value)
    if reward is None or abs(reward) > _LARGEST_REWARD:
        raise ValueError(
            f"{name} has {shown(value)}: a reward is a number of at most {_LARGEST_REWARD:g}"
        )
    return reward
