"""`flash eval` on servers that run already and on a model, with and without failures."""

import asyncio
import contextlib
import json

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from transformers import AutoTokenizer

from flash.cli import main as cli
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.evaluate import evaluate, plan
from flash.evaluation.report import EpisodeResult, Report, caption, environment_result, show
from flash.fakes import FakeWorker, worker_app
from flash.seeds import HELDOUT_SEEDS
from flash.warm_start import small_policy
from tests.door.conftest import RESPONSE_TEMPLATE
from tests.environments import lamps
from tests.tools.templates import HERMES, tokenizer_of

PLAIN = {"agent.style": "plain", "agent.max_tokens": 4, "agent.max_turns": 3}
KEY = "a-servers-key"


@pytest.fixture
def model(tmp_path):
    words = FrozenLakeTextEnv().vocabulary()
    return small_policy.create(tmp_path / "m", words, layers=1, hidden_size=8, heads=2)


class Server:
    """Of OpenAI's protocol, and with a worker of vLLM's routes too."""

    def __init__(self, model, worker=None, *, routes=("/v1/completions",), answer=None):
        self.asked: list[dict] = []
        self.keys: set[str] = set()
        self.served = ["served"]
        self._answer = answer or {"text": "north", "finish_reason": "stop"}
        app = web.Application() if worker is None else worker_app(worker)

        async def models(request):
            self.keys.add(request.headers.get("Authorization", ""))
            cards = [{"id": name, "root": str(model)} for name in self.served]
            return web.json_response({"data": cards})

        async def complete(request):
            body = await request.json()
            if not body:
                return web.json_response({}, status=422)
            self.asked.append(body)
            return web.json_response({"choices": [self._answer]})

        app.router.add_get("/v1/models", models)
        for route in routes:
            app.router.add_post(route, complete)
        self._server = TestServer(app)

    @contextlib.asynccontextmanager
    async def url(self):
        async with self._server as server:
            yield str(server.make_url("")).rstrip("/")


async def evaluated(url, changes=PLAIN, envs=("frozen_lake",), **options):
    changes = {"model": url, "eval.tasks": 6, "rollout.max_attempts": 1, **changes}
    return await evaluate(plan(None, changes, envs=envs), lambda _: None, **options)


async def test_a_server_of_vllm_plays_with_the_weights_that_it_has(model):
    worker = FakeWorker("w", token_s=(0, 0), version=41)
    async with Server(model, worker).url() as url:
        report = await evaluated(url, PLAIN | {"eval.samples": 4})
    assert (report.model, report.server, report.complete) == ("served", url, True)
    found = report.environments["frozen_lake"]
    assert (found.tasks, found.played, found.failed) == (6, 24, 0)
    assert [*found.pass_at] == [1, 2, 4]
    assert {e.seed for e in found.episodes} == set(HELDOUT_SEEDS[:6])
    assert found.sampled_tokens_mean > 0 < found.turns_mean
    assert worker.version == 41, "nothing was published to it"


async def test_a_server_of_completions_is_asked_with_token_ids_and_its_text_tokenised(model):
    server = Server(model)
    async with server.url() as url:
        found = (await evaluated(f"{url}/v1")).environments["frozen_lake"]
    assert all(isinstance(token, int) for token in server.asked[0]["prompt"])
    assert {body["model"] for body in server.asked} == {"served"}
    assert (found.played, found.turns_mean) == (6, len(server.asked) / 6)
    assert found.sampled_tokens_mean == 2 * found.turns_mean  # north, and the stop
    assert found.cut == 0
    assert found.unfinished > 0, "three steps north are no end of the lake"


async def test_a_response_that_ran_out_of_tokens_is_told(model):
    answer = {"text": "x", "finish_reason": "length", "token_ids": [5, 5]}
    async with Server(model, answer=answer).url() as url:
        found = (await evaluated(url)).environments["frozen_lake"]
    assert found.cut == found.played == 6
    assert found.sampled_tokens_mean == 2 * found.turns_mean


async def test_several_environments_are_played_in_one_report(model, tmp_path):
    settings = {"env": {"name": "frozen_lake", "options": {"size": 6}}, "agent": PLAIN_AGENT}
    (tmp_path / "wide.yaml").write_text(json.dumps(settings))
    async with Server(model).url() as url:
        report = await evaluated(url, envs=("frozen_lake", str(tmp_path / "wide.yaml")))
    assert [*report.environments] == ["frozen_lake", "wide"]
    wide = report.environments["wide"]
    assert wide.played_with["env"] == {
        "name": "frozen_lake",
        "options": {"size": 6, "split": "heldout"},
    }
    assert wide.played_with["agent"]["max_turns"] == 2
    assert {e.seed for e in wide.episodes} == set(HELDOUT_SEEDS[:6])


