"""From a configuration to parts: the model's tokenizer and the tasks of a run."""

import asyncio
import json
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flash.agents import EnvironmentAgent, ExternalAgent
from flash.config import load
from flash.evaluate import evaluate, plan
from flash.evaluation.play import heldout_tasks
from flash.fakes import FakeRank, FakeSglang, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.sglang_nccl import SglangNcclWorker
from flash.parts.agents import Playing, open_agents
from flash.parts.door import open_door
from flash.parts.expert import expert_of
from flash.parts.model import load_tokenizer, make_style, prepared_model
from flash.parts.open import open_parts
from flash.parts.reward import open_reward
from flash.parts.training import as_logged
from flash.parts.workers import open_hub, probe_of
from flash.seeds import HELDOUT_SEEDS
from flash.train import warn_of_idle_steps
from flash.types import Task, Weights
from flash.warm_start import small_policy
from tests.saved import fake_checkpoint


def test_a_model_without_a_tokenizer_is_the_users_to_change(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"model={str(tmp_path)!r} can't be loaded: check its name")
    assert "\n" not in str(caught.value)


async def test_a_loop_is_not_held_up_by_a_tokenizer_that_is_loaded(tmp_path):
    model = small_policy.create(tmp_path / "m", ["a", "b"], layers=1, hidden_size=8, heads=2)
    config = load("frozen_lake", {"model": str(model), "engine.urls": "http://127.0.0.1:9"})
    turns = 0

    async def take_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def say(line):
        raise InterruptedError  # there is one now

    others = asyncio.create_task(take_turns())
    with pytest.raises(InterruptedError):
        async with open_parts(
            config, model=str(model), version=0, weights=None, log_dir=tmp_path, say=say
        ):
            pass
    others.cancel()
    assert turns > 0


def test_what_was_trained_on_other_ranks_is_trained_again_on_those_that_there_are():
    were = {"trainer.ranks": 8, "trainer.shard_size": 4, "trainer.sequence_ranks": 2}
    logged = load("frozen_lake", were).trainer
    now = load("frozen_lake", {"trainer.ranks": 2, "trainer.learning_rate": 1e-6}).trainer
    again = as_logged(logged.model_dump(mode="json"), now)
    assert again == logged.model_copy(update={"ranks": 2, "shard_size": None, "sequence_ranks": 1})


