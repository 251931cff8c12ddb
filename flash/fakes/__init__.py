"""Fakes for tests and examples: workers, environments and a prompt style that only keep time,
and an observer and a log that keep what they hear.

They run on the event loop's clock, so under virtual time a test of hours takes milliseconds. Each
is seeded: the same seed does the same. `fake_sample` makes what a trainer trains on.
"""

from flash.fakes.batch_log import FakeBatchLog
from flash.fakes.crew import FakeCrew
from flash.fakes.environments import FakeEnvs, FakeStyle
from flash.fakes.observer import KeepingObserver
from flash.fakes.ranks import FakeHostNode, FakeRank, FakeRanks, FakeRanksNode
from flash.fakes.routes import worker_app
from flash.fakes.samples import fake_sample
from flash.fakes.sglang import FakeSglang
from flash.fakes.wires import FakeWires
from flash.fakes.worker import FakePool, FakeWorker

__all__ = [
    "FakeBatchLog",
    "FakeCrew",
    "FakeEnvs",
    "FakeHostNode",
    "FakePool",
    "FakeRank",
    "FakeRanks",
    "FakeRanksNode",
    "FakeSglang",
    "FakeStyle",
    "FakeWires",
    "FakeWorker",
    "KeepingObserver",
    "fake_sample",
    "worker_app",
]
