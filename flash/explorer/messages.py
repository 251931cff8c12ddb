"""What a controller and its explorers say to each other: data in one schema, never code.

    explorer                     controller
    Hello      who I am, what    Welcome   the run, what of that you may keep
               I hold            Refused   why not
    News       steps, ends       Begin     play this episode
    Room       what else I'd take GiveUp   of that one nothing is wanted
    Returned   not played here
    Leaving    nothing more      Settled   these are safe, or nobody wants them: forget them
    Score      what would the    Scored    this
               trainer say?      Publish   new weights
    Trouble    I can't go on     RunOver   you are not needed any more
    StartSender, SenderCall,     SenderAnswer
    EndSender  of weights over NCCL to a worker of mine

Each side sends them in frames (link.py). An explorer's connection may end at any moment; the next
one begins with Hello, which says all that the controller may not have heard.
"""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from flash.hub.reports import HubStats
from flash.hub.sender import ChunkInfo
from flash.plain import hashable, packable, plain
from flash.rollout.history import Sampled
from flash.routed import packed, unpacked
from flash.types import Experts, Observation, SampledSequence, Task, ToolUse, Trajectory

PROTOCOL = 6
# What decoding raises for bytes that are none of what is expected.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Told(Struct, frozen=True, tag=True, array_like=True):
    """The environment answered; `info` is packed, because it may hold what can't be sent."""

    text: str
    reward: float
    terminated: bool
    truncated: bool
    info: msgspec.Raw

    @classmethod
    def of(cls, observation: Observation) -> "Told":
        return cls(
            sent(observation.text),
            float(observation.reward),
            bool(observation.terminated),
            bool(observation.truncated),
            _packed(dict(observation.info)),
        )

    def observation(self) -> Observation:
        return Observation(
            text=self.text,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            info=msgspec.msgpack.decode(self.info),
        )


class Said(Struct, frozen=True, tag=True, array_like=True):
    """The policy answered."""

    step: Sampled


class Began(Struct, frozen=True, tag=True, array_like=True):
    """A worker of that version began to sample for the episode: no token of it can be older."""

    version: int


class Anew(Struct, frozen=True, tag=True, array_like=True):
    """It starts over: what was told of it until now is no part of it."""


class Ended(Struct, frozen=True, tag=True, array_like=True, kw_only=True):
    """It came to its end, or failed (`failure` is then its kind, and `words` why), or was given up.

    Its counts, the seconds that it took by stage, and what it called, by tool.
    """

    trajectory: Trajectory | None = None
    failure: str = ""
    words: str = ""
    prompt_tokens: int
    generated_tokens: int
    turns: int
    seconds: dict[str, float]
    tool_uses: dict[str, ToolUse] = {}


Step = Told | Said | Began | Anew | Ended


# ── from an explorer ─────────────────────────────────────────────────────────────────────────


class Holding(Struct, frozen=True):
    """An episode that the explorer plays, or has played: who gave it, and how many steps it has."""

    run: str
    controller: str
    episode: int
    steps: int
    ended: bool


class Hello(Struct, frozen=True, tag=True, array_like=True):
    """The first message. `process` is of each start of an explorer another, `name` is not.

    `policy`: the newest version that its workers may have, -1 for none; `given_by`: the controller
    that gave it, or that said since that it is known. `evaluates`: it plays nothing else. `brings`:
    task sets of its own, by name, each as `source_of_brought` tells it; `tasks_only`: it plays no
    others.
    """

    protocol: int
    version: str
    name: str
    process: str
    holds: list[Holding]
    where: str  # the machine, in words
    policy: int = -1
    given_by: str = ""
    evaluates: bool = False
    brings: dict[str, str] = {}
    tasks_only: bool = False


class News(Struct, frozen=True, tag=True, array_like=True):
    """What happened in an episode: its steps from number `first` on."""

    episode: int
    first: int
    steps: list[Step]


