"""A run that is killed at moments that a seed draws, and resumed until it is done."""

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sqlalchemy.exc import DBAPIError

from tests.crash.account import Books, Snapshot, compare, kept_turns, violations, weights
from tests.crash.plans import Plan
from tests.crash.victims import descendants, victims

ROOT = Path(__file__).parents[2]
COMMIT_PLACES = ("first", "midway", "last", "after", "wal")
# What a kill ends with the run, and what the run has to survive.
ENDS_RUN = ("controller", "commit", "stop")
CHILDREN = ("rank", "worker", "host", "reward")

_START_S = 180.0  # on a busy machine, until the first step
_END_S = 300.0
_GRACE_S = 30.0
_LOOK_S = 0.005  # between two looks at a file that nobody tells of


class Failed(AssertionError):
    """The run did not go on, or ended as it must not."""


class Database(Protocol):
    """PostgreSQL, which may be killed."""

    url: str

    def kill(self) -> None: ...

    def start(self) -> None: ...


@dataclass(slots=True)
class Kill:
    """One, with what was committed then."""

    role: str
    moment: str
    step: int
    before: Snapshot | None = None
    resumed: bool = False


@dataclass(slots=True)
class Result:
    kills: list[Kill] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)  # of which role's kill, and what
    doubled: list[tuple[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    compared: int = 0  # versions whose weights several starts had
    unequal: list[str] = field(default_factory=list)
    turns: int = 0  # in episodes that were cut off
    turns_kept: int = 0
    begins_s: list[float] = field(default_factory=list)  # until the first weights are there
    resumes_s: list[float] = field(default_factory=list)  # likewise, redo and all

    @property
    def held(self) -> bool:
        return not (self.lost or self.doubled or self.broken or self.unequal)


class KilledRun:
    """One run, from its first start to its end.

    Args:
        folder: for its runs_dir, and for what the harness keeps.
        say: is told each kill.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        *,
        roles: Iterator[str],
        database: Database | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._roles = roles
        self._database = database
        self._say = say
        self._random = random.Random(f"kills of {plan.seed}")
        self._run = folder / "run"
        self._weights = folder / "weights.jsonl"
        self._switch = folder / "die"
        self._starts = 0
        self._started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._steps = plan.first_steps
        self._resumes = False
        self._began_at = time.monotonic()
        self.result = Result()
        folder.mkdir(parents=True, exist_ok=True)
        self._weights.touch()

    def play(self, kills: int) -> Result:
        """So many kills at most; then the run goes on to its end, and is looked at."""
        try:
            self._start()
            for role in self._roles:
                if len(self.result.kills) >= kills or not self._kill(role):
                    break
            self._finish()
        finally:
            self._end_process()
        self._judge()
        return self.result

    # ── starts and ends ──────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        self._starts += 1
        self._switch.unlink(missing_ok=True)
        settings = {"runs_dir": self._folder, "name": "run", **self._plan.settings}
        settings["steps"] = self._steps
        if self._database is not None:
            settings["log.url"] = "$CRASH_LOG"
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self._resumes = resume = (self._run / "log.id").exists()
        if not resume and self._run.exists():
            shutil.rmtree(self._run)  # killed before there was anything
        with (self._folder / f"start_{self._starts}.txt").open("wb") as output:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.crash.observed", "train", "frozen_lake"),
                    *words,
                    *(["--resume"] if resume else []),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "CRASH_WEIGHTS": str(self._weights),
                    "CRASH_START": str(self._starts),
                    "CRASH_COMMIT": str(self._switch),
                    "CRASH_LOG": self._database.url if self._database else "",
                },
            )
        self._started_at = time.monotonic()

    @property
    def _controller(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def _code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def _finish(self) -> None:
        if not self._until(lambda: False, _END_S) and self._code is None:
            raise Failed(f"the run is not done after {_END_S:.0f} s: {self._output()}")
        while self._code != 0:
            self._expect_failure_of_a_rank()
            self._start()
            self._until(lambda: False, _END_S)
        self._settle()
        if self._steps < self._plan.settings["steps"]:
            self._say(f"seed {self._plan.seed}: done, and goes on with more steps")
            self._steps = self._plan.settings["steps"]
            self._start()
            self._finish()

    def _end_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _output(self) -> str:
        text = (self._folder / f"start_{self._starts}.txt").read_text(errors="replace")
        return text[-2000:]

    # ── moments ──────────────────────────────────────────────────────────────────────────────

    def _until(self, there: Callable[[], bool], within_s: float) -> bool:
        """Whether it came to be so, before the run ended; looked at again and again."""
        if self._code is not None:
            return False
        deadline = time.monotonic() + within_s
        descriptor = os.pidfd_open(self._controller)
        try:
            while not there():
                if self._code is not None or time.monotonic() > deadline:
                    return False
                select.select([descriptor], [], [], _LOOK_S)
        finally:
            os.close(descriptor)
        return True

    def _pass(self, seconds: float) -> bool:
        """Lets the run go on for so long, a part of a moment that is drawn; whether it did."""
        passed_at = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= passed_at, seconds + 60)

    def _step(self) -> int:
        """The last step that has its line; the first line is of step 0."""
        with contextlib.suppress(OSError):
            return (self._run / "metrics.jsonl").read_bytes().count(b"\n") - 1
        return -1

    def _steps_later(self) -> bool:
        """Some steps from now, and at any time of a step; whether the run came to it."""
        wanted = self._step() + self._random.randint(1, 3)
        wanted = min(wanted, self._steps - 1)
        if not self._comes(self._began):
            return False
        self._measure()
        if not self._comes(lambda: self._step() >= wanted):
            return False
        self._settle()
        return self._pass(self._random.uniform(0, 0.3)) or self._gone()

    def _moment(self, *, early: bool) -> tuple[str, bool]:
        """Lets the run go on to a moment that is drawn: which, and whether it came to it."""
        drawn = self._random.random()
        if early and drawn < 0.3 and not self._began():
            alive = self._pass(self._random.uniform(0.3, 12.0))
            return ("in a step" if self._began() else "while starting"), alive
        alive = self._steps_later()
        if alive and early and drawn < 0.5:
            before = _written(self._weights)
            return "at a publish", self._comes(lambda: _written(self._weights) != before)
        if alive and early and drawn < 0.6 and self._plan.settings["checkpoint.every"]:
            folder = self._run / "checkpoints"
            return "at a checkpoint", self._comes(lambda: any(folder.glob("*.new")))
        return "in a step", alive

    def _comes(self, there: Callable[[], bool]) -> bool:
        return self._until(there, _START_S) or self._gone()

    def _began(self) -> bool:
        return f'"start": {self._starts},' in self._weights.read_text()

    def _gone(self) -> bool:
        if self._code is None:
            raise Failed(f"nothing moved for {_START_S:.0f} s: {self._output()}")
        return False

    def _settle(self) -> None:
        """The kills before were survived, if a step came since."""
        for kill in self.result.kills:
            if not kill.resumed and (self._step() > kill.step or self._code == 0):
                kill.resumed = True

    # ── kills ────────────────────────────────────────────────────────────────────────────────

    def _kill(self, role: str) -> bool:
        """Kills once; whether the run is not done."""
        if role == "postgres" and self._database is None:
            return True
        moment, alive = self._moment(early=role in ENDS_RUN)
        if not alive:
            if self._code == 0:
                return False
            self._expect_failure_of_a_rank()
            self._start()
            return self._kill(role)
        kill = Kill(role, moment, self._step())
        family = descendants(self._controller)
        if role in ENDS_RUN:
            if not self._end_by(kill, family):
                return False
            self._note(kill)
            kill.before = self._snapshot()
            self._damage()
            self._start()  # at once, while the children of the dead one may still be there
            self._expect_ended(family)
        elif role == "postgres":
            assert self._database is not None
            self._database.kill()
            self._note(kill)
            self._pass(self._random.uniform(0, 2.0))
            self._database.start()
            kill.before = self._snapshot()
        else:
            guards = self._random.random() < 0.2
            found = victims(self._controller, role, guards=guards)
            if not found:
                return True
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(found), signal.SIGKILL)
            self._note(kill)
            kill.before = self._snapshot()
        return True

    def _note(self, kill: Kill) -> None:
        self.result.kills.append(kill)
        self._say(
            f"seed {self._plan.seed}: {kill.role} {kill.moment}, after step {kill.step}, "
            f"{time.monotonic() - self._began_at:.0f} s"
        )

    def _end_by(self, kill: Kill, family: list[int]) -> bool:
        """Ends the controller; whether it did not come to its end before."""
        assert self._process is not None
        if kill.role == "controller":
            if family and self._random.random() < 0.2:  # and another with it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._random.choice(family), signal.SIGKILL)
            self._process.kill()
        elif kill.role == "stop":
            self._process.send_signal(signal.SIGINT)
        else:
            place = self._random.choice(COMMIT_PLACES[: 4 if self._database else 5])
            kill.moment += f", {place}"
            if place == "wal":
                wal = self._run / "log.sqlite-wal"
                before = _written(wal)
                self._until(lambda: _written(wal) != before, _START_S)
                self._process.kill()
            else:
                self._switch.write_text(place)
        self._process.wait(_START_S)
        if kill.role == "commit" and self._code == 0 and kill.step + 1 < self._steps:
            raise Failed("the run came to its end, and none of its commits died")
        return self._code != 0 or (kill.role == "stop" and not self._is_done())

    def _is_done(self) -> bool:
        return self._step() == self._steps and (self._run / "summary.json").exists()

    def _damage(self) -> None:
        """Now and then the newest checkpoint is not whole: the run goes on from one before, or
        from its log alone."""
        paths = sorted((self._run / "checkpoints").glob("step_??????"))
        if paths and self._random.random() < 0.3:
            (paths[-1] / "policy/.metadata").write_bytes(b"")
            self._say(f"seed {self._plan.seed}: {paths[-1].name} is damaged")

    def _expect_ended(self, family: list[int]) -> None:
        deadline = time.monotonic() + _GRACE_S
        while left := [pid for pid in family if _alive(pid)]:
            if time.monotonic() > deadline:
                raise Failed(f"these processes outlive their controller: {left}")
            time.sleep(_LOOK_S)

    def _expect_failure_of_a_rank(self) -> None:
        """A run ends with another code than 0 for a killed rank alone."""
        last = next((kill for kill in reversed(self.result.kills) if not kill.resumed), None)
        if last is None or last.role != "rank":
            raise Failed(f"the run ended with code {self._code}: {self._output()}")

    def _measure(self) -> None:
        """How long the start took."""
        if self._started_at:
            times = self.result.resumes_s if self._resumes else self.result.begins_s
            times.append(time.monotonic() - self._started_at)
            self._started_at = 0.0

    def _snapshot(self) -> Snapshot | None:
        if not (self._run / "log.id").exists():
            return None
        with contextlib.suppress(DBAPIError):  # there are no tables yet
            return Books(self._url, self._run, live=self._code is None).snapshot()
        return None

    @property
    def _url(self) -> str:
        return self._database.url if self._database else ""

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    def _judge(self) -> None:
        result = self.result
        books = Books(self._url, self._run)
        for kill in self.result.kills:
            if kill.before is not None:
                account = compare(kill.before, books)
                result.lost += [(kill.role, what) for what in account.lost]
        roles = Counter(kill.role for kill in result.kills)
        role = roles.most_common(1)[0][0] if roles else ""
        for what in violations(books, self._run, self._plan.settings):
            if what.startswith("lost: "):
                result.lost.append((role, what.removeprefix("lost: ")))
            elif what.startswith("doubled: "):
                result.doubled.append((role, what.removeprefix("doubled: ")))
            else:
                result.broken.append(what)
        result.turns, result.turns_kept = kept_turns(books)
        result.compared, result.unequal = weights(self._weights)


def _written(path: Path) -> int:
    """When last; SQLite writes into the same file again, so that its length tells nothing."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def cycle(roles: tuple[str, ...], random_: random.Random) -> Iterator[str]:
    """Each role as often as the others, in an order that is drawn."""
    while True:
        yield from random_.sample(roles, len(roles))
