"""What `flash status` prints of a run."""

import msgspec

from flash.telemetry.status import OfSet, Status, show


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