class Room(Struct, frozen=True, tag=True, array_like=True):
    """So many more episodes may come, and are sampled by that version; `begun` of the Begins on
    this connection are counted already."""

    version: int
    room: int
    begun: int


class State(Struct, frozen=True, tag=True, array_like=True):
    """How the explorer stands. `stages`: of each episode that runs what it is at."""

    doing: str
    stats: HubStats | None
    stages: dict[int, str]


class Leaving(Struct, frozen=True, tag=True, array_like=True):
    """Give me nothing more. `done`: and I hold nothing, whatever is on its way to me."""

    done: bool = False


class Returned(Struct, frozen=True, tag=True, array_like=True):
    """These are not played to their ends here."""

    episodes: list[int]


class Score(Struct, frozen=True, tag=True, array_like=True):
    """What are the trainer's logprobs of these sequences, if it has that version still?"""

    number: int
    version: int
    sequences: list[list[int]]


class Trouble(Struct, frozen=True, tag=True, array_like=True):
    """What no episode can be blamed for. `fatal`: the policy is not what it should be."""

    kind: Literal["inference", "publish", "other"]
    words: str


class StartSender(Struct, frozen=True, tag=True, array_like=True):
    """A process that sends weights to a worker of this explorer's, whose number that is; what it is
    called, no other is on this connection, with which it ends."""

    sender: int
    worker: Annotated[int, Meta(ge=0, lt=1 << 16)]


class NewGroup(Struct, frozen=True, tag=True, array_like=True):
    """The bytes by which those who are to be in a group find each other."""


class JoinGroup(Struct, frozen=True, tag=True, array_like=True):
    """The new one, of so many ranks."""

    size: Annotated[int, Meta(ge=2, le=1 << 16)]


class OpenWeights(Struct, frozen=True, tag=True, array_like=True):
    """Weights of that version in chunks, or their delta; None if they are not to be had any
    more."""

    version: int
    chunk_bytes: Annotated[int, Meta(ge=1, le=1 << 32)]
    delta: bool


class SendChunk(Struct, frozen=True, tag=True, array_like=True):
    """Of what is open."""

    chunk: Annotated[int, Meta(ge=0)]


class SenderCall(Struct, frozen=True, tag=True, array_like=True):
    """To be done by a sender, which does one thing after the other."""

    sender: int
    number: int
    call: NewGroup | JoinGroup | OpenWeights | SendChunk


class EndSender(Struct, frozen=True, tag=True, array_like=True):
    """At once, whatever it is at."""

    sender: int


OfSender = StartSender | SenderCall | EndSender
FromExplorer = Hello | News | Room | State | Leaving | Returned | Score | Trouble | OfSender


# ── from the controller ──────────────────────────────────────────────────────────────────────


class Files(Struct, frozen=True):
    """A folder of a model: at `path`, for who shares the disk and finds what `stamp` says there; or
    to be had by HTTP from the controller, under `key`; or to be made by `changes`. See files.py."""

    path: str
    stamp: str
    key: str
    changes: "Changes | None" = None


class Changes(Struct, frozen=True):
    """`files` make it of the folder whose stamp is `base`: changes.py."""

    base: str
    files: Files


class Publish(Struct, frozen=True, tag=True, array_like=True):
    """From now on sample with these weights. `probe`: compare them with the trainer."""

    version: int
    files: Files
    probe: bool


class Kept(Struct, frozen=True):
    """Of what was held: go on with that, as given by this controller, and tell its steps from
    `first` on."""

    held: Holding
    first: int


class Welcome(Struct, frozen=True, tag=True, array_like=True):
    """The run. All that is held and not kept, nobody wants any more.

    `controller` is another one after each of its starts; `config` is the run's, in plain data.
    `model` is what workers start with, at `version`; that of `published` comes after. `known`: what
    the controller that the explorer was given its weights by called later versions is something
    else than this one has or will have.
    """

    run: str
    name: str
    controller: str
    config: dict[str, Any]
    where: str
    model: str
    model_files: Files | None
    version: int
    published: int
    lease_s: float
    keeps: list[Kept]
    known: int = 0


