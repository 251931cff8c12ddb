"""Who plays the episodes of a run: agents of this process, explorers, or both."""

import asyncio
import contextlib
import itertools
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flash.config import Config
from flash.environments.hosts import EnvHosts
from flash.explorer.address import Address
from flash.explorer.brought import Brought
from flash.explorer.config import ExplorersConfig
from flash.explorer.crew import FleetCrew
from flash.explorer.file_server import FileServer
from flash.explorer.fleet import Fleet, Run
from flash.explorer.gate import Gate
from flash.explorer.hub import FleetHub
from flash.explorer.senders import Sending
from flash.hub.hub import InferenceHub
from flash.hub.sender import SenderProcess, listening_at, nccl_sender
from flash.hub.turns import MakeRoom
from flash.log.run_log import ID_FILE
from flash.parts.model import load_tokenizer
from flash.parts.open import Parts, open_parts
from flash.parts.roles import NONE_EARLIER, Earlier, open_earlier
from flash.rollout.crew import AgentCrew, Crew
from flash.rollout.episode import AgentFactories
from flash.section import revealed
from flash.system import machine
from flash.system.listener import from_elsewhere
from flash.types import TrainerState, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Players:
    """They are open.

    `crew` plays what is trained. An evaluation is played by agents that `heldout` makes, on any
    hub; or, with rollout paused, by who `examined` makes, if it is there. Explorers come in while a
    `gate` is open: not before the loop knows what it goes on with.
    """

    hub: InferenceHub | FleetHub
    crew: Crew
    heldout: AgentFactories
    examined: Callable[[], Crew] | None
    tokenizer: Any
    hosts: Sequence[EnvHosts]
    earlier: Earlier = NONE_EARLIER
    fleet: Fleet | None = None
    gate: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext


@contextlib.asynccontextmanager
async def open_players(
    config: Config,
    *,
    model: str,
    version: int,
    weights: Callable[[], Awaitable[Weights]],
    folder: Path,
    say: Callable[[str], None],
    due: Mapping[int, int],
    start: int,
    known: Callable[[int], int],
    after_commit: Callable[[Callable[[], None]], None],
    is_over: Callable[[], bool],
    trainer: Callable[[], TrainerState],
    make_room: MakeRoom | None,
) -> AsyncIterator[Players]:
    """Those of a configuration; of `model`, at that version.

    `due`: episodes that explorers may hold, if the run had some, and which start of it gave each.
    `start` is the number of this one, and `known` tells of any the newest version whose weights
    stay what they were then. `is_over`: whether the run has come to its end, when its gate closes.
    `trainer`: what it is at. `make_room` is there if it shares its GPUs with the workers here.
    """
    before = Address.read(folder)
    async with contextlib.AsyncExitStack() as opened:
        parts: Parts | None = None
        hosts: Sequence[EnvHosts] = ()
        local: AgentCrew | None = None
        heldout: AgentFactories = _nobody
        earlier = NONE_EARLIER
        if config.engine.workers or config.engine.urls:
            earlier = await opened.enter_async_context(
                open_earlier(
                    config,
                    model=model,
                    version=version,
                    weights=weights,
                    log_dir=folder / "logs",
                    say=say,
                )
            )
            parts = await opened.enter_async_context(
                open_parts(
                    config,
                    model=model,
                    version=version,
                    weights=weights,
                    log_dir=folder / "logs",
                    say=say,
                    door_file=folder / "logs" / "door.json",
                    make_room=make_room,
                    earlier=earlier,
                )
            )
            agents = await opened.enter_async_context(parts.agents())
            heldout_agents = await opened.enter_async_context(parts.agents(heldout=True))
            local = AgentCrew(agents.make, parts.hub, together=not config.rollout.replicate)
            heldout, hosts = heldout_agents.make, agents.hosts
        if not config.explorers.may_come:
            assert parts is not None and local is not None
            yield Players(
                hub=parts.hub, crew=local, heldout=heldout, examined=None,
                tokenizer=parts.tokenizer, hosts=hosts, earlier=earlier,
            )  # fmt: skip
            return
        files = await opened.enter_async_context(FileServer())
        hub = FleetHub(
            None if parts is None else parts.hub,
            version=version,
            offer=files.offer,
            is_idle=lambda: not trainer().doing,
        )
        fleet = Fleet(
            await _run(config, folder, files, model=model, version=version),
            lease_s=config.explorers.lease_s,
            due=due if before else {},
            start=start,
            known=known,
            after_commit=after_commit,
            version=lambda: hub.version,
            publish=lambda: hub.message,
            score=hub.score,
            apart=config.explorers.evaluate,
            brought=Brought(config.brought, others=config.own_sets, folder=folder),
            sending=sending_of(
                config, hub, folder / "logs", Weights(version=version, path=Path(model))
            ),
        )
        hub.over(fleet)
        await opened.enter_async_context(fleet)
        yield Players(
            hub=hub,
            crew=_crew(config, fleet, hub, local),
            heldout=heldout,
            examined=lambda: _heldout_crew(config, fleet, hub, heldout),
            tokenizer=load_tokenizer(model) if parts is None else parts.tokenizer,
            hosts=hosts,
            fleet=fleet,
            gate=lambda: _open_gate(config.explorers, fleet, files, folder, before, is_over, say),
        )


