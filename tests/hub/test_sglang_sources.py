"""The fake server and the client against SGLang's own sources, where it is installed.

They are read, not imported: that takes a GPU's libraries.
"""

import ast
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flash.fakes import sglang as fake
from flash.fakes import sglang_group as group
from flash.hub import sglang_answers, sglang_nccl, sglang_worker
from flash.hub.config import _OUR_ARGS, _SAMPLING_ARGS
from flash.hub.sglang_pool import SglangPool

SPEC = importlib.util.find_spec("sglang")
pytestmark = pytest.mark.skipif(
    SPEC is None or not (Path(SPEC.submodule_search_locations[0]) / "srt").is_dir(),
    reason="SGLang is not installed",
)
REQUESTS = "srt/managers/io_struct.py"
SAMPLING = "srt/sampling/sampling_params.py"
SERVER = "srt/entrypoints/http_server.py"
TOKENIZER = "srt/managers/tokenizer_manager.py"


@functools.cache
def source(path: str) -> str:
    return (Path(SPEC.submodule_search_locations[0]) / path).read_text()


@functools.cache
def fields(path: str, name: str) -> dict[str, Any]:
    """Of a class: its fields, with their defaults where these are plain."""
    (found,) = (
        node
        for node in ast.parse(source(path)).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    inherited = fields(path, "BaseReq") if path == REQUESTS and name != "BaseReq" else {}
    return inherited | {
        node.target.id: default(node.value)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def default(value: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else msgspec.NODEFAULT
    except ValueError:
        return ...


@pytest.mark.parametrize(
    ("ours", "path", "theirs"),
    [
        (fake._Generate, REQUESTS, "GenerateReqInput"),
        (fake._Sampling, SAMPLING, "SamplingParams"),
        (fake._Pause, REQUESTS, "PauseGenerationReqInput"),
        (fake._Continue, REQUESTS, "ContinueGenerationReqInput"),
        (fake._Update, REQUESTS, "UpdateWeightFromDiskReqInput"),
        (fake._Version, REQUESTS, "UpdateWeightVersionReqInput"),
        (fake._Abort, REQUESTS, "AbortReq"),
        (fake._Memory, REQUESTS, "ReleaseMemoryOccupationReqInput"),
        (fake._Memory, REQUESTS, "ResumeMemoryOccupationReqInput"),
        (group.InitGroup, REQUESTS, "InitWeightsUpdateGroupReqInput"),
        (group.DestroyGroup, REQUESTS, "DestroyWeightsUpdateGroupReqInput"),
        (group.Begin, REQUESTS, "BeginWeightUpdateReqInput"),
        (group.Distributed, REQUESTS, "UpdateWeightsFromDistributedReqInput"),
        (group.End, REQUESTS, "EndWeightUpdateReqInput"),
        (sglang_nccl._Ranks, "srt/arg_groups/fields/parallel.py", "Parallel"),
        (sglang_worker._Sampling, SAMPLING, "SamplingParams"),
        (sglang_worker._Request, REQUESTS, "GenerateReqInput"),
        (sglang_answers.Span, "srt/utils/weight_versions.py", "WeightVersionSpan"),
    ],
)
def test_requests_have_the_fields_of_sglangs_own(ours, path, theirs):
    known = fields(path, theirs)
    assert {field.name for field in msgspec.structs.fields(ours)} <= known.keys()


@pytest.mark.parametrize(
    ("ours", "path", "theirs"),
    [
        (fake._Sampling, SAMPLING, "SamplingParams"),
        (fake._Pause, REQUESTS, "PauseGenerationReqInput"),
        (fake._Continue, REQUESTS, "ContinueGenerationReqInput"),
        (fake._Update, REQUESTS, "UpdateWeightFromDiskReqInput"),
        (fake._Version, REQUESTS, "UpdateWeightVersionReqInput"),
        (group.InitGroup, REQUESTS, "InitWeightsUpdateGroupReqInput"),
        (group.DestroyGroup, REQUESTS, "DestroyWeightsUpdateGroupReqInput"),
        (group.Distributed, REQUESTS, "UpdateWeightsFromDistributedReqInput"),
    ],
)
def test_what_a_request_leaves_out_is_to_the_fake_what_it_is_to_sglang(ours, path, theirs):
    known = fields(path, theirs)
    for field in msgspec.structs.fields(ours):
        if known[field.name] is not ...:  # top_k: a large number, as -1 means there too
            assert field.default == known[field.name], field.name


def test_a_request_is_of_sglangs_contract():
    """Of the one that it holds each body of /generate against."""
    path = Path(SPEC.submodule_search_locations[0]) / "api/v1/api_types.py"
    of_file = importlib.util.spec_from_file_location("sglang_api_types", path)
    module = importlib.util.module_from_spec(of_file)
    sys.modules[of_file.name] = module
    of_file.loader.exec_module(module)
    sampling = sglang_worker._Sampling(3, 0.5, (9,), ignore_eos=False, stream_interval=32)
    request = sglang_worker._Request("id.", [1, 2], sampling, return_logprob=True, cache_salt="1")
    request.stream = True
    body = msgspec.json.decode(msgspec.json.encode(request))
    parsed = module.GenerateRequest.from_json_value(body)
    assert (parsed.rid, parsed.input_ids, parsed.cache_salt) == ("id.", [1, 2], "1")
    with pytest.raises(module.JsonContractError):
        module.GenerateRequest.from_json_value({**body, "sampling_params": {"max_tokens": 3}})


def test_the_routes_are_there():
    app = fake.FakeSglang(None).app()
    for route in {resource.canonical for resource in app.router.resources()}:
        assert f'"{route}"' in source(SERVER), route


def test_answers_have_what_is_read_of_them():
    for field in msgspec.structs.fields(sglang_answers._Meta):
        told = (TOKENIZER, "srt/utils/weight_versions.py")
        assert any(f'"{field.name}"' in source(path) for path in told), field.name
    for field in msgspec.structs.fields(sglang_answers._Reason):
        assert f'"{field.name}"' in source("srt/managers/schedule_batch.py"), field.name


def test_arguments_of_servers_are_sglangs():
    pool = SglangPool(
        "m", size=1, max_running=1, max_tokens=1, cache_tokens=1, tensor_parallel=1, devices=[],
        gpu_memory=0.5, dtype="auto", threads=1, seed=0, arguments=(), log_dir=Path(),
        start_timeout_s=1, keeps_stale=True,
    )  # fmt: skip
    words = [word for word in pool._command(0, "h", 1) if word.startswith("--")]
    names = {word.removeprefix("--").partition("=")[0] for word in words}
    names.add("enable-memory-saver")
    names |= {*_SAMPLING_ARGS["sglang_args"], "api-key", "admin-api-key"}
    names |= {theirs for _, theirs, *_ in _OUR_ARGS.values()}
    folder = Path(SPEC.submodule_search_locations[0]) / "srt/arg_groups/fields"
    declared = "\n".join(path.read_text() for path in folder.glob("*.py"))
    for name in names:
        assert f"    {name.replace('-', '_')}: A[" in declared, name
