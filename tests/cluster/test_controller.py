"""The controller's role: what it tells whom, without a cluster."""

import asyncio

from flash import config as configuration
from flash.cluster.controller import ControllerRole
from flash.cluster.place import Place
from flash.cluster.roles import plan_of

HOME = Place("controller", "1a2b", "n1", "10.0.0.1", 12, 1, ())
AWAY = Place("explorer-0", "3c4d", "n2", "10.0.0.2", 13, 1, ())


def role(tmp_path) -> ControllerRole:
    config = configuration.load("frozen_lake", {"cluster": "ray", "runs_dir": str(tmp_path)})
    return ControllerRole(plan_of(config, token="t", marker=tmp_path / "marker"), HOME)


async def test_lines_are_told_once_to_who_has_seen_those_before(tmp_path):
    controller = role(tmp_path)
    life, seen, lines, last = await controller.output("", 0)
    assert (lines, last) == ([("out", str(HOME))], False)
    more = asyncio.create_task(controller.output(life, seen))
    asking = asyncio.create_task(controller.whereabouts(None, AWAY))
    assert (await more)[2] == [("out", str(AWAY))]
    asking.cancel()
    await asyncio.wait((asking,))


async def test_who_asks_again_where_the_run_is_is_told_of_no_second_time(tmp_path):
    controller = role(tmp_path)
    for _ in range(2):
        asking = asyncio.create_task(controller.whereabouts(None, AWAY))
        await asyncio.wait((asking,), timeout=0)
        asking.cancel()
        await asyncio.wait((asking,))
    _, seen, lines, _ = await controller.output("", 0)
    assert lines == [("out", str(HOME)), ("out", str(AWAY))]
    assert seen == 2


async def test_a_controller_that_has_started_again_tells_all_that_it_said_since(tmp_path):
    before, after = role(tmp_path), role(tmp_path)
    life, seen, *_ = await before.output("", 0)
    other, _, lines, _ = await after.output(life, seen)
    assert other != life
    assert lines == [("out", str(HOME))]
