"""`flash explore`: joins a run, plays what it is given, and leaves when it is asked to.

where is the run? ─► join ─► Welcome: its configuration ─► hub, workers, environments
                      ▲                                          │
                      └── the link is lost: again, with what     ▼
                          is held, while episodes go on       Player
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import math
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from flash import config as configuration
from flash.config import SMALL, Config
from flash.config.source import changed
from flash.config.task_sets import PlayedWith
from flash.config.task_source import source_of_brought
from flash.errors import FlashError
from flash.explorer.address import ADDRESS_FILE, Address
from flash.explorer.connection import Connection, RunIsOver
from flash.explorer.fetch import Fetcher
from flash.explorer.file_server import FileServer
from flash.explorer.gate import NotTheController, joined
from flash.explorer.link import Wire
from flash.explorer.messages import Welcome
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.explorer.spool import Spool
from flash.explorer.tasks import read_tasks
from flash.parts.devices import check_devices
from flash.parts.open import open_parts
from flash.rollout.crew import AgentCrew
from flash.section import is_url
from flash.stop import unless
from flash.system import machine
from flash.system.durable import HeldError, locked
from flash.system.listener import from_elsewhere
from flash.system.process import Child, StartProcess
from flash.types import Weights

logger = logging.getLogger(__name__)

# What may be otherwise where an explorer runs: nothing of it changes what is learned.
LOCAL = ("engine", "env.hosts", "reward.concurrency", "reward.api_key", "reward.url")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `flash explore` is told."""

    source: str  # a URL, or the run's folder
    token: str = ""
    name: str = ""
    folder: Path | None = None
    ca: Path | None = None
    relay: str = ""  # the address at which other explorers take files from this one
    drain_s: float = 120.0
    wait_s: float = 3600.0  # for a controller that is away
    evaluates: bool = False
    tasks: Mapping[str, PlayedWith] = dataclasses.field(default_factory=dict)  # brought
    tasks_only: bool = False  # it plays no others
    overrides: Mapping[str, Any]


def checked(*, token: str, tasks: Path | None = None, **options: Any) -> Options:
    """ValueError for options that can't be."""
    told = Options(token=_revealed(token), **options)
    if "://" in told.source:
        if not is_url(told.source):
            raise ValueError(f"{told.source!r} is not a URL: write http://host:port")
        if not told.token:
            raise ValueError(
                f"--token is missing: {ADDRESS_FILE} in the run's folder has it; give it as "
                f"--token '$NAME', of a variable that holds it"
            )
    elif told.token:
        raise ValueError("--token goes with a URL: the run's folder has it; leave it out")
    elif not Path(told.source).is_dir() and Path(told.source).exists():
        raise ValueError(f"{told.source} is no folder of a run: give runs/NAME, or a URL")
    if told.name and not re.fullmatch(r"\w[\w.-]{,99}", told.name):
        raise ValueError(
            f"--name {told.name}: must be at most 100 letters, digits, '.', '_' and '-'"
        )
    if not (math.isfinite(told.drain_s) and told.drain_s >= 0):
        raise ValueError(f"--drain_s {told.drain_s:g}: must be a number of seconds, at least 0")
    if not told.wait_s >= 0:
        raise ValueError(
            f"--wait_s {told.wait_s:g}: must be a number of seconds, at least 0, or inf"
        )
    if told.relay:
        _host_and_port(told.relay)
        if told.ca or told.source.lower().startswith("https:"):
            raise ValueError(
                "--relay sends weights in the clear, and this run uses TLS: leave it out; all of "
                "them come from the controller then"
            )
    _trusted(told.ca)
    check_local(told.overrides)
    if tasks is not None:
        return dataclasses.replace(told, tasks=read_tasks(tasks))
    if told.tasks_only:
        raise ValueError("--tasks-only without --tasks: nothing would be played: give --tasks FILE")
    return told


def _revealed(token: str) -> str:
    if not token.startswith("$"):
        return token
    if not os.environ.get(token[1:]):
        raise ValueError(
            f"--token {token}: there is no environment variable {token[1:]}: export it"
        )
    return os.environ[token[1:]]


