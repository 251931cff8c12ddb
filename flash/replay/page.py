"""An episode turn by turn: to be read in a terminal, or as plain data."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from flash.replay.episodes import LoggedEpisode, LoggedTurn
from flash.replay.text import Decoder
from flash.telemetry.transcripts import printable

GONE = "what was read and said is no longer in the log (log.keep)"
Colour = Literal["logprob", "version"]

_LIKELY_TO_UNLIKELY = ((0.9, "green"), (0.5, "yellow"), (0.1, "dark_orange"), (0.0, "bold red"))
_OF_VERSIONS = ("cyan", "magenta", "green", "yellow", "blue", "red")  # and from the first again


def print_page(
    episode: LoggedEpisode, decode: Decoder, *, colour: Colour, console: Console
) -> None:
    """Prints it; tokens in colour where the console has any."""
    for line in _lines(episode, decode, colour):
        console.print(line, soft_wrap=True, highlight=False)


def legend(colour: Colour) -> Text:
    """What the colours say."""
    if colour == "version":
        return Text("a colour for each version, in turn: ") + Text(" ").join(
            Text(f"{number}, {number + len(_OF_VERSIONS)}, …", style)
            for number, style in enumerate(_OF_VERSIONS)
        )
    return Text("probability of a token: ") + Text(" ").join(
        Text(f"≥ {least:g}" if least else f"< {_LIKELY_TO_UNLIKELY[-2][0]:g}", style)
        for least, style in _LIKELY_TO_UNLIKELY
    )


def as_data(episode: LoggedEpisode, decode: Decoder) -> dict[str, Any]:
    """The same as plain data. A turn's `observation` is the place of what answered to it, among
    `observations`; `read` is null where the log has no tokens of it; `gone`: it has nothing of
    the episode any more but how it ended."""
    return {
        "episode": episode.episode,
        "group": episode.group,
        "attempt": episode.attempt,
        "start": episode.start,
        "continues": episode.continues,
        "task_set": episode.task.task_set,
        "seed": episode.task.seed,
        "options": episode.task.options,
        "outcome": episode.outcome,
        "reason": episode.reason,
        "reward": episode.reward,
        "success": episode.success,
        "role_rewards": dict(episode.role_rewards),
        "admitted_at": episode.admitted_at,
        "played_at": episode.played_at,
        "ended_at": episode.ended_at,
        "stages_s": episode.stages_s,
        "prompt_tokens": episode.prompt_tokens,
        "generated_tokens": episode.generated_tokens,
        "version_min": episode.version_min,
        "version_max": episode.version_max,
        "trained_at_version": episode.trained_at_version,
        "gone": episode.is_gone,
        "turns": [
            {
                "role": turn.spoken.role,
                "read": decode(turn.spoken.read) if turn.spoken.read else None,
                "said": decode(turn.spoken.said),
                "token_ids": turn.spoken.said,
                "logprobs": turn.spoken.logprobs,
                "versions": turn.spoken.versions,
                "reward": turn.reward,
                "took_s": episode.took_s(turn),
                "observation": turn.after,
            }
            for turn in episode.turns
        ],
        "observations": [
            {
                "at": seen.at,
                "text": seen.observation.text,
                "reward": seen.observation.reward,
                "terminated": seen.observation.terminated,
                "truncated": seen.observation.truncated,
                "info": seen.observation.info,
            }
            for seen in episode.seen
        ],
    }


# ── what is printed ──────────────────────────────────────────────────────────────────────────


def _lines(episode: LoggedEpisode, decode: Decoder, colour: Colour) -> Iterator[Text]:
    yield from _head(episode)
    if episode.is_gone:
        yield Text(GONE)
    told: set[int] = set()
    for number, turn in enumerate(episode.turns, start=1):
        who = f"{turn.spoken.role} " if turn.spoken.role else ""
        if turn.spoken.read:
            yield _rule(f"turn {number}, {who}read {_count(len(turn.spoken.read), 'token')}")
            yield Text(printable(decode(turn.spoken.read)))
        elif turn.before is not None and turn.before not in told:
            yield from _observed(episode, turn.before, "observed")
            told.add(turn.before)
        yield _rule(f"turn {number}, {who}said {_about_said(episode, turn)}")
        yield _coloured(turn, decode, colour)
        if turn.after is not None:
            yield from _observed(episode, turn.after, f"turn {number}, observed")
            told.add(turn.after)
    if told:
        return
    # Those of no turn: there is none yet, or an agent of the user's own tells them in its own way.
    for place in range(len(episode.seen)):
        yield from _observed(episode, place, "observed")


def _head(episode: LoggedEpisode) -> Iterator[Text]:
    options = f", options {episode.task.options}" if episode.task.options else ""
    reward = "" if episode.reward is None else f", reward {episode.reward:g}"
    roles = "".join(f", {role} {worth:g}" for role, worth in episode.role_rewards.items())
    success = ", success" if episode.success else ""
    yield _rule(
        f"episode {episode.episode} of group {episode.group}, attempt {episode.attempt}, "
        f"{episode.task}{options}: {_outcome(episode)}{reward}{roles}{success}",
        mark="═══",
    )
    about = []
    if episode.continues is not None:
        about.append(f"goes on from episode {episode.continues}")
    if episode.version_min is not None:
        about.append(_versions(episode.version_min, episode.version_max or episode.version_min))
    if episode.generated_tokens is not None:
        about.append(f"{_count(episode.generated_tokens, 'token')} sampled")
    if episode.prompt_tokens is not None:
        about.append(f"{_count(episode.prompt_tokens, 'token')} of prompts")
    if about:
        yield Text(", ".join(about))
    began = datetime.fromtimestamp(episode.admitted_at, UTC)
    times = [f"admitted {began:%Y-%m-%d %H:%M:%S} UTC"]
    times += [
        f"{what} after {at - episode.admitted_at:.2f} s"
        for what, at in (("played", episode.played_at), ("ended", episode.ended_at))
        if at is not None
    ]
    yield Text(", ".join(times))
    if episode.stages_s:
        yield Text(", ".join(f"{stage} {s:.2f} s" for stage, s in episode.stages_s.items()))


def _outcome(episode: LoggedEpisode) -> str:
    if episode.trained_at_version is not None:
        return f"trained in step {episode.trained_at_version + 1}"
    if episode.outcome:
        return f"{episode.outcome} ({episode.reason})" if episode.reason else episode.outcome
    return "running" if episode.played_at is None else "ready"


def _about_said(episode: LoggedEpisode, turn: LoggedTurn) -> str:
    spoken = turn.spoken
    about = [_count(len(spoken.said), "token")]
    if spoken.versions:
        about.append(_versions(min(spoken.versions), max(spoken.versions)))
    if spoken.logprobs:
        about.append(f"logprob {math.fsum(spoken.logprobs) / len(spoken.logprobs):.3f} a token")
    if (took_s := episode.took_s(turn)) is not None:
        about.append(f"{took_s:.2f} s")
    if turn.reward is not None:
        about.append(f"reward {turn.reward:g}")
    return ", ".join(about)


def _observed(episode: LoggedEpisode, place: int, what: str) -> Iterator[Text]:
    seen = episode.seen[place]
    observation = seen.observation
    ended = ", terminated" if observation.terminated else ""
    ended += ", truncated" if observation.truncated else ""
    reward = f", reward {observation.reward:g}" if observation.reward else ""
    yield _rule(f"{what} after {seen.at - episode.admitted_at:.2f} s{reward}{ended}")
    yield Text(printable(observation.text))


def _coloured(turn: LoggedTurn, decode: Decoder, colour: Colour) -> Text:
    spoken = turn.spoken
    text = Text()
    styles = [_of_logprob(logprob) for logprob in spoken.logprobs]
    if colour == "version":
        styles = [_OF_VERSIONS[v % len(_OF_VERSIONS)] for v in spoken.versions]
    for piece, style in zip(decode.pieces(spoken.said), styles, strict=True):
        text.append(printable(piece), style)
    return text


def _of_logprob(logprob: float) -> str:
    probability = math.exp(min(0.0, logprob))
    return next(style for least, style in _LIKELY_TO_UNLIKELY if probability >= least)


def _rule(text: str, mark: str = "───") -> Text:
    return Text(f"{mark} {text}", "bold" if mark == "═══" else "dim")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _versions(first: int, last: int) -> str:
    return f"version {first}" if first == last else f"versions {first} to {last}"
