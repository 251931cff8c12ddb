"""The optimizer's state in host memory while others need the device: it comes back as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flash.trainer.advantage_settings import Gae
from flash.trainer.config import TrainerConfig
from flash.trainer.offload import Offload, make_room
from flash.types import Sample
from tests.saved import save
from tests.trainer.test_rank import started, step, weights_of

CONFIGS = {
    "the policy alone": TrainerConfig(warmup_steps=0, threads=1),
    "with a critic": TrainerConfig(warmup_steps=0, threads=1, advantages=Gae()),
}
GB = 1 << 30


def trained(
    model: Path,
    folder: Path,
    samples_of: Callable[..., list[Sample]],
    config: TrainerConfig,
    *,
    moves: bool,
) -> dict[str, torch.Tensor]:
    """The weights after three steps and a save; between steps the state is moved or not."""
    with started(model, folder, config) as rank:
        for version in range(3):
            step(rank, samples_of(4, seed=version), config, version)
            if moves:
                rank._offload.to_host()
                assert rank._offload.is_on_host
                rank._offload.to_host()  # once is enough
                rank.score([[5, 6, 7]])
                rank.export(str(folder / f"export {version}"))
        save(rank, folder / "saved", 3)
        assert not rank._offload.is_on_host
        return weights_of(rank)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_steps_with_the_state_moved_between_them_make_the_same_bits(
    config, save_model, tmp_path, samples_of
):
    model = save_model(tmp_path / "model")
    expected = trained(model, tmp_path / "a", samples_of, config, moves=False)
    got = trained(model, tmp_path / "b", samples_of, config, moves=True)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    ours, theirs = (tmp_path / run / "saved" / "policy" / "__0_0.distcp" for run in "ab")
    assert ours.read_bytes() == theirs.read_bytes()


def test_state_on_the_host_takes_no_memory_of_the_device():
    """Tensors that have one storage in common included: a state that was loaded may have such."""
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    whole = torch.arange(8.0)
    for number, parameter in enumerate(parameters):
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": whole[4 * number : 4 * number + 4],
            "exp_avg_sq": torch.full((4,), number + 0.5),
        }
    offload = Offload([optimizer])
    states = [state for of in optimizer.state.values() for state in of.values() if state.dim()]
    for _ in range(2):
        offload.to_host()
        assert {state.untyped_storage().nbytes() for state in states} == {0}
        offload.to_device()
        assert whole.tolist() == list(range(8))
        assert [state.tolist() for state in states[1::2]] == [[0.5] * 4, [1.5] * 4]


@pytest.mark.parametrize(
    ("free_gb", "moves"), [(72, False), (70, True), (10, True)], ids=["room", "tight", "none"]
)
def test_the_state_moves_only_if_others_lack_room(free_gb, moves):
    optimizer = torch.optim.AdamW([parameter := torch.nn.Parameter(torch.ones(4))])
    parameter.grad = torch.ones(4)
    optimizer.step()
    offload = Offload([optimizer])
    free = lambda: (free_gb + 20 * offload.is_on_host) * GB  # noqa: E731
    share = make_room(offload, 0.7, lambda: (free(), 100 * GB))
    assert offload.is_on_host is moves
    assert share == pytest.approx((free_gb + 20 * moves) / 100)


def test_a_rank_on_a_cpu_has_nothing_to_give_away(save_model, tmp_path, samples_of):
    config = CONFIGS["the policy alone"]
    with started(save_model(tmp_path / "model"), tmp_path, config) as rank:
        step(rank, samples_of(4), config)
        assert rank.make_room(0.9) == 1
        assert not rank._offload.is_on_host
