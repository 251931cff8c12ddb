"""The command: exit codes, messages and help; nothing starts for a mistake."""

import asyncio
import gc
import itertools
import socket
import subprocess
import sys
import weakref
from importlib import metadata
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from flash import config, virtual_time
from flash.cli import commands, event_loop
from flash.cli import main as cli
from flash.cli.words import split_words
from flash.errors import InferenceFailure, RolloutStall


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "alfred"], "neither a preset"),
        (["train", "frozen_lke"], "did you mean frozen_lake?"),
        (["train", "frozen_lake", "steps", "4"], "'steps' is one word too many"),
        (["train", "frozen_lake", "--steps"], "--steps has no value: write --steps VALUE\n"),
        (
            ["train", "frozen_lake", "--engine.vllm_args", "--a b"],
            "--engine.vllm_args VALUE, or --engine.vllm_args='--a b' if that is the value",
        ),
        (["train", "frozen_lake", "-steps", "4"], "'-steps' is one word too many: give"),
        (["train", "frozen_lake", "-steps", "4"], "did you mean --steps?"),
        (["train", "frozen_lake", "--steps", "--alpha", "1"], "--steps has no value"),
        (["train", "--steps", "3"], "env is missing"),
        (["train", "frozen_lake", "--alpha", "-2"], "alpha=-2: must be"),
        (["train", "frozen_lake", "--env.options", "{"], "is not YAML"),
        (["train", "frozen_lake", "--alpha", "1", "--async_generation_ratio", "2"], "two names"),
        (["train", "frozen_lake", "--env.options.size", "33"], "size=33 must be 2 to 9"),
        (["train", "frozen_lake", "--name", "nothing", "--resume"], "holds no run with a log"),
        (["eval", "nowhere"], "holds no checkpoint"),
        (["eval"], "Give a run's folder or a checkpoint"),
        (
            ["train", "frozen_lake", "--stepz", "3"],
            "stepz: unknown field; did you mean steps?",
        ),
        (["train", "frozen_lake", "-x"], "'-x' is one word too many"),
        (["worker", "--model", "m", "--port", "65536"], "--port 65536: must be 0 to 65535"),
        (["worker", "--model", "m", "--max_running", "0"], "--max-running 0: must be at least 1"),
        (["worker", "--model", "./none"], "--model ./none: there is no such directory; a hub"),
        (["worker", "--model", "."], "--model .: the directory holds no config.json"),
        (["worker", "--model", "m", "--host", "192.0.2.1"], "--port 0 on 192.0.2.1:"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    assert not list(tmp_path.iterdir()), "nothing was started"
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_in_use_is_found_before_a_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(["worker", "--model", "nothing", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"flash: --port {port} is in use on 127.0.0.1: choose another, or 0 for a free one\n"
    )


def test_a_door_whose_port_is_in_use_is_found_before_anything_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.run(["train", "frozen_lake", "--engine.door_port", str(port)]) == 2
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == (
        f"flash: engine.door_port={port} is in use on 127.0.0.1: choose another, or 0 for a free "
        f"one\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"flash what? Give a command: {', '.join(cli.COMMANDS)}; or --help"),
        (["trian"], "'trian' is no command: did you mean train?"),
        (["--versoin"], "'--versoin' is no command: did you mean --version?"),
        (["fly"], f"'fly' is no command: there are {', '.join(cli.COMMANDS)}, and --help"),
        (["train", "--help", "engin"], "--help 'engin' is no section: did you mean engine?"),
        (["train", "--help", "xyz"], "--help 'xyz' is no section: there are env, engine, agent"),
        (["worker"], "the following arguments are required: --model; see flash worker --help"),
        (["worker", "--model", "m", "--port", "x"], "--port: invalid int value: 'x'; see flash wo"),
        (["worker", "--model", "m", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["worker", "--model", "m", "--por", "1"], "--por is unknown: did you mean --port?"),
        (["worker", "--model", "m", "--model", "n"], "--model is given twice: give it once"),
    ],
)
def test_words_that_are_no_command_or_option_end_in_exit_code_2(arguments, message, capsys):
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_version_is_the_packages(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"flash {metadata.version('flash-rl')}\n"


def test_the_overview_names_every_command(capsys):
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in commands.BY_NAME:
        assert f"  {name} " in text


def test_the_help_of_a_section_is_its_fields_alone(capsys):
    for word in ("engine", "--engine"):
        assert cli.run(["train", "--help", word]) == 0
        text = capsys.readouterr().out
        assert "--engine.workers" in text
        assert "--trainer" not in text
        assert "presets:" not in text
    assert cli.run(["simulate", "--help", "workload"]) == 0
    text = capsys.readouterr().out
    assert "--workload.turns" in text
    assert "--workers" not in text


def test_the_help_says_what_each_field_is_and_its_default(capsys):
    assert cli.run(["train", "--help"]) == 0
    _, _, fields = capsys.readouterr().out.partition("fields (nested")
    text = " ".join(fields.split())
    for name, info in config.fields():
        if hasattr(info.annotation, "model_fields") or info.discriminator is not None:
            continue  # a section, which has its docstring
        head = text.partition(f"--{name} ")[2].partition(" --")[0]
        assert info.description in head, name
        if info.default not in ("", None, (), {}, SecretStr("")) and not info.is_required():
            value = info.default
            value = list(value) if isinstance(value, tuple) else value
            value = str(value).lower() if isinstance(value, bool) else value
            assert f"[{value}]" in head, name


def test_the_help_names_every_field_and_preset(capsys):
    assert cli.run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, _ in config.fields():
        assert name in text
    assert f"presets: {', '.join(sorted(config.presets()))}" in text
    assert "--engine.devices [int|text, …] " in text


def test_values_are_yaml_with_or_without_an_equals_sign():
    given = ["--a.b", "1", "--c-d=true", "--e", "[1, x]", "--f", "1e-3"]
    assert split_words(given) == ([], {"a.b": 1, "c_d": True, "e": [1, "x"], "f": "1e-3"})


def test_a_text_stays_as_it_was_typed():
    given = ["--name", "007", "--model=1e3", "--agent.style", "on"]
    assert split_words(given)[1] == {"name": "007", "model": "1e3", "agent.style": "on"}
    assert split_words(["--engine.api_key", "007"])[1] == {"engine.api_key": "007"}


def test_names_with_commas_between_need_no_yaml():
    for given, meant in (
        ("*", "*"), ("*,image_url", "*,image_url"), ('["*", a]', ["*", "a"]), ("7", "7"),
    ):  # fmt: skip
        assert split_words(["--agent.ignore", given])[1] == {"agent.ignore": meant}


def test_a_switch_needs_no_value_and_resume_is_one():
    assert split_words(["--resume", "alfworld"]) == (["alfworld"], {"checkpoint.resume": True})
    assert split_words(["--checkpoint.resume", "false"]) == ([], {"checkpoint.resume": False})
    assert split_words(["--resume", "--steps", "3"])[1] == {"checkpoint.resume": True, "steps": 3}


def test_the_source_may_stand_anywhere():
    assert split_words(["--steps", "4", "alfworld"]) == (["alfworld"], {"steps": 4})


def test_a_failure_of_the_run_ends_with_exit_code_1_its_cause_and_its_log(monkeypatch, capsys):
    def fail(_):
        error = InferenceFailure("no worker is left")
        error.add_note("log: runs/x/logs/controller.log")
        raise error

    monkeypatch.setitem(commands.BY_NAME, "eval", fail)
    assert cli.run(["eval", "runs/x"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "flash: InferenceFailure: no worker is left",
        "flash: log: runs/x/logs/controller.log",
    ]


def test_a_stall_has_an_exit_code_of_its_own(monkeypatch):
    def stall(_):
        raise RolloutStall("env_asleep", "no progress for 600.0 s: the environment is asleep")

    monkeypatch.setitem(commands.BY_NAME, "train", stall)
    assert cli.run(["train"]) == 3


@pytest.mark.parametrize(
    "statement", ["import flash", "import flash.cli.commands", "import flash.agents"]
)
def test_light_imports_load_no_heavy_package(statement):
    code = f"{statement}; import sys; print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["--help"], {"pydantic", "yaml", "numpy", "aiohttp"}),
        (["--version"], {"pydantic", "yaml", "numpy", "aiohttp"}),
        (["trian"], {"pydantic", "yaml", "numpy", "aiohttp"}),
        (["train", "frozen_lke"], {"numpy", "aiohttp"}),
        (["train", "frozen_lake", "--stepz", "3"], {"numpy", "aiohttp"}),
        (["train", "--help"], {"numpy", "aiohttp"}),
        (["simulate", "x.yaml", "--sedes", "3"], {"numpy", "aiohttp"}),
    ],
)
def test_help_and_mistakes_wait_for_no_import_that_they_do_not_need(words, unneeded):
    heavy = {"torch", "transformers", "vllm", "tensorboard", "matplotlib", *unneeded}
    code = (
        f"import sys; from flash.cli import main as cli; cli.run({words})\n"
        f"print({heavy} & set(sys.modules) or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "light"


class Garbage:
    def __init__(self):
        self.itself = self


@pytest.mark.parametrize(("takes_s", "every_s"), [(0.1, 300), (2.0, 2000)])
def test_commands_collect_garbage_by_the_clock_alone(takes_s, every_s, monkeypatch):
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: takes_s * next(ticks))
    monkeypatch.setattr(event_loop, "time", clock)

    async def main():
        assert not gc.isenabled()
        event_loop._collect_by_the_clock(asyncio.get_running_loop())
        for waits_s in (300, every_s):
            garbage = weakref.ref(Garbage())
            await asyncio.sleep(waits_s - 2)
            assert garbage() is not None
            await asyncio.sleep(3)
            assert garbage() is None

    async def is_off():
        return not gc.isenabled() and gc.get_freeze_count() > 0

    assert event_loop.run_loop(is_off())
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        virtual_time.run(main())
    finally:
        gc.enable()


SIGNALLED = """
import asyncio, os, signal, sys
from flash.cli import event_loop

def hear(): os.kill(os.getpid(), signal.{name})

async def main(stop):
    if stop is not None:
        hear()
        await stop.wait()
        print("asked", flush=True)
    asyncio.get_running_loop().call_soon(hear)
    try:
        await asyncio.Event().wait()
    finally:
        print("closing", flush=True)
        if {thrice}:
            hear()
            import time; time.sleep(60)  # nothing else is heard while this holds the loop
        print("closed", flush=True)

stop = asyncio.Event() if {asks} else None
event_loop.run_loop(main(stop), stop=stop)
"""


@pytest.mark.parametrize("asks", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("thrice", [False, True], ids=["closes", "at once"])
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_asks_the_next_one_closes_and_one_more_ends_at_once(name, exit_code, thrice, asks):
    code = SIGNALLED.format(name=name, thrice=thrice, asks=asks)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    said = ["asked"] * asks + ["closing"] + ["closed"] * (not thrice)
    assert done.stdout.split() == said
    assert done.returncode == exit_code
    asked = "stopping after this step; once more to stop at once\n"
    assert done.stderr == asked * asks, "and no traceback"


def test_ctrl_c_outside_of_a_loop_is_quiet():
    code = (
        "import os, signal\n"
        "from flash.cli import main as cli\n"
        "cli.run = lambda arguments: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['train'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
