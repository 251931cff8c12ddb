"""Whether the ranks of a server have all that is in an export, and which servers try."""

from types import SimpleNamespace

import msgspec
import pytest
from safetensors.numpy import save_file

from flash.worker.delta import Delta, TensorInfo, delta_of, file_in, not_had
from flash.worker.vllm_extension import WeightLoader

DELTA = Delta(
    before="/before",
    tensors=[TensorInfo("a", "bfloat16", [2, 3], 1, 60), TensorInfo("b", "float32", [4], 0, -7)],
)


@pytest.mark.parametrize(
    "ranks",
    [
        [[(6, 60), (4, -7)]],
        [[(2, 10), (4, -7)], [(4, 50), (4, -7)]],  # a is shared out, each has all of b
        [[(0, 0), (4, -7)], [(6, 60), (0, 0)]],
        [[(6, 60), (4, -7 + 2**64)]],  # sums of 8-byte words turn over
    ],
)
def test_ranks_that_have_it_all(ranks):
    assert not_had(DELTA, ranks) is None


@pytest.mark.parametrize(
    ("ranks", "lacking"),
    [
        ([[(6, 61), (4, -7)]], "a"),
        ([[(5, 60), (4, -7)]], "a"),
        ([[(6, 60), (4, -7)], [(6, 60), (2, 0)]], "b"),
        ([[(6, 60), (4, -7)], [(6, 60), (4, -8)]], "b"),
        ([[(6, 60), (0, 0)]], "b"),
    ],
)
def test_the_first_tensor_that_they_lack_is_named(ranks, lacking):
    assert not_had(DELTA, ranks) == lacking


class Server(WeightLoader):
    """Has a model's configuration, and no model."""

    def __init__(self, **settings) -> None:
        config = SimpleNamespace(**{"quantization": None, "use_mla": False} | settings)
        self.model_runner = SimpleNamespace(model_config=config)
        self.flash_weights = "/before"


@pytest.fixture
def directory(tmp_path) -> str:
    file_in(tmp_path).parent.mkdir()
    save_file({}, file_in(tmp_path), metadata={"delta": msgspec.json.encode(DELTA).decode()})
    assert delta_of(tmp_path) == DELTA
    return str(tmp_path)


def test_a_server_whose_weights_are_not_those_before_is_not_touched(directory, tmp_path):
    server = Server(use_mla=True)
    server.flash_weights = "/after"
    assert server.load_flash_delta(directory) is None
    server.flash_weights = "/before"
    assert server.load_flash_delta(str(tmp_path / "other")) is None  # there is no delta
    file_in(tmp_path).write_bytes(b"cut short")
    assert server.load_flash_delta(directory) is None


@pytest.mark.parametrize("settings", [{"use_mla": True}, {"quantization": "fp8"}])
def test_weights_that_others_are_made_of_are_not_changed(directory, settings):
    server = Server(**settings)
    for answer in (server.load_flash_delta(directory), server.begin_flash_delta(["nonsense"])):
        assert answer.keys() == {"error"}  # of which nothing is raised
    assert "MLA" in server.load_flash_delta(directory)["error"]
    assert server.flash_weights == "/before"