async def explore(
    options: Options,
    *,
    stop: asyncio.Event,
    say: Callable[[str], None] = print,
    elsewhere: AbstractAsyncContextManager[StartProcess] | None = None,
) -> None:
    """Plays for the run until that is over, or until `stop` is set and what runs has ended.

    `elsewhere`: starts environment hosts and reward processes on other machines.

    Raises ValueError for what the user got wrong, FlashError if it can't go on.
    """
    name = options.name or f"{machine.where()}-{os.getpid()}"
    parent = Path() if "://" in options.source else Path(options.source)
    folder = options.folder or parent / "explorers" / name
    tls = _trusted(options.ca)
    async with contextlib.AsyncExitStack() as opened:
        start: StartProcess | None = None
        if elsewhere is not None:
            start = await unless(stop, opened.enter_async_context(elsewhere))
            if start is None:
                return
        # Before the run begins there is no folder of it, or never will be.
        owned = options.folder is not None or await asyncio.to_thread(folder.is_dir)
        if owned:
            opened.enter_context(_own(folder))
        spool = Spool(folder / "spool")
        opened.push_async_callback(spool.close)
        session = await opened.enter_async_context(aiohttp.ClientSession())
        relay, relay_url = await _open_relay(options.relay, opened)
        url = ""

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[Wire]:
            nonlocal url
            address = _address_of(options, came_in=bool(url))
            url = address.url
            try:
                async with joined(session, address.url, address.token, tls=tls) as wire:
                    yield wire
            except NotTheController as refusal:
                # The folder tells of the last start; somebody else may have its port by now.
                refusal.again |= "://" not in options.source
                raise

        models, weights = [
            await opened.enter_async_context(
                Fetcher(
                    session, lambda: url, folder / name,
                    relay=relay, relay_url=relay_url, tls=tls,
                )
            )
            for name in ("model", "weights")
        ]  # fmt: skip
        player = Player(spool)
        await asyncio.to_thread(player.load)
        connection = Connection(
            name,
            player,
            connect=connect,
            have=weights.fetch,
            say=say,
            evaluates=options.evaluates,
            brings=await asyncio.to_thread(_sources, options.tasks),
            tasks_only=options.tasks_only,
            wait_s=options.wait_s,
        )
        try:
            async with connection.kept():
                while (welcome := await unless(stop, connection.welcomed())) is not None:
                    if not owned:
                        opened.enter_context(_own(folder))
                        owned = True
                    player.doing = "fetches the model"
                    model = await unless(stop, connection.model_by(models.fetch))
                    if model is None:
                        break
                    await _play_for(
                        options, welcome, model, connection, player, folder, stop, say, start
                    )
        except RunIsOver as over:
            say(f"{name}: {over}")


def _sources(tasks: Mapping[str, PlayedWith]) -> dict[str, str]:
    return {name: source_of_brought(of_set) for name, of_set in tasks.items()}


@contextlib.contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Two would take each other's weights away, and hand in each other's episodes."""
    with contextlib.ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened.enter_context(locked(folder))
        except HeldError as holder:
            raise FlashError(  # which may end soon
                f"{folder} is another explorer's, in {holder}: give this one a --name of its own"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{error}: give a --folder for what this explorer keeps, which it can write to"
            ) from error
        yield


async def _play_for(
    options: Options,
    welcome: Welcome,
    model: str,
    connection: Connection,
    player: Player,
    folder: Path,
    stop: asyncio.Event,
    say: Callable[[str], None],
    start: StartProcess | None,
) -> None:
    """Plays for a run as long as it stays as it is, or until `stop` is set.

    `start`: of environment hosts and reward processes, if they are elsewhere.
    """
    config = local_config(
        welcome,
        model,
        options.overrides,
        tasks=options.tasks,
        tasks_only=options.tasks_only,
        evaluates=options.evaluates,
    )
    configuration.check_capacity(config, machine.capacity(), trains=False, hosts=start is None)
    player.doing = "starts its workers"
    await check_devices(config, model, say=say, trains=False)

    async def weights() -> Weights:
        return Weights(version=welcome.version, path=Path(model))

    async with (
        open_parts(
            config,
            model=model,
            version=welcome.version,
            weights=weights,
            log_dir=folder / "logs",
            say=say,
            senders=connection.senders.of,
            start=start or Child.start,
        ) as parts,
        parts.agents() as agents,
        parts.agents(heldout=True) as heldout_agents,
    ):
        brings = f", and brings {', '.join(options.tasks)}" if options.tasks else ""
        say(f"plays for run {welcome.name} as {connection.name}{brings}")
        await play(
            player,
            connection,
            parts.hub,
            AgentCrew(agents.make, parts.hub, together=not config.rollout.replicate),
            AgentCrew(heldout_agents.make, parts.hub),
            stop=stop,
            drain_s=options.drain_s,
            say=say,
            by_files=config.engine.transport == "disk",
        )


async def _open_relay(
    address: str, opened: contextlib.AsyncExitStack
) -> tuple[FileServer | None, str]:
    """Where other explorers take files from this one, and the URL, if that was asked for."""
    if not address:
        return None, ""
    host, port = _host_and_port(address)
    relay = await opened.enter_async_context(FileServer())
    try:
        return relay, from_elsewhere(await relay.listen(host, port))
    except OSError as error:
        raise ValueError(
            f"--relay {address}: {error}: name an address of this machine, or another port"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "", parts.port or 0
        if parts.netloc != address or "@" in address:
            raise ValueError(address)
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"--relay {address}: must be an address of this machine at which other explorers can "
            f"reach it, as 10.0.0.7 or 10.0.0.7:8766, or 0.0.0.0 for all of its addresses"
        ) from None
    return host, port


def check_local(overrides: Iterable[str]) -> None:
    """ValueError for a field that is not an explorer's own."""
    for field in overrides:
        if not any(f"{field}.".startswith(f"{name}.") for name in LOCAL):
            raise ValueError(
                f"--{field} is the run's, for all its explorers: change it there; an explorer may "
                f"have its own {', '.join(LOCAL)}"
            )


