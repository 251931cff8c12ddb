"""The lines of episodes.jsonl: what is in them, and that nobody waits for the disk."""

import dataclasses
import errno
import io
import json
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.plain import plain
from flash.rollout.record import EpisodeRecord
from flash.telemetry.episode_lines import EpisodeLines


def record(number=0, **changes):
    return EpisodeRecord(
        **{
            "episode": number, "seed": 7, "group": 3, "attempt": 1, "outcome": "trained",
            "reason": "", "reward": 1.0, "success": True, "turns": 3, "prompt_tokens": 30,
            "generated_tokens": 9, "version_min": 0, "version_max": None, "trained_at_version": 1,
            "admitted_s": 0.0, "ended_s": 1.5, "stages_s": {"env": 0.1}, **changes,
        }
    )  # fmt: skip


class Kept(io.StringIO):
    """A file whose text is known after it is closed."""

    text = ""

    def close(self):
        if not self.closed:
            self.text = self.getvalue()
        super().close()


rewards = (
    st.floats() | st.none() | st.floats(width=32).map(np.float32) | st.floats().map(np.float64)
)
texts = st.text(st.characters(codec=None), max_size=5) | st.sampled_from(["\ud800", "schön"])


@given(
    st.lists(
        st.builds(
            record,
            number=st.integers(0, 2**70),
            reward=rewards,
            success=st.booleans() | st.booleans().map(np.bool_),
            reason=texts,
            stages_s=st.dictionaries(texts, st.floats() | st.just(math.inf), max_size=3),
        ),
        max_size=5,
    )
)
def test_a_line_says_what_the_record_says(records):
    with EpisodeLines(file := Kept()) as lines:
        for one in records:
            lines.add(one)
    found = [json.loads(line) for line in file.text.split("\n")[:-1]]
    assert found == [json.loads(json.dumps(plain(dataclasses.asdict(one)))) for one in records]
    assert [list(line) for line in found] == [
        [f.name for f in dataclasses.fields(EpisodeRecord)]
    ] * len(records)


def test_nobody_waits_for_a_disk_that_hangs_and_all_is_written_in_its_order():
    hangs, goes_on = threading.Event(), threading.Event()

    class Hangs(Kept):
        def write(self, text):
            hangs.set()
            assert goes_on.wait(30)
            return super().write(text)

    with EpisodeLines(file := Hangs()) as lines:
        lines.add(record(0))
        assert hangs.wait(30), "without being asked"
        for number in range(1, 100):
            lines.add(record(number))
        goes_on.set()
        lines.flush()
        flushed = file.getvalue()
        lines.add(record(100))
    assert [json.loads(line)["episode"] for line in flushed.splitlines()] == [*range(100)]
    assert [json.loads(line)["episode"] for line in file.text.splitlines()] == [*range(101)]


def test_what_can_not_be_written_is_raised_where_more_is_to_be_and_at_the_end():
    class Full(Kept):
        def write(self, text):
            if text:
                raise OSError(errno.ENOSPC, "no space left")
            return 0

    def fills():
        with EpisodeLines(Full()) as lines:
            lines.add(record(0))

    with pytest.raises(OSError, match="no space left"):
        fills()

    def goes_on():
        with EpisodeLines(Full()) as lines:
            lines.add(record(0))
            with pytest.raises(OSError, match="no space left"):
                lines.flush()
            with pytest.raises(OSError, match="no space left"):
                lines.add(record(1))
            raise ValueError("the run's own")

    with pytest.raises(OSError, match="no space left") as caught:
        goes_on()
    assert "the run's own" in str(caught.value.__context__)
