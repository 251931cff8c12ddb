"""What an expert wrote, in the log: once each, and the batches that imitated it as they were."""

import asyncio

import numpy as np
import pytest

from flash.config import load
from flash.log.log import Log
from flash.log.past import take_over
from flash.log.reading import Reader
from flash.log.schema import EXPERT
from flash.types import Batch, ExpertSequence, ExpertShare

CONFIG = load("frozen_lake")


def sequence(*token_ids: int, source: str = "e.jsonl:1") -> ExpertSequence:
    mask = np.linspace(0, 1, len(token_ids), dtype=np.float32)
    return ExpertSequence(token_ids=np.array(token_ids), loss_mask=mask, source=source)


FIRST, SECOND = sequence(1, 2, 3), sequence(4, 5, source="e.jsonl:2")
MASKED = ExpertSequence(
    token_ids=FIRST.token_ids, loss_mask=np.ones(3, np.float32), source="other.jsonl:1"
)


def batch(version, *imitated, weight=0.1, last=True):
    share = ExpertShare(sequences=imitated, weight=weight)
    return Batch(samples=[], version=version, last=last, expert=share)


def write(store, past, *batches):
    async def writing():
        async with Log(
            lambda changes: asyncio.to_thread(store.commit, changes), start=past.start,
            known_version=past.logged_version, known_expert=past.known_expert,
            now=lambda: 0.0, max_lag_s=10, timeout_s=60,
        ) as log:  # fmt: skip
            for one in batches:
                log.handed_over(one)
            await log.committed()

    asyncio.run(writing())


def read(store, version):
    with store.transaction() as connection:
        return Reader(connection, store.run).batch(version)


def told(share):
    arrays = [(s.token_ids, s.loss_mask) for s in share.sequences]
    sequences = [(a.dtype.str, a.tolist(), b.dtype.str, b.tolist()) for a, b in arrays]
    return share.weight, sequences, [s.source for s in share.sequences]


def test_a_batch_comes_back_with_what_it_imitated_and_each_is_written_once(store):
    past = take_over(store, checkpoint=None, config=CONFIG)
    given = [
        batch(0, FIRST, SECOND, FIRST, weight=1 / 3),
        Batch(samples=[], version=1),
        Batch(samples=[], version=2, last=False),
        batch(2, SECOND, MASKED),
        batch(3, weight=0.0),
    ]
    write(store, past, *given)
    found = [part for version in range(4) for part in read(store, version)]
    assert [part.expert and told(part.expert) for part in found] == [
        part.expert and told(part.expert) for part in given
    ]
    with store.transaction() as connection:
        assert len(connection.execute(EXPERT.select()).all()) == 3


def test_a_run_that_goes_on_imitates_what_was_imitated_before_and_more(store, tmp_path):
    write(store, take_over(store, checkpoint=None, config=CONFIG), batch(0, FIRST))
    past = take_over(store, checkpoint=0, config=CONFIG)
    (left,) = past.restored.batches
    assert told(left.expert) == told(batch(0, FIRST).expert)
    # What another file has at the same place is another sequence.
    write(store, past, batch(1, FIRST, sequence(7, 8)))
    assert told(read(store, 1)[0].expert) == told(batch(1, FIRST, sequence(7, 8)).expert)


def test_a_batch_whose_experts_are_gone_from_the_log_is_not_redone(store, caplog):
    past = take_over(store, checkpoint=None, config=CONFIG)
    write(store, past, batch(0, FIRST), batch(1, FIRST, SECOND))
    with store.transaction() as connection:
        connection.execute(EXPERT.delete().where(EXPERT.c.source == "e.jsonl:2"))
    past = take_over(store, checkpoint=0, config=CONFIG)
    assert past.logged_version == 1
    assert "the samples of version 1 no longer" in caplog.text
    # Version 1 is made anew, with another share: nothing of the old one is left.
    write(store, past, batch(1, SECOND))
    assert told(read(store, 1)[0].expert) == told(batch(1, SECOND).expert)


def test_a_sequence_that_differs_in_a_token_or_in_what_one_counts_is_another(store):
    past = take_over(store, checkpoint=None, config=CONFIG)
    write(store, past, batch(0, FIRST, MASKED, sequence(1, 2, 4)))
    shares = told(read(store, 0)[0].expert)[1]
    assert len({str(one) for one in shares}) == 3


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.30000000000000004])
def test_a_weight_comes_back_to_the_last_bit(store, weight):
    write(store, take_over(store, checkpoint=None, config=CONFIG), batch(0, FIRST, weight=weight))
    assert read(store, 0)[0].expert.weight == weight
