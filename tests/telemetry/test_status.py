"""`flash status`: what is printed of a run."""

from pathlib import Path

import msgspec
import pytest

from flash.telemetry.status import STATUS_FILE, OfSet, Role, Status, show

STATUS = Status(
    run="r", at=0.0, step=3, steps=9, version=3, running=1, ready=2, capacity=8, ages={"1": 1},
    roles=[
        Role(role="worker [fe80::1]:80", where="[/red]", doing="x" * 70, rate=1.5, of="steps"),
        Role(role="explorer a", waits_for="a batch, " * 20 + "for 3 s"),
    ],
)  # fmt: skip


def test_a_role_is_a_line_and_no_name_is_markup(tmp_path: Path, capsys):
    (tmp_path / STATUS_FILE).write_bytes(msgspec.json.encode(STATUS))
    show(tmp_path, as_json=False)
    _, _, _, worker, explorer = capsys.readouterr().out.splitlines()
    assert worker.split() == ["worker", "[fe80::1]:80", "[/red]", "1.50", "steps/s", "x" * 70]
    assert explorer.rstrip().endswith("for 3 s")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"run": "\xff"}', b"[" * 9000])
def test_what_is_no_status_is_refused(tmp_path: Path, content):
    if content is not None:
        (tmp_path / STATUS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="can't be read .*give the folder of a run"):
        show(tmp_path, as_json=False)


def test_each_task_set_has_a_line_with_who_brings_it(tmp_path, capsys):
    sets = {
        "own": OfSet(running=3, ready=4, ages={"0": 2, "1": 5}),
        "web": OfSet(running=1, ready=0, ages={}, brought_by=["a", "b"]),
        "far": OfSet(running=8, ready=0, ages={}, brought_by=[]),
    }
    status = Status(
        run="r", at=0.0, step=1, steps=2, version=1, running=12, ready=4, capacity=8, ages={},
        roles=[], task_sets=sets,
    )  # fmt: skip
    (tmp_path / "status.json").write_bytes(msgspec.json.encode(status))
    show(tmp_path, as_json=False)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("task set")]
    assert told == [
        "task set own: 3 run, 4 are ready; oldest tokens: 2 of age 0, 5 of age 1",
        "task set web: 1 run, 0 are ready; oldest tokens: none; brought by a, b",
        "task set far: 8 run, 0 are ready; oldest tokens: none; brought by nobody",
    ]