def _crew(config: Config, fleet: Fleet, hub: FleetHub, local: AgentCrew | None) -> FleetCrew:
    return FleetCrew(
        fleet, hub, local=local, room=_room(hub, local), together=not config.rollout.replicate
    )


def _heldout_crew(config: Config, fleet: Fleet, hub: FleetHub, agent: AgentFactories) -> FleetCrew:
    """All that it plays is sampled by weights as new as those that there are now."""
    here = None if config.explorers.evaluate else hub.local
    local = None if here is None else AgentCrew(agent, here)
    version = hub.version
    return FleetCrew(
        fleet, hub, local=local, room=_room(hub, local), heldout=True, version=lambda: version
    )


def _room(hub: FleetHub, crew: AgentCrew | None) -> Callable[[], int]:
    """How many more episodes the workers here can have in hand."""
    if hub.local is None or crew is None:
        return lambda: 0
    here = hub.local
    return lambda: here.room - crew.starting


def _nobody() -> Any:
    raise AssertionError("no agent plays here: there are no workers")


async def _run(config: Config, folder: Path, files: FileServer, *, model: str, version: int) -> Run:
    local = Path(model)
    return Run(
        id=(folder / ID_FILE).read_text(),
        name=config.name,
        config=config.model_dump(mode="json"),
        where=machine.where(),
        model=model,
        model_files=await files.offer(local) if local.is_dir() else None,
        version=version,
    )


def sending_of(config: Config, hub: FleetHub, log_dir: Path, first: Weights) -> Sending | None:
    """How weights get to explorers' workers, if not as files; `first` are what these start with."""
    if config.engine.transport != "nccl":
        return None
    gpus = len(machine.gpus()[: config.trainer.ranks])
    turns = itertools.cycle(range(gpus or 1))

    async def start(explorer: str, worker: int, address: str) -> SenderProcess:
        name = re.sub(r"[^\w.-]", "_", f"{explorer}_{worker}")
        start = nccl_sender(
            next(turns),
            name=f"sender {name}",
            log_path=log_dir / f"sender_{name}.log",
            env=listening_at(address),
            address=address if config.engine.kind == "sglang" else None,
        )
        return await start()

    async def weights(version: int) -> Weights | None:
        found = hub.weights_of(version) or (first if version == first.version else None)
        there = found is not None and await asyncio.to_thread(found.path.is_dir)
        return found if there else None

    return Sending(start=start, weights=weights)


@contextlib.asynccontextmanager
async def _open_gate(
    settings: ExplorersConfig,
    fleet: Fleet,
    files: FileServer,
    folder: Path,
    before: Address | None,
    is_over: Callable[[], bool],
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """Where explorers come in; it is told in the run's folder, and is the same after a resume."""
    token = revealed(settings.token) or (before.token if before else secrets.token_urlsafe(24))
    port = settings.port or (urlsplit(before.url).port if before else 0) or 0
    tls = _tls(settings)
    gate = Gate(token, fleet.welcome, files=files, host=settings.host, port=port, tls=tls)
    try:
        url = await gate.start()
    except OSError as error:
        if settings.port or not port:
            raise ValueError(
                f"explorers.host={settings.host!r} with explorers.port={port}: {error}: name "
                f"another address of this machine, or another port"
            ) from error
        gate = Gate(token, fleet.welcome, files=files, host=settings.host, port=0, tls=tls)
        url = await gate.start()
    url = from_elsewhere(url)
    Address(url, token).write(folder)
    say(f"explorers: flash explore {folder}, or flash explore {url} --token …")
    try:
        yield
    finally:
        over = is_over()
        await fleet.close("the run is over" if over else "the run has stopped", again=not over)
        files.withdraw_all()
        await gate.close()
        if over:
            with contextlib.suppress(OSError):  # where the folder can't be written to
                Address.remove(folder)


def _tls(settings: ExplorersConfig) -> ssl.SSLContext | None:
    if settings.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"explorers.certificate={str(settings.certificate)!r} with explorers.key="
            f"{str(settings.key)!r}: {error}: both must be PEM, and of each other"
        ) from error
    return context
