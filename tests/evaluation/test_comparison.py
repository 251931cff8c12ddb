"""Two reports of the same tasks, compared task by task."""

import json
from pathlib import Path

import msgspec
import pytest

from flash.cli import main as cli
from flash.evaluation.comparison import Comparison, caption, compare, markdown
from flash.evaluation.report import EpisodeResult, Report, environment_result

LAKE = {"env": {"name": "lake", "options": {}}, "agent": {"style": "chat", "max_tokens": 4}}


def report(*tasks, played_with=LAKE, name="lake", **changes):
    """Of the rewards of each task's episodes, None for one that failed; seeds count from 0."""
    episodes = [
        EpisodeResult(
            seed=seed, reward=reward, success=None if reward is None else reward > 0,
            failure="EnvFailure" if reward is None else None, turns=2, prompt_tokens=9,
            sampled_tokens=4, unfinished=False, cut_responses=0,
        )
        for seed, rewards in enumerate(tasks) for reward in rewards
    ]  # fmt: skip
    return Report(
        **{
            "model": "m", "server": None, "tasks": len(tasks), "samples": 1, "temperature": 1.0,
            "complete": True, "time_s": 1.0,
            "environments": {name: environment_result(episodes, played_with=played_with)},
        } | changes
    )  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a report, and gives the name of its file."""
    monkeypatch.chdir(tmp_path)

    def write(name, found):
        Path(name).write_bytes(msgspec.json.encode(found))
        return name

    return write


def test_differences_are_of_tasks_and_their_interval_is_student_s():
    first = report([0, 1], [0.0], [1.0], [0.0])  # means 0.5, 0, 1, 0
    second = report([1, 1], [1.0], [1.0], [0.0])  # 1, 1, 1, 0: differences 0.5, 1, 0, 0
    lake = compare(first, second).environments["lake"]
    success = lake.success
    assert (success.first, success.second, success.difference.mean) == (0.375, 0.75, 0.375)
    # Variance 0.6875 / 3, error sqrt(0.2291667 / 4) = 0.2393568, t at 3 degrees 3.1824.
    assert success.difference.low == pytest.approx(0.375 - 3.1824 * 0.2393568, abs=1e-5)
    assert success.difference.high == pytest.approx(0.375 + 3.1824 * 0.2393568, abs=1e-5)
    assert (success.better, success.worse, lake.tasks, lake.left_out) == (2, 0, 4, 0)
    back = compare(second, first).environments["lake"].success
    assert (back.difference.mean, back.better, back.worse) == (-0.375, 0, 2)


def test_pairs_tell_a_difference_that_the_means_alone_do_not():
    """Half of the tasks are hopeless for both, and the second is a little better at the others."""
    first = report(*([[0.0]] * 20 + [[0.5]] * 20 + [[0.6]] * 20))
    second = report(*([[0.0]] * 20 + [[0.6]] * 20 + [[0.7]] * 20))
    reward = compare(first, second).environments["lake"].reward
    alone = [one.environments["lake"].reward for one in (first, second)]
    assert alone[0].high > alone[1].low
    assert reward.difference.low > 0


def test_tasks_that_failed_in_one_are_in_neither_mean():
    first, second = report([1.0], [None], [0.0]), report([1.0], [1.0], [None, 1.0])
    comparison = compare(first, second)
    lake = comparison.environments["lake"]
    assert (lake.tasks, lake.left_out) == (2, 1)
    assert (lake.success.first, lake.success.second) == (0.5, 1.0)
    assert "lake: 1 tasks are left out" in caption(comparison)


def test_models_may_be_played_otherwise_and_it_is_told():
    longer = LAKE | {"agent": {"style": "chat", "max_tokens": 9}}
    comparison = compare(
        report([1.0], [0.0]), report([1.0], [0.0], played_with=longer, temperature=0.5)
    )
    lake = comparison.environments["lake"]
    assert lake.otherwise == ["temperature", "max_tokens"]
    assert lake.success.difference.low is None, "equal differences tell nothing of others"
    assert "lake: played otherwise: temperature, max_tokens." in caption(comparison)


def test_the_command_prints_a_table_and_writes_what_it_printed(written, capsys):
    before = written("before.json", report([0.0], [0.0], [1.0], model="small"))
    after = written("after.json", report([1.0], [0.0], [1.0], model="large"))
    assert cli.run(["eval", "--compare", before, after, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    found = msgspec.json.decode(Path("found.json").read_bytes(), type=Comparison)
    assert (found.first, found.second) == ("small", "large")
    assert markdown(found) in out
    assert caption(found) in out
    row = next(line for line in out.splitlines() if "success" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["lake", "success", "3", "0.333", "0.667"]
    assert cells[5].startswith("+0.333 (-1.101 to +1.768)")
    assert cells[6:] == ["1", "0"]
    assert cli.run(["eval", "--compare", before, after, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["second"] == "large"


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (report([1.0], name="sea"), "environments differ, lake and sea: evaluate both models in"),
        (
            report([1.0], played_with=LAKE | {"env": {"name": "lake", "options": {"size": 8}}}),
            "lake was played with .*'options': {}.* and .*'size': 8.*: evaluate both with the same",
        ),
        (
            report([1.0], [1.0], [0.0]),
            r"tasks of lake don't match, 1 and 3, of which 2 are in one alone \(seeds 1, 2\): eval",
        ),
        (report([None]), "no task of lake was played in both: all episodes failed in one"),
    ],
)
def test_reports_of_other_tasks_are_refused(second, says):
    with pytest.raises(ValueError, match=f"--compare: {says}"):
        compare(report([1.0]), second)


def test_a_report_of_another_format_is_refused(written, capsys):
    other = written("other.json", report([1.0], format=2))
    assert cli.run(["eval", "--compare", other, other]) == 2
    says = "--compare other.json has format 2, and this version reads 1: evaluate again"
    assert says in capsys.readouterr().err
