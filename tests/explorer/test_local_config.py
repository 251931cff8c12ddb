"""A run's configuration as it holds at an explorer, which has none of the controller's files."""

from types import SimpleNamespace

import pytest

from flash.config import load
from flash.explorer.explore import local_config
from flash.explorer.tasks import read_tasks

MODEL = "org/model"
LARGE = {"name": "frozen_lake", "options": {"size": 5}}


def told(source="frozen_lake", **changes):
    """What a controller says of its run."""
    config = load(source, {"explorers.expected": 1, **changes})
    return SimpleNamespace(config=config.model_dump(mode="json"), where="there")


def brought(folder, text):
    path = folder / "tasks.yaml"
    path.write_text(text)
    return read_tasks(path)


def test_an_explorer_needs_no_key_and_no_file_of_the_controllers(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_CONTROLLER", "a secret of theirs")
    files = [tmp_path / name for name in ("certificate", "key", "model", "reference")]
    certificate, key, *models = files
    for file in (certificate, key):
        file.touch()
    for model in models:
        model.mkdir()
        (model / "config.json").write_text("{}")
    run = told(
        **{
            "explorers.token": "$TOKEN_OF_CONTROLLER", "log.url": "postgresql://user:key@host/runs",
            "explorers.certificate": str(certificate), "explorers.key": str(key),
            "model": str(models[0]), "trainer.kl.reference": str(models[1]),
            "trainer.kl.coefficient": 0.1,
        }
    )  # fmt: skip
    monkeypatch.delenv("TOKEN_OF_CONTROLLER")
    for file in files:
        file.rename(tmp_path / f"not {file.name}")
    here = local_config(run, MODEL, {})
    assert here.model == MODEL
    assert here.trainer.kl.coefficient == 0.1


def of_web(**changes):
    sets = {"task_sets.own.weight": 1, "task_sets.web.brought": True}
    return told(**{"model": MODEL, "engine.workers": 0, **sets, **changes})


def test_a_brought_task_set_is_the_runs_but_for_what_it_is_played_with(tmp_path):
    tasks = brought(tmp_path, f"web: {{env: {LARGE}, agent: {{max_turns: 3}}}}")
    run = of_web(**{"task_sets.web.group_size": 4, "agent.temperature": 0.7})
    web = local_config(run, MODEL, {}, tasks=tasks).own_sets["web"]
    assert (web.env.options, web.agent.max_turns) == ({"size": 5}, 3)
    assert (web.group_size, web.agent.temperature) == (4, 0.7)


def test_an_explorer_has_environments_of_what_it_brings_and_of_the_rest_if_it_plays_it(tmp_path):
    tasks = brought(tmp_path, f"web: {{env: {LARGE}}}")
    assert [*local_config(of_web(), MODEL, {}).own_sets] == ["own"]
    assert [*local_config(of_web(), MODEL, {}, tasks=tasks).own_sets] == ["own", "web"]
    alone = of_web(**{"task_sets.own.env": LARGE, "task_sets.own.agent.max_turns": 2})
    alone.config["task_sets"]["own"]["env"]["name"] = "not_installed_here"
    here = local_config(alone, MODEL, {}, tasks=tasks, tasks_only=True)
    assert [*here.own_sets] == ["web"]


def test_an_explorer_that_brings_nothing_to_a_run_of_brought_sets_alone_is_told_so():
    run = of_web()
    del run.config["task_sets"]["own"]
    with pytest.raises(ValueError, match=r"explorers bring web: give --tasks FILE"):
        local_config(run, MODEL, {})


def test_an_explorers_gpus_may_be_named_by_uuids(monkeypatch):
    monkeypatch.setattr("flash.system.machine.gpus", lambda: ["GPU-8932f937", "MIG-41b3359c"])
    assert local_config(told(), MODEL, {}).engine.devices == ("GPU-8932f937", "MIG-41b3359c")


def test_an_explorer_takes_weights_as_the_run_sends_them_or_as_files(monkeypatch):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    monkeypatch.setattr("flash.system.machine.gpus", lambda: [0])
    nccl = {"engine.transport": "nccl", "engine.kind": "vllm", "engine.workers": 0}
    engine = local_config(told(**nccl), MODEL, {}).engine
    assert (engine.transport, engine.kind, engine.workers, engine.devices) == (
        "nccl",
        "vllm",
        1,
        (0,),
    )
    urls = {"engine.transport": "nccl", "engine.urls": "http://a:1", "engine.kind": "urls"}
    engine = local_config(told(**urls), MODEL, {}).engine
    assert (engine.transport, engine.kind, engine.urls) == ("nccl", "vllm", ())
    auto = {"engine.transport": "nccl", "engine.urls": "http://a:1"}
    assert local_config(told(**auto), MODEL, {}).engine.kind == "vllm"
    sglang = {"engine.urls": "http://a:1", "engine.kind": "sglang"}
    assert local_config(told(**sglang), MODEL, {}).engine.kind == "auto"
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    sent = told(**sglang, **{"engine.transport": "nccl"})
    engine = local_config(sent, MODEL, {}).engine
    assert (engine.transport, engine.kind, engine.urls) == ("nccl", "sglang", ())
    with pytest.raises(ValueError, match="--engine.kind vllm: .* is for sglang: leave it out, or"):
        local_config(sent, MODEL, {"engine.kind": "vllm"})
    other = {"engine.kind": "vllm", "engine.transport": "disk"}
    assert local_config(sent, MODEL, other).engine.kind == "vllm"
    runs_already = {"engine.kind": "urls", "engine.urls": "http://b:1"}
    engine = local_config(told(**nccl), MODEL, runs_already).engine
    assert (engine.transport, engine.urls) == ("nccl", ("http://b:1",))
    with pytest.raises(ValueError, match="--engine.kind urls: .* is for sglang"):
        local_config(sent, MODEL, runs_already)
    by_files = {"engine.transport": "disk", "engine.kind": "embedded"}
    assert local_config(told(**nccl), MODEL, by_files).engine.transport == "disk"
    assert local_config(told(**nccl), MODEL, {}, evaluates=True).engine.transport == "disk"
    asked = {"engine.transport": "nccl", "engine.kind": "vllm"}
    with pytest.raises(ValueError, match="--engine.transport nccl: the run's is disk"):
        local_config(told(), MODEL, asked)
    with pytest.raises(ValueError, match="an evaluation needs its weights as files"):
        local_config(told(**nccl), MODEL, asked, evaluates=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"policy.heads": 4, "policy.hidden_size": 64},
        {"model": MODEL, "trainer.router_replay": True},
    ],
)
def test_what_vllm_lacks_on_a_cpu_is_asked_where_its_servers_are(changes, monkeypatch):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    monkeypatch.setattr("flash.system.machine.gpus", list)
    run = told(**{"engine.kind": "vllm", "engine.workers": 0}, **changes)
    with pytest.raises(ValueError, match="on a CPU"):
        local_config(run, MODEL, {})
    monkeypatch.setattr("flash.system.machine.gpus", lambda: [0])
    assert local_config(run, MODEL, {}).engine.kind == "vllm"