def local_config(
    welcome: Welcome,
    model: str,
    overrides: Mapping[str, Any],
    *,
    tasks: Mapping[str, PlayedWith] = {},
    tasks_only: bool = False,
    evaluates: bool = False,
) -> Config:
    """The run's configuration as it holds at an explorer that brings these task sets; `model` is
    where it has that.

    ValueError for what can't be played here.
    """
    # Whatever else is the controller's own may be no file here, and no key.
    settings = welcome.config | {"explorers": {"expected": 1}, "log": {}}
    if settings["model"] != SMALL:
        settings["model"] = model
    trainer = settings["trainer"]
    settings["trainer"] = trainer | {"kl": trainer["kl"] | {"reference": None}}
    engine = dict(settings["engine"])
    # The run's own workers, ports and GPUs are none of ours; what it has none of, we have one of.
    engine |= {"urls": [], "api_key": "", "door_port": None, "devices": []}
    engine["workers"] = engine["workers"] or 1
    if evaluates:
        engine["transport"] = "disk"  # what an evaluation is of must be to be had until its end
    if engine["transport"] == "nccl":
        engine["kind"] = "sglang" if engine["kind"] == "sglang" else "vllm"
    elif engine["kind"] == "urls" or (engine["kind"] == "sglang" and settings["engine"]["urls"]):
        engine["kind"] = "auto"
    if welcome.where != machine.where():  # there are no trainer's ranks to leave some to
        engine["devices"] = machine.gpus()
    settings["engine"] = engine
    settings["task_sets"] = {
        name: _of_set_here(of_set, tasks.get(name), tasks_only=tasks_only)
        for name, of_set in settings["task_sets"].items()
    }
    if settings["task_sets"] and all(of.get("brought") for of in settings["task_sets"].values()):
        names = ", ".join(settings["task_sets"])
        raise ValueError(
            f"there is nothing to play here: explorers bring {names}: give --tasks FILE"
        )
    config = configuration.parse(changed(settings, overrides))
    if not (config.engine.workers or config.engine.urls):
        raise ValueError("engine.workers=0: an explorer has workers: leave it out, or give more")
    if config.engine.transport == "nccl" and engine["transport"] != "nccl":
        why = "an evaluation needs its weights as files" if evaluates else "the run's is disk"
        raise ValueError(f"--engine.transport nccl: {why}: leave it out")
    is_sglang = config.engine.kind == "sglang"  # servers that run already may be of either kind
    if config.engine.transport == "nccl" and is_sglang != (engine["kind"] == "sglang"):
        raise ValueError(
            f"--engine.kind {config.engine.kind}: what sends the run's weights is for "
            f"{engine['kind']}: leave it out, or take --engine.transport disk"
        )
    return config


def _of_set_here(
    of_set: Mapping[str, Any], brings: PlayedWith | None, *, tasks_only: bool
) -> dict[str, Any]:
    """A task set of the run's, at an explorer that brings it, does not, or plays no others."""
    of_run = {name: value for name, value in of_set.items() if name != "brought"}
    if brings is not None:
        return of_run | {name: getattr(brings, name) for name in brings.model_fields_set}
    if tasks_only:
        of_run = {name: of_run[name] for name in of_run if name not in PlayedWith.model_fields}
        return of_run | {"brought": True}
    return dict(of_set)


def _address_of(options: Options, *, came_in: bool) -> Address:
    """By the URL, or by what the run's folder says; NotTheController if it does not yet, and
    RunIsOver if it does no more."""
    if "://" not in options.source:
        run = Path(options.source)
        address = Address.read(run)
        if address is None and came_in and run.is_dir():
            raise RunIsOver("the run is over")
        if address is None:
            raise NotTheController(f"{options.source} has no {ADDRESS_FILE} yet", again=True)
        return address
    return Address(options.source, options.token)


def _trusted(ca: Path | None) -> ssl.SSLContext | None:
    if ca is None:
        return None
    try:
        return ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise ValueError(f"--ca {ca}: {error}: name the certificate's file, in PEM") from error
