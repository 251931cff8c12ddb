"""The tables of the log; docs/durability.md says what is in each column.

A database may hold several runs, so every table but the first begins with `run`. Times are
seconds since 1970, UTC. Names and columns change by a migration only (`migrations/`).
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
)

from flash.log.columns import Array, Experts, Json, States, Words

METADATA = MetaData()


def _of_run(name: str, *columns: Column[object] | Index) -> Table:
    run = Column("run", Integer, primary_key=True, autoincrement=False)
    return Table(name, METADATA, run, *columns)


def _key(name: str) -> Column[object]:
    return Column(name, BigInteger, primary_key=True, autoincrement=False)


def _arrays() -> list[Column[object]]:
    """What a sampled token has; see `flash.types.SampledSequence`."""
    return [
        Column("token_ids", Array("<i4"), nullable=False),
        Column("logprobs", Array("<f4"), nullable=False),
        Column("versions", Array("<i4"), nullable=False),
        Column("experts", Experts),
    ]


RUNS = Table(
    "runs",
    METADATA,
    Column("run", Integer, primary_key=True),
    Column("uuid", String(32), nullable=False, unique=True),
    Column("name", Words, nullable=False),
    Column("owner", String(32), nullable=False),  # the start that writes
    Column("commits", BigInteger, nullable=False),
)
STARTS = _of_run(
    "starts",
    _key("start"),
    Column("at", Float(53), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("config", Json, nullable=False),
    Column("source", Json, nullable=False),
    Column("flash", String(40), nullable=False),
)
GROUPS = _of_run(
    "groups",
    _key("group"),
    Column("start", Integer, nullable=False),
    Column("task_set", Words, nullable=False, server_default=""),
    Column("seed", BigInteger, nullable=False),
    Column("options", Json, nullable=False),
    Column("begun_at", Float(53), nullable=False),
    Column("ended_at", Float(53)),
    Column("outcome", String(20)),
    Column("reason", Words),
    Index("open_groups", "run", "outcome"),
)
EPISODES = _of_run(
    "episodes",
    _key("episode"),
    Column("group", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("continues", BigInteger),  # an episode that was cut off
    Column("task_set", Words, nullable=False, server_default=""),
    Column("seed", BigInteger, nullable=False),
    Column("admitted_at", Float(53), nullable=False),
    Column("played_at", Float(53)),
    Column("ended_at", Float(53)),
    Column("outcome", String(20)),
    Column("reason", Words),
    Column("reward", Float(53)),
    Column("success", Boolean),
    Column("turns", Integer),
    Column("prompt_tokens", BigInteger),
    Column("generated_tokens", BigInteger),
    Column("version_min", BigInteger),
    Column("version_max", BigInteger),
    Column("trained_at_version", BigInteger),
    Column("stages_s", Json),
    Column("turn_rewards", Json),
    Column("turn_states", States),
    Column("role_rewards", Json),
    Index("episodes_of_group", "run", "group"),
    Index("episodes_by_outcome", "run", "outcome", "reason"),
)
OBSERVATIONS = _of_run(
    "observations",
    _key("episode"),
    _key("step"),
    Column("at", Float(53), nullable=False),
    Column("text", Words, nullable=False),
    Column("reward", Float(53), nullable=False),
    Column("terminated", Boolean, nullable=False),
    Column("truncated", Boolean, nullable=False),
    Column("info", Json, nullable=False),
)
COMPLETIONS = _of_run(
    "completions",
    _key("episode"),
    _key("step"),
    Column("at", Float(53), nullable=False),
    Column("prompt_sum", BigInteger, nullable=False),
    *_arrays(),
    Column("temperature", Float(53), nullable=False),
    Column("finish_reason", String(20), nullable=False),
    Column("worker", Words, nullable=False),
)
SEQUENCES = _of_run(
    "sequences",
    _key("episode"),
    _key("number"),
    Column("tokens", Integer, nullable=False),
    Column("sampled", Integer, nullable=False),
    *_arrays(),
    Column("loss_mask", Array("<f4"), nullable=False),
    Column("temperatures", Array("<f4"), nullable=False),
    Column("turns", Array("<i4"), nullable=False),
    Column("role", Words, nullable=False, server_default=""),
)
BATCHES = _of_run(
    "batches",
    _key("version"),
    _key("part"),
    Column("start", Integer, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("last", Boolean, nullable=False),
    Column("metrics", Json, nullable=False),
    Column("expert_weight", Float(53)),
)
SAMPLES = _of_run(
    "samples",
    _key("version"),
    _key("part"),
    _key("position"),
    Column("episode", BigInteger, nullable=False),
    Column("number", Integer, nullable=False),
    Column("group", BigInteger, nullable=False),
    Column("advantage", Array("<f8"), nullable=False),
    Column("reward", Float(53), nullable=False),
)
EXPERT = _of_run(
    "expert",
    Column("digest", String(32), primary_key=True),
    Column("source", Words, nullable=False),
    Column("token_ids", Array("<i4"), nullable=False),
    Column("loss_mask", Array("<f4"), nullable=False),
)
EXPERT_SAMPLES = _of_run(
    "expert_samples",
    _key("version"),
    _key("part"),
    _key("position"),
    Column("digest", String(32), nullable=False),
)
PUBLISHES = _of_run(
    "publishes",
    _key("number"),
    Column("version", BigInteger, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("report", Json, nullable=False),
)
EVALUATIONS = _of_run(
    "evaluations",
    _key("number"),
    Column("version", BigInteger),
    Column("at", Float(53), nullable=False),
    Column("metrics", Json, nullable=False),
)
STEPS = _of_run(
    "steps",
    _key("step"),
    Column("start", Integer, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("metrics", Json),
    Column("alpha", Json),
)
CHECKPOINTS = _of_run(
    "checkpoints",
    _key("number"),
    Column("version", BigInteger, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("path", Words, nullable=False),
)
