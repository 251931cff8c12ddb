"""The InferenceHub, its workers and the pools that start them."""

from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.pool import EmbeddedPool, ProcessPool
from flash.hub.reports import HubStats, PublishReport, WorkerPublish, WorkerStats
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import BadRequest, Pool, Worker, WorkerBroken, WorkerFailure

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