PLAIN_AGENT = {"style": "plain", "max_tokens": 4, "max_turns": 2}


async def test_a_key_goes_to_the_server_and_into_no_result(model, monkeypatch):
    monkeypatch.setenv("SERVERS_KEY", KEY)
    server = Server(model)
    async with server.url() as url:
        report = await evaluated(url, PLAIN | {"engine.api_key": "$SERVERS_KEY"})
    assert server.keys == {f"Bearer {KEY}"}
    assert KEY.encode() not in msgspec.json.encode(report)


CHAT = PLAIN | {
    "agent.style": "chat", "agent.style_options": {"system": "Be brief."}, "agent.max_tokens": 20,
}  # fmt: skip
SAYS_NORTH = {"message": {"role": "assistant", "content": "north"}, "finish_reason": "stop"}


@pytest.fixture
def any_text(tmp_path):
    """A folder with a tokenizer of bytes."""
    tokenizer_of(HERMES).save_pretrained(tmp_path / "bytes")
    config = {"model_type": "llama", "vocab_size": 300}
    (tmp_path / "bytes/config.json").write_text(json.dumps(config))
    return tmp_path / "bytes"


def chat(model, answer=SAYS_NORTH):
    return Server(model, routes=("/v1/chat/completions",), answer=answer)


async def test_a_server_of_chat_alone_is_told_messages_and_its_words_are_the_actions(any_text):
    server = chat(any_text)
    async with server.url() as url:
        report = await evaluated(f"{url}/v1", CHAT)
    result = report.environments["frozen_lake"]
    assert (result.played, report.model, report.server) == (6, "served", url)
    longest = max((asked["messages"] for asked in server.asked), key=len)
    roles = [message["role"] for message in longest]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert longest[0]["content"] == "Be brief."
    assert longest[2]["content"] == "north"
    assert "You can: " in longest[-1]["content"]
    assert {(asked["model"], asked["max_tokens"]) for asked in server.asked} == {("served", 20)}


async def test_what_it_was_cut_at_is_told_and_the_conversation_goes_on(any_text):
    server = chat(any_text, {"message": {"content": "north north"}, "finish_reason": "length"})
    async with server.url() as url:
        report = await evaluated(url, CHAT)
    assert report.environments["frozen_lake"].cut > 0
    assert max(len(asked["messages"]) for asked in server.asked) == 6


async def test_an_agent_of_ones_own_plays_on_chat_alone_through_the_door(any_text):
    server = chat(any_text)
    async with server.url() as url:
        report = await evaluated(
            url, {"agent.run": "tests.evaluation.asks_once:act", "agent.max_tokens": 4}
        )
    assert report.environments["frozen_lake"].played == 6
    assert all(asked["messages"][-1]["role"] == "user" for asked in server.asked)


async def test_one_of_several_models_is_named_after_the_url(any_text):
    server = chat(any_text)
    server.served = ["other", "served"]
    async with server.url() as url:
        for wrong in ("", "#third"):
            with pytest.raises(ValueError, match=f"{wrong} serves other, served: name one .*#NAME"):
                await evaluated(f"{url}{wrong}", CHAT)
        report = await evaluated(f"{url}/v1#served", CHAT)
    assert report.model == "served"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (PLAIN, "agent.style=plain with --model http.*: use --agent.style chat"),
        (CHAT | {"agent.tools": ["examples.tools.calculator"]}, "tools"),
    ],
)
async def test_what_chat_alone_can_not_play_is_refused_before_a_start(any_text, changes, told):
    server = chat(any_text)
    async with server.url() as url:
        with pytest.raises(ValueError, match=told):
            await evaluated(url, changes)
    assert not server.asked


async def test_a_server_with_no_route_that_is_known_is_refused(model):
    async with Server(model, routes=()).url() as url:
        with pytest.raises(ValueError, match=f"^--model {url} has none of .*: give the URL"):
            await evaluated(url)


async def test_a_server_whose_model_is_not_known_here_needs_a_tokenizer(model, tmp_path):
    async with Server(tmp_path / "elsewhere").url() as url:
        with pytest.raises(ValueError, match="serves served, .*: give --tokenizer NAME or a fold"):
            await evaluated(url)
        changes = {"model": url, "eval.tasks": 1, **PLAIN}
        planned = plan(None, changes, envs=["frozen_lake"], tokenizer=str(model))
        report = await evaluate(planned, lambda _: None)
    assert report.environments["frozen_lake"].played == 1


