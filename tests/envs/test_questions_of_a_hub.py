"""Questions of a data set on the hub: one on loopback, with the routes that the client asks."""

import asyncio
import contextlib
import hashlib
import io
import json
import os
import sys

import pyarrow
import pytest
from aiohttp import web
from pyarrow import parquet

pytestmark = pytest.mark.slow

REVISION = "a" * 40
CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.parquet}
  - {split: test, path: main/test.parquet}
- config_name: other
  data_files: other/*.parquet
---
"""
ASK = """
import json, sys
from flash.envs.questions import QuestionsEnv
for line in sys.argv[1:]:
    try:
        env = QuestionsEnv(**json.loads(line))
        print(json.dumps(sorted({env.reset(seed=seed)[0] for seed in range(10)})))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def questions(first: int) -> bytes:
    file = io.BytesIO()
    numbers = range(first, first + 3)
    columns = {"question": [f"q {n}" for n in numbers], "answer": [f"#### {n}" for n in numbers]}
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


@contextlib.asynccontextmanager
async def hub():
    """Its URL."""
    files = {
        "README.md": CARD,
        "main/train.parquet": questions(0),
        "main/test.parquet": questions(100),
        "other/train.parquet": questions(200),
    }

    def told(name):
        content = files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": sha(content)}

    def sha(content):
        return hashlib.sha1(content).hexdigest()

    async def info(request):
        siblings = [{"rfilename": name} for name in files]
        return web.json_response({"id": "org/sums", "sha": REVISION, "siblings": siblings})

    async def tree(request):
        folder = request.match_info["folder"]
        return web.json_response([told(name) for name in files if name.startswith(f"{folder}/")])

    async def resolve(request):
        name = request.match_info["name"]
        if name not in files:
            return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{sha(files[name])}"', "X-Repo-Commit": REVISION}
        return web.Response(body=files[name], headers=headers)

    async def nothing(request):
        return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})

    app = web.Application()
    app.router.add_get("/api/datasets/org/sums/revision/{revision}", info)
    app.router.add_get("/api/datasets/org/sums/tree/{revision}/{folder}", tree)
    app.router.add_get("/datasets/org/sums/resolve/{revision}/{name:.*}", resolve)
    app.router.add_route("*", "/{path:.*}", nothing)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def asked(url, home, *options, **variables):
    """What each environment asks, or why it does not, in a process that knows that hub."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ASK, *map(json.dumps, options),
        env=os.environ
        | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets")}
        | variables,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    return [json.loads(line) for line in out.splitlines()]


async def test_a_data_set_of_the_hub_is_read_by_its_name_and_then_without_a_connection(tmp_path):
    main = {"path": "org/sums", "subset": "main", "split": "all"}
    train, test = ["q 0", "q 1", "q 2"], ["q 100", "q 101", "q 102"]
    async with hub() as url:
        found = await asked(
            url,
            tmp_path,
            main,
            main | {"data_split": "test", "revision": REVISION},
            {"path": "org/sums"},
            main | {"subset": "nope"},
            main | {"data_split": "nope"},
            {"path": "org/none"},
        )
        assert found[:2] == [train, test]
    remedy = ": correct the name, subset, data_split or revision; "
    for error, says in zip(
        found[2:],
        (
            "path='org/sums' can't be read: Config name is missing.",
            "'nope' not found. Available: ['main', 'other']",
            "Unknown split \"nope\". Should be one of ['train', 'test']",
            "path='org/none' can't be read: Dataset 'org/none' doesn't exist on the Hub",
        ),
        strict=True,
    ):
        assert says in error
        assert remedy in error
    assert await asked(url, tmp_path, main, HF_HUB_OFFLINE="1") == [train]
    (refused,) = await asked(url, tmp_path / "other", main, HF_HUB_OFFLINE="1")
    assert "without a connection it must be in the hub's cache" in refused