def broken_model(folder):
    """One that names more layers than its weights are of."""
    small_policy.create(folder, ["a", "b"], layers=1, hidden_size=8, heads=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def test_an_experts_file_is_read_for_the_model_and_must_have_enough(tmp_path):
    words = ["go", "north", "a", "room"]
    model = str(small_policy.create(tmp_path / "m", words, layers=1, hidden_size=8, heads=2))
    said = {"role": "assistant", "content": "go north"}
    row = {"messages": [{"role": "user", "content": "a room"}, said]}
    path = tmp_path / "e.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    changes = {"rollout.expert.file": str(path), "rollout.expert.episodes": 2, "model": model}
    assert expert_of(load("frozen_lake", {"model": model}), model) is None
    expert = expert_of(load("frozen_lake", changes), model)
    share = expert(0)
    assert (len(share.sequences), share.weight) == (2, 0.1)
    tokenizer = load_tokenizer(model)
    for sequence in share.sequences:
        assert tokenizer.decode(sequence.token_ids) == "a room <act> go north <stop>"
        learned = sequence.token_ids[sequence.loss_mask > 0]
        assert tokenizer.decode(learned) == "go north <stop>"
    with pytest.raises(
        ValueError, match=r"^rollout\.expert\.episodes=4 exceeds the 3 trajectories"
    ):
        expert_of(load("frozen_lake", changes | {"rollout.expert.episodes": 4}), model)
    sequence = {"token_ids": [1, len(tokenizer)], "loss_mask": [0, 1]}
    path.write_text(json.dumps({"sequences": [sequence]}))
    with pytest.raises(ValueError, match=f"token {len(tokenizer)} is none of the model's"):
        expert_of(load("frozen_lake", changes), model)


async def test_a_run_refuses_a_model_that_lacks_layers_before_it_starts_anything(tmp_path):
    broken_model(tmp_path / "m")
    config = load("frozen_lake", {"model": str(tmp_path / "m")})
    with pytest.raises(ValueError, match=r"^model='.*m': its files lack 18 weights, model\.layers"):
        await prepared_model(config, lambda *_: None)


async def test_so_it_does_heads_that_ranks_of_a_pass_do_not_divide(tmp_path):
    model = str(small_policy.create(tmp_path / "m", ["a"], layers=1, hidden_size=8, heads=2))
    ranks = {"trainer.ranks": 3, "trainer.sequence_ranks": 3}
    refused = "='.*m': trainer.sequence_ranks=3 does not divide the model's 2 attention heads"
    with pytest.raises(ValueError, match=f"^model{refused}"):
        await prepared_model(load("frozen_lake", {"model": model, **ranks}), lambda *_: None)
    changes = {"trainer.kl.coefficient": 0.1, "trainer.kl.reference": model, "policy.heads": 3}
    config = load("frozen_lake", {**changes, **ranks, "policy.hidden_size": 96})
    with pytest.raises(ValueError, match=rf"^trainer\.kl\.reference{refused}"):
        await prepared_model(config, lambda *_: None)


async def test_so_it_does_a_reference_of_the_divergence(tmp_path):
    broken_model(tmp_path / "m")
    changes = {"trainer.kl.coefficient": 0.1, "trainer.kl.reference": str(tmp_path / "m")}
    with pytest.raises(ValueError, match=r"^trainer\.kl\.reference='.*m': its files lack"):
        await prepared_model(load("frozen_lake", changes), lambda *_: None)


async def test_a_model_of_the_hub_is_refused_if_its_heads_can_not_be_shared_out(monkeypatch):
    monkeypatch.setattr("flash.parts.model._hub_config", lambda _: {"num_attention_heads": 6})
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    changes = {"model": "org/m", "engine.kind": "vllm", "engine.tensor_parallel": 4}
    with pytest.raises(ValueError, match=r"parallel=4 with the 6 heads of model='org/m'.*2, 3, 6"):
        await prepared_model(load("frozen_lake", changes), lambda *_: None)


async def test_an_evaluation_leaves_out_what_explorers_bring_and_says_so(tmp_path):
    checkpoint = fake_checkpoint(tmp_path / "r", 1)
    run = {
        "env": "frozen_lake", "model": "org/model", "explorers": {"expected": 1},
        "task_sets": {"own": {}, "web": {"brought": True}},
    }  # fmt: skip
    said: list[str] = []
    (tmp_path / "r" / "config.yaml").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="names no model_type"):  # it comes that far
        await evaluate(plan(str(checkpoint), {}), said.append)
    assert said == [
        "left out, because explorers bring it: web; --task_sets.web.brought false and "
        "--task_sets.web.env NAME play web here"
    ]
    del run["task_sets"]["own"]
    (tmp_path / "r" / "config.yaml").write_text(json.dumps(run | {"engine": {"workers": 0}}))
    with pytest.raises(ValueError, match=r"all task sets are brought by explorers \(web\): --task"):
        await evaluate(plan(str(checkpoint), {}))


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    small_policy.create(tmp_path, ["a", "b"], layers=1, hidden_size=8, heads=2)
    assert len(load_tokenizer(str(tmp_path))) == 6
    larger = small_policy.create(tmp_path / "larger", ["a", "b", "c"], layers=1, hidden_size=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((larger / name).read_bytes())
    with pytest.raises(ValueError, match="larger than the model: 1 tokens, the first 'c' with"):
        load_tokenizer(str(tmp_path))


def test_a_style_that_can_not_use_the_models_tokenizer_is_named_with_it():
    config = load("frozen_lake", {"agent.style": "chat"})
    with pytest.raises(
        ValueError, match=r"agent\.style='chat' with the tokenizer of model='small'"
    ):
        make_style(config, SimpleNamespace(chat_template=None))


async def test_a_model_that_can_not_chat_has_no_door_for_an_agent_of_ones_own():
    config = load("frozen_lake", {"agent.run": ["sh", "agent.sh"]})
    with pytest.raises(ValueError, match="has no chat template, so an agent can't chat with it"):
        async with open_door(config, None, tokenizer=SimpleNamespace(chat_template=None)):
            pass


async def test_an_open_door_alone_makes_nobody_elses_agents(tmp_path):
    config = load("frozen_lake", {"engine.door_port": 0})
    own = load("frozen_lake", {"agent.run": ["sh", "agent.sh"]})
    sets = {
        name: Playing(config=each, style=FakeStyle(), reward=None, log_dir=tmp_path)
        for name, each in {"ours": config, "own": own}.items()
    }
    async with open_agents(sets, door=object(), hub=None) as agents:
        assert type(agents.make["ours"]()) is EnvironmentAgent
        assert type(agents.make["own"]()) is ExternalAgent


async def test_environment_hosts_and_reward_processes_are_started_where_they_are_to_be(
    tmp_path, monkeypatch
):
    (tmp_path / "my_scores.py").write_text("def score(transcript):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    reward = {"name": "process", "run": "my_scores:score", "concurrency": 2}
    config = load("frozen_lake", {"env.hosts": 1, "reward": reward})
    started = []

    async def start(module, *, name, log_path, answers=None):
        started.append((module, log_path.name))
        return FakeRank(name, {"configure": None, "open": False})

    tokenizer = SimpleNamespace(decode=str)
    async with open_reward(config, None, tokenizer=tokenizer, log_dir=tmp_path, start=start):
        playing = Playing(config=config, style=None, reward=None, log_dir=tmp_path)
        for heldout in (False, True):
            async with open_agents(
                {"": playing}, door=None, hub=None, heldout=heldout, start=start
            ) as agents:
                await agents.hosts[0].open()
    rewards = [("flash.reward.host", f"reward_{number}.log") for number in range(2)]
    assert started == [*rewards, *[("flash.environments.host", "env_host_0.log")] * 2]


SGLANG = {"engine.kind": "sglang", "engine.urls": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("changes", "gpus", "limit"),
    [
        ({}, [], 1e-3),
        ({}, [0], 40 / 32),
        ({"engine.dtype": "float32", "trainer.dtype": "float32"}, [0], 1e-3),
        ({"engine.dtype": "float32"}, [0], 40 / 32),
        ({"engine.dtype": "bfloat16"}, [], 40 / 32),
        ({"trainer.dtype": "bfloat16"}, [], 40 / 32),
        # What is not known here.
        ({"engine.urls": "http://127.0.0.1:1"}, [], 40 / 32),
        ({"engine.urls": "http://127.0.0.1:1", "engine.dtype": "float32"}, [], 1e-3),
        ({"explorers.expected": 1}, [], 40 / 32),
        # What vLLM is told.
        ({"engine.vllm_args": "--dtype half"}, [], 40 / 32),
        ({"engine.vllm_args": "--dtype=float32", "trainer.dtype": "float32"}, [0], 1e-3),
        ({"engine.vllm_args": "--kv-cache-dtype fp8 --enforce-eager"}, [0], 40 / 2),
        ({"engine.vllm_args": "--kv_cache_dtype=auto"}, [0], 40 / 32),
        ({"engine.vllm_args": "--quantization=fp8"}, [0], 40 / 2),
        # What SGLang is, and not vLLM beside it.
        (
            {**SGLANG, "engine.sglang_args": "--quantization fp8"},
            [0],
            40 / 2,
        ),
        ({**SGLANG, "engine.vllm_args": "--quantization=fp8"}, [0], 40 / 32),
        ({"engine.gap_limit": 0.02}, [0], 0.02),
        ({"engine.gap_limit": 0.02}, [], 0.02),
    ],
)
def test_the_probe_allows_what_the_coarser_precision_makes(changes, gpus, limit, monkeypatch):
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: gpus)
    assert probe_of(load("frozen_lake", changes)).limit(largest_logit=40.0) == limit


@pytest.mark.parametrize(
    ("longest", "prompt", "tokens"), [(512, 4, 16), (20, 4, 16), (19, 4, 15), (3, 2, 1)]
)
def test_the_probe_fits_into_what_a_worker_takes(longest, prompt, tokens):
    changes = {"agent.max_sequence_tokens": longest, "agent.max_tokens": 1}
    probe = probe_of(load("frozen_lake", changes))
    assert {len(each) for each in probe.prompts} == {prompt}
    assert probe.tokens == tokens


@pytest.mark.parametrize(
    ("changes", "gpus", "line"),
    [
        ({}, [], "engine: 1 embedded worker on the CPU, because vLLM is not installed (`make "),
        ({"engine.workers": 2}, [0, 1, 2, 3], "2 embedded workers on GPU 1, 2, because vLLM is n"),
        ({"engine.urls": "http://127.0.0.1:1"}, [], "engine: 1 worker that ran before, because e"),
    ],
)
async def test_a_run_says_which_workers_it_takes_and_where_they_are(
    changes, gpus, line, tmp_path, monkeypatch
):
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: gpus)
    monkeypatch.setattr("flash.parts.workers.has_vllm", lambda: False)
    said = []

    async def no_weights():
        raise ValueError("the trainer's")

    config = load("frozen_lake", changes)
    hub = open_hub(
        config, model="", version=0, weights=no_weights, log_dir=tmp_path, say=said.append
    )
    if "engine.urls" in changes:
        with pytest.raises(ValueError, match="the trainer's"):
            await hub.__aenter__()
    else:
        monkeypatch.setattr(
            "flash.parts.workers.EmbeddedPool.start", lambda *_: asyncio.sleep(0, [])
        )
        async with hub:
            pass
    assert line in said[0]


