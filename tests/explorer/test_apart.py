"""An explorer that has none of the controller's folders: as on another machine."""

import asyncio
import shutil
from pathlib import Path

import pytest

from flash.explorer.address import Address
from tests.commands import flash
from tests.tiny_runs import run, tiny

MOST_S = 200  # a run takes 20
SOON_S = 30

# With nothing in the folders $1 … $N before "--", runs the rest.
APART = """
while [ "$1" != -- ]; do mount -t tmpfs none "$1"; shift; done
shift
exec "$@"
"""


async def exit_code(*words) -> int:
    return await (await asyncio.create_subprocess_exec(*words)).wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_an_explorer_without_the_controllers_disk_has_its_model_and_weights(tmp_path: Path):
    if shutil.which("unshare") is None or await exit_code("unshare", "--mount", "true"):
        pytest.skip("needs root and unshare, for mounts of a process of its own")
    folder = tmp_path / "r"
    config = tiny(
        "frozen_lake", tmp_path, name="r", steps=4, eval_every=0,
        **{"explorers.expected": 1, "engine.workers": 0},
    )  # fmt: skip
    hidden = [folder, "/dev/shm", (tmp_path / ".small_policies").resolve()]
    running = asyncio.create_task(run(config))
    while not folder.is_dir() or (address := Address.read(folder)) is None:
        assert not running.done(), running
        await asyncio.sleep(0.1)
    inside = ("unshare", "--mount", "sh", "-ec", APART, "sh", *hidden, "--")
    async with flash(
        "explore", address.url, "--token", address.token, "--relay", "127.0.0.1",
        "--folder", tmp_path / "a", inside=inside,
    ) as explorer:  # fmt: skip
        ended = asyncio.create_task(explorer.communicate())
        both = running, ended
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED, timeout=MOST_S)
        if not running.done():  # nobody plays, whatever it waits for
            running.cancel()
            explorer.kill()
        await asyncio.wait(both, timeout=SOON_S)
        if not ended.done():  # it has not heard that the run is over
            explorer.kill()
        out, _ = await ended
        assert explorer.returncode == 0, out.decode()
        assert (await running)["steps"] == 4
        assert b"the run is over" in out
    (model,) = (tmp_path / "a/model").iterdir()
    assert (model / "config.json").is_file()
    # Of two versions, and what changed between them.
    assert 1 <= len(list((tmp_path / "a/weights").iterdir())) <= 3
