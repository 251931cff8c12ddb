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
from flash.hub.pool import EmbeddedPool, ProcessPool
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import BadRequest, Worker, WorkerBroken, WorkerFailure

__all__ = [
    "BadRequest",
    "EmbeddedPool",
    "HttpWorker",
    "HubStats",
    "InferenceHub",
    "Pool",
    "ProcessPool",
    "PublishReport",
    "VllmPool",
    "Worker",
    "WorkerBroken",
    "WorkerFailure",
    "WorkerPublish",
    "WorkerStats",
]