@pytest.mark.parametrize(
    ("kind", "name", "sleeps"),
    [
        ("vllm", "vLLM", "--enable-sleep-mode"),
        ("sglang", "SGLang", "--enable-memory-saver"),
    ],
)
async def test_servers_that_take_turns_are_on_the_trainers_gpus_and_start_when_it_has_made_room(
    kind, name, sleeps, tmp_path, monkeypatch
):
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: [0, 1, 2])
    monkeypatch.setattr(f"flash.system.machine.has_{kind}", lambda: True)
    said, happened = [], []

    async def weights():
        happened.append("the trainer has loaded")
        return Weights(version=3, path=tmp_path)

    async def make_room():
        happened.append("the trainer has made room")

    async def start(pool, on_exit, on_ready):
        happened.append(pool._command(1, "", 0)[-1])
        happened.append(pool._environment(1)["CUDA_VISIBLE_DEVICES"])
        return []

    monkeypatch.setattr("flash.hub.pool.ProcessPool.start", start)
    engine = {"engine.kind": kind, "engine.colocated": True, "engine.workers": 2}
    config = load("frozen_lake", {**engine, "trainer.ranks": 2})
    async with open_hub(
        config, model="", version=3, weights=weights, log_dir=tmp_path, say=said.append,
        make_room=make_room,
    ):  # fmt: skip
        pass
    assert said == [f"engine: 2 {name} servers on GPU 0, 1, in turns with the trainer, as engine."
                    f"kind says"]  # fmt: skip
    assert happened == [
        "the trainer has loaded", "the trainer has made room", sleeps, "1"
    ]  # fmt: skip


