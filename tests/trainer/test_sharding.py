"""How a model is divided among ranks, of which this process is the first; no other is there."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from flash.trainer.config import TrainerConfig
from flash.trainer.sharding import shard


class Model:
    _no_split_modules = ()


@pytest.fixture
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("shard_size", "placements", "rows"),
    [
        (None, (Shard(0),), 4),
        (4, (Shard(0),), 4),
        (2, (Replicate(), Shard(0)), 8),
        (1, (Replicate(), Shard(0)), 16),
    ],
)
def test_a_rank_holds_its_share_of_what_its_group_holds_once(
    shard_size: int | None, placements: tuple[object, ...], rows: int
) -> None:
    module = nn.Linear(8, 16)
    shard(module, Model, ranks=4, half=False, shard_size=shard_size)
    assert module.weight.placements == placements
    assert module.weight.to_local().shape == (rows, 8)


def test_groups_of_another_size_than_divides_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="shard_size=3 does not divide trainer.ranks=4: use a div"):
        TrainerConfig(ranks=4, shard_size=3)