async def test_what_was_played_until_a_stop_is_reported(model):
    stop = asyncio.Event()

    class StopsAtTheFifth(FakeWorker):
        async def generate(self, *args, **options):
            if len(self.started) == 4:
                stop.set()
                await asyncio.Event().wait()
            return await super().generate(*args, **options)

    worker = StopsAtTheFifth("w", token_s=(0, 0))
    async with Server(model, worker).url() as url:
        changes = PLAIN | {"engine.max_running": 1, "agent.max_turns": 1}
        report = await evaluated(url, changes, stop=stop)
    assert not report.complete
    assert report.environments["frozen_lake"].played == 4
    assert "stopped before its end" in caption(report)


async def test_an_agent_of_ones_own_plays_through_the_door(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    async with Server(model).url() as url:
        changes = {"agent.run": "tests.evaluation.asks_once:act"}
        found = (await evaluated(url, changes)).environments["frozen_lake"]
    assert (found.played, found.failed) == (6, 0)
    assert found.success.mean == 1.0
    assert found.unfinished == 0, "nobody can say that of a world of its own"


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_environments_of_verifiers_are_evaluated_on_their_evaluation_set(model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{{ tools | tojson if tools else '' }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    tokenizer.save_pretrained(model)
    options = {"id": "vf-lamps", "python": lamps.python()}
    changes = {
        "agent.run": "flash.agents.verifiers:Verifiers", "agent.ignore": ["strict"],
        "agent.env": ["LAMP="], "env.options": options,
    }  # fmt: skip
    async with Server(model).url() as url:
        found = (await evaluated(url, changes, envs=("verifiers",))).environments["verifiers"]
    assert (found.played, found.failed) == (6, 0)
    assert found.success.mean == 1.0, "its one row has the answer that agent.env passes: none"
    assert found.turns_mean == 3


def episode(seed, reward=None, **changes):
    result = EpisodeResult(
        seed=seed, reward=reward, success=None if reward is None else reward > 0,
        failure="EnvFailure" if reward is None else None, turns=2, prompt_tokens=9,
        sampled_tokens=4, unfinished=False, cut_responses=0,
    )  # fmt: skip
    return msgspec.structs.replace(result, **changes)


def report_of(*episodes, **changes):
    found = environment_result(episodes, played_with={})
    sizes = {"tasks": 2, "samples": 2, "temperature": 1.0, "time_s": 3.0, "complete": True}
    return Report(model="m", server=None, environments={"lake": found}, **sizes | changes)


def test_failed_episodes_are_told_and_are_in_no_mean():
    found = report_of(episode(1, 1.0), episode(1), episode(2, 0.0), episode(2, 1.0))
    lake = found.environments["lake"]
    assert (lake.played, lake.failed, lake.failures) == (3, 1, {"EnvFailure": 1})
    assert lake.success.mean == lake.reward.mean == 0.75  # of tasks: 1 and 1/2
    assert (lake.pass_at[2].tasks, lake.pass_at[2].mean) == (1, 1.0)
    all_failed = environment_result([episode(1), episode(2)], played_with={})
    assert (all_failed.reward, all_failed.success, all_failed.pass_at) == (None, None, {})
    assert (all_failed.tasks, all_failed.failed) == (2, 2)


def test_the_table_is_markdown_and_the_json_is_read_back_as_it_was(tmp_path, capsys):
    report = report_of(
        episode(1, 1.0, cut_responses=1), episode(1), episode(2, 0.0, unfinished=True)
    )
    show(report, str(tmp_path / "r.json"))
    head, rule, row, *_ = [line for line in capsys.readouterr().out.splitlines() if line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [c.strip() for c in head.strip("|").split("|")][-2:] == ["cut off", "failed"]
    assert cells[0] == "lake"
    assert cells[-2:] == ["2", "1"]
    assert set(rule) <= set("|-: ")
    data = (tmp_path / "r.json").read_bytes()
    assert msgspec.json.decode(data, type=Report) == report
    assert json.loads(data)["format"] == 1
    show(report, "-")
    assert json.loads(capsys.readouterr().out) == json.loads(data)


@pytest.mark.slow
def test_a_model_in_a_folder_is_played_by_workers_of_its_own(model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "frozen_lake", "--model", str(model), "--eval.tasks", "3", "--json", "r.json"]
    assert cli.run([*words, "--eval.samples", "2", "--engine.kind", "embedded"]) == 0
    said = capfd.readouterr().out
    assert "| frozen_lake | " in said
    report = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Report)
    assert (report.model, report.server) == (str(model), None)
    assert {p.name for p in tmp_path.iterdir()} == {"m", "r.json"}, "no run was made"