@pytest.mark.parametrize("update_mode", ["keep", "keep_stale_kv"])
async def test_sglang_servers_are_started_with_what_the_run_says(
    update_mode, tmp_path, monkeypatch
):
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: [0, 1, 2])
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    started = []

    async def start(pool, on_exit, on_ready):
        started.append(pool)
        return []

    async def weights():
        raise AssertionError("a run's own servers start with the model")

    monkeypatch.setattr("flash.hub.pool.ProcessPool.start", start)
    engine = {"engine.kind": "sglang", "engine.update_mode": update_mode, "engine.workers": 2}
    engine |= {"engine.sglang_args": "--attention-backend fa3", "engine.vllm_args": "--enforce"}
    config = load("frozen_lake", engine)
    async with open_hub(config, model="m", version=0, weights=weights, log_dir=tmp_path, say=print):
        pass
    (pool,) = started
    command = pool._command(0, "", 0)
    assert command[-2:] == ["--attention-backend", "fa3"]
    assert "--dtype=bfloat16" in command
    assert f"--context-length={config.agent.max_sequence_tokens}" in command
    assert ("--disable-overlap-schedule" in command) == (update_mode == "keep_stale_kv")
    assert pool._environment(1)["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("urls", "towards", "address"),
    [
        ((), "", "127.0.0.1"),
        (("http://a:1", "http://b:2"), "10.1.2.3", "10.1.2.3"),
        (("http://a:1", "http://b:2"), "::ffff:10.1.2.3", "10.1.2.3"),
        (("http://a:1", "http://b:2"), "fe80::1%eth1", "fe80::1%eth1"),
    ],
)
async def test_a_sender_to_an_sglang_server_listens_where_that_finds_it(
    urls, towards, address, tmp_path, monkeypatch
):
    started = []

    class Silent:
        def kill(self):
            """It has nothing to end."""

        async def stop(self):
            """Nor to wait for."""

    async def child(*words, env, **options):
        started.append((*words, env))
        return Silent()

    async def address_towards(url):
        assert url == "http://b:2"
        return towards

    async def start(pool, on_exit, on_ready):
        return [pool._client(1, "http://127.0.0.1:1")]

    async def weights():
        return Weights(version=0, path=tmp_path)

    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    monkeypatch.setattr("flash.hub.sender.Child.start", child)
    monkeypatch.setattr("flash.parts.workers.address_towards", address_towards)
    monkeypatch.setattr("flash.hub.pool.ProcessPool.start", start)
    nccl = {"engine.kind": "sglang", "engine.transport": "nccl", "trainer.ranks": 3}
    config = load("frozen_lake", {**nccl, "engine.urls": urls, "engine.workers": 2})
    async with open_hub(
        config, model="m", version=0, weights=weights, log_dir=tmp_path, say=print
    ) as hub:
        worker = hub._slots[-1].worker
        assert isinstance(worker, SglangNcclWorker)
        await worker._transfer.told(0)
    variables = {"NCCL_CUMEM_ENABLE": "0"}  # as in SGLang's servers
    assert started == [("flash.trainer.process_group", "1", address, variables)]


