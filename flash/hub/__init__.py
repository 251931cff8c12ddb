"""The InferenceHub, its workers and the pools that start them."""

from flash.hub.http_worker import HttpWorker
from flash.hub.hub import (
    HubStats,
    InferenceHub,
    Pool,
    PublishReport,
    WorkerPublish,
    WorkerStats,
)
from flash.hub.pool import EmbeddedPool
from flash.hub.worker import BadRequest, Worker, WorkerFailure

__all__ = [
    "BadRequest",
    "EmbeddedPool",
    "HttpWorker",
    "HubStats",
    "InferenceHub",
    "Pool",
    "PublishReport",
    "Worker",
    "WorkerFailure",
    "WorkerPublish",
    "WorkerStats",
]