class Refused(Struct, frozen=True, tag=True, array_like=True):
    """No; `final` says that asking again is of no use."""

    why: str
    final: bool


class Begin(Struct, frozen=True, tag=True, array_like=True):
    """Play this, from where `history` ends if you can."""

    episode: int
    task: Task
    group: int
    attempt: int
    heldout: bool
    history: list[Told | Said]


class GiveUp(Struct, frozen=True, tag=True, array_like=True):
    episode: int
    reason: str


class Settled(Struct, frozen=True, tag=True, array_like=True):
    episodes: list[int]


class Scored(Struct, frozen=True, tag=True, array_like=True):
    """None: the trainer can't say."""

    number: int
    logprobs: list[list[float]] | None
    largest_logit: float = 0.0


class SenderAnswer(Struct, frozen=True, tag=True, array_like=True):
    """What came of a SenderCall: a value, or why it failed."""

    number: int
    value: bytes | list[ChunkInfo] | None = None
    failure: str = ""


class RunOver(Struct, frozen=True, tag=True, array_like=True):
    """`again`: it may go on; `why` is told."""

    why: str
    again: bool


def controller_of(start: int) -> str:
    """A name for a start of a run's controller, of that number; no other has it."""
    return f"{start}-{uuid.uuid4().hex}"


def start_of(controller: str) -> int:
    """The start's number; 0 of nobody."""
    number, _, _ = controller.partition("-")
    return int(number) if number.isdecimal() else 0


FromController = (
    Welcome | Refused | Begin | GiveUp | Settled | Publish | Scored | SenderAnswer | RunOver
)


def _dtype(kind: Any) -> Any:
    """Of an NDArray's annotation, which is an alias of its own from numpy 2.5 on."""
    of = kind.__args__[-1]
    return getattr(of, "__args__", (of,))[0]


_ARRAYS = {
    name: _dtype(kind)
    for name, kind in get_type_hints(SampledSequence).items()
    if name not in ("experts", "role")
}


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return packed(value) if value.ndim > 1 else value.tobytes()
    raise NotImplementedError(type(value))


def _unpack(kind: Any, value: Any) -> Any:
    if getattr(kind, "__origin__", None) in (np.ndarray, NDArray):
        dtype = _dtype(kind)
        return unpacked(value) if dtype is _dtype(Experts) else np.frombuffer(value, dtype)
    return hashable(value)


def exact(trajectory: Trajectory) -> Trajectory:
    """As the schema has it: an agent may have given numbers and arrays of other kinds."""
    return Trajectory(
        sequences=[
            SampledSequence(
                **{name: np.asarray(getattr(each, name), kind) for name, kind in _ARRAYS.items()},
                experts=each.experts,
                role=each.role,
            )
            for each in trajectory.sequences
        ],
        reward=float(trajectory.reward),
        turns=int(trajectory.turns),
        success=bool(trajectory.success),
        turn_rewards=[float(reward) for reward in trajectory.turn_rewards],
        turn_states=[packable(state) for state in trajectory.turn_states],
        role_rewards={str(role): float(r) for role, r in trajectory.role_rewards.items()},
    )


def sent(text: str) -> str:
    """Half a surrogate pair is no text elsewhere."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _packed(info: dict[str, Any]) -> msgspec.Raw:
    try:
        return msgspec.Raw(msgspec.msgpack.encode(info))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return msgspec.Raw(msgspec.msgpack.encode(plain(info)))


encoder = msgspec.msgpack.Encoder(enc_hook=_pack)


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Of messages of that kind; one of UNREADABLE for what is none."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_unpack)


def history_of(steps: Sequence[Step]) -> list[Observation | Sampled]:
    """What was observed and said since the episode began, or began anew."""
    history: list[Observation | Sampled] = []
    for step in steps:
        match step:
            case Told():
                history.append(step.observation())
            case Said():
                history.append(step.step)
            case Anew():
                history.clear()
    return history