async def test_workers_are_asked_for_their_room_all_at_once(tmp_path):
    asked = asyncio.Barrier(2)  # one after the other would never get past it

    async def models(request):
        await asked.wait()
        return web.json_response({"data": [{"id": "policy", "max_model_len": 8}]})

    async def weights():
        raise AssertionError("it is refused before")

    app, other = web.Application(), web.Application()
    for one in (app, other):
        one.router.add_get("/v1/models", models)
    async with TestServer(app) as first, TestServer(other) as second:
        urls = [str(server.make_url("")) for server in (first, second)]
        config = load("frozen_lake", {"engine.urls": urls})
        with pytest.raises(ValueError, match="exceeds the 8 tokens"):
            async with open_hub(
                config, model="", version=0, weights=weights, log_dir=tmp_path, say=print
            ):
                pass


@pytest.mark.parametrize(
    ("kind", "option"), [("urls", "max-model-len"), ("sglang", "context-length")]
)
async def test_a_worker_that_takes_shorter_sequences_is_refused_with_the_remedy(
    kind, option, tmp_path
):
    async def models(request):
        return web.json_response({"data": [{"id": "policy", "max_model_len": 300}]})

    async def weights():
        raise ValueError("it takes them")

    app = web.Application()
    app.router.add_get("/v1/models", models)
    async with TestServer(app) as server:
        for tokens, says in (
            (300, "it takes them"),
            (301, f"exceeds the 300 tokens.*--{option}=301"),
        ):
            engine = {"engine.urls": str(server.make_url("")), "engine.kind": kind}
            config = load("frozen_lake", {**engine, "agent.max_sequence_tokens": tokens})
            with pytest.raises(ValueError, match=says):
                async with open_hub(
                    config, model="", version=0, weights=weights, log_dir=tmp_path, say=print
                ):
                    pass


