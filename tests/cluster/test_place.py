"""Where the roles of a run are, in lines and in the run's folder."""

import msgspec
import pytest

from flash.cluster.place import Place, read_places, write_places
from flash.telemetry.status import Status, show

PLACES = [
    Place("explorer-1", "1a2b", "n7", "10.0.0.7", 12, 8, (0, "GPU-5")),
    Place("controller", "3c4d", "n1", "10.0.0.1", 13, 1, ()),
]


def test_places_are_kept_in_the_order_of_their_roles(tmp_path):
    assert read_places(tmp_path) == []
    write_places(tmp_path, PLACES)
    assert read_places(tmp_path) == PLACES[::-1]


def test_a_file_that_holds_no_places_is_refused_by_name(tmp_path):
    (tmp_path / "placement.json").write_text("{}")
    with pytest.raises(ValueError, match="placement.json can't be read: .*: remove it"):
        read_places(tmp_path)


def test_status_tells_of_each_role_its_node_and_devices(tmp_path, capsys):
    write_places(tmp_path, PLACES)
    status = Status(
        run="r", at=0.0, step=1, steps=2, version=1, running=0, ready=0, capacity=8, ages={},
        roles=[],
    )  # fmt: skip
    (tmp_path / "status.json").write_bytes(msgspec.json.encode(status))
    show(tmp_path, as_json=False)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "controller: node 3c4d on n1 (10.0.0.1), 1 core",
        "explorer-1: node 1a2b on n7 (10.0.0.7), 8 cores, GPU 0, GPU-5",
    ]