async def test_sglang_servers_that_run_already_get_the_weights_by_routes_of_theirs(tmp_path):
    (tmp_path / "model.safetensors").touch()

    async def weights():
        return Weights(version=3, path=tmp_path)

    server = FakeSglang(FakeWorker("worker", load_s=(0, 0)), api_key="sesame")
    async with TestServer(server.app()) as listener:
        engine = {"engine.kind": "sglang", "engine.urls": str(listener.make_url(""))}
        config = load("frozen_lake", {**engine, "engine.api_key": "sesame"})
        said = []
        async with open_hub(
            config, model="", version=3, weights=weights, log_dir=tmp_path, say=said.append
        ) as hub:
            assert hub.stats().workers[0].healthy
    assert server.asked[0] == ("/v1/models", None)
    updates = [body for route, body in server.asked if route == "/update_weights_from_disk"]
    assert [body["model_path"] for body in updates] == [str(tmp_path)]
    assert said == ["engine: 1 worker that ran before, because engine.urls names them"]


def test_held_out_tasks_are_the_same_for_every_run():
    one = load("frozen_lake", {"seed": 1, "eval.tasks": 4})
    other = load("frozen_lake", {"seed": 2, "eval.tasks": 4})
    assert (
        heldout_tasks(one.eval) == heldout_tasks(other.eval) == [Task(n) for n in HELDOUT_SEEDS[:4]]
    )


async def test_the_door_opens_in_any_run_that_gives_it_a_port_and_tells_its_token(tmp_path):
    core = Tokenizer(models.WordLevel({"<stop>": 0}, unk_token="<stop>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>")
    async with InferenceHub([FakeWorker("worker")]) as hub:
        config = load("frozen_lake", {})
        async with open_door(
            config, hub, tokenizer=tokenizer, told_in=tmp_path / "no.json"
        ) as door:
            assert door is None
        config = load("frozen_lake", {"engine.door_port": 0})
        async with open_door(config, hub, tokenizer=tokenizer) as door:
            assert door is None, "an evaluation beside the run leaves its port alone"
        told = tmp_path / "logs" / "door.json"
        async with open_door(config, hub, tokenizer=tokenizer, told_in=told):
            assert told.stat().st_mode & 0o777 == 0o600
            door = json.loads(told.read_text())
            headers = {"Authorization": f"Bearer {door['token']}"}
            async with aiohttp.ClientSession(headers=headers) as http:
                answer = await http.get(f"{door['url']}/metrics")
                assert "flash_hub_version 0.0" in await answer.text()
        assert not told.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"trainer.decay_steps": 15}, ""),
        ({"trainer.decay_steps": 10}, "the learning rate is 0 after step 15 of steps=20"),
        (
            {"trainer.decay_steps": 15, "trainer.mini_batches": 2},
            "trainer.decay_steps=15 with warmup_steps=5: the learning rate is 0 after step 10 of",
        ),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_said(changes, said, caplog):
    warn_of_idle_steps(load("frozen_lake", {"steps": 20, **changes, "trainer.warmup_steps": 5}))
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
