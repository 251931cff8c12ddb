"""A response that several workers sample, part by part."""

from dataclasses import replace

import numpy as np

from flash.hub.response import Response
from flash.types import UNKNOWN_EXPERT, Completion
from tests.steady import request


def test_tokens_that_are_sampled_again_are_counted_once():
    new, told = [], []
    response = Response(request(max_tokens=10), on_new=new.append, on_sampled=told.append)
    first = response.begin(version=0)
    first.count(5)  # and its worker fails
    second = response.begin(version=0)
    second.count(3)
    second.count(4)
    assert told == [5, 3, 7]
    assert sum(new) == 7
    assert min(new) >= 0


def test_the_rest_of_a_response_is_asked_for_after_what_there_is():
    response = Response(request(max_tokens=10, prompt=3), on_new=lambda _: None, on_sampled=None)
    partial = response.begin(version=4)
    partial.token_ids += [7, 8]
    partial.logprobs += [-1.0, -2.0]
    assert response.add(partial.as_aborted("a"), worker="a") is None
    prompt, sampling = response.rest()
    assert (prompt, sampling.max_tokens) == ([0, 1, 2, 7, 8], 8)


def test_a_response_under_a_constraint_begins_anew_with_another_worker():
    """Whose constraint would begin where the other's broke off."""
    asked = request(max_tokens=10, prompt=3)
    asked = replace(asked, sampling=replace(asked.sampling, constraint="{}"))
    told = []
    response = Response(asked, on_new=lambda _: None, on_sampled=told.append)
    assert response.add(part(4, None), worker="a") is None
    assert response.rest() == ([0, 1, 2], asked.sampling)
    assert response.add(part(10, None), worker="a") is None, "what lacks its end is no answer"
    whole = response.add(part(2, None, "stop"), worker="b")
    assert (whole.token_ids, whole.worker) == ([7, 7], "b")
    assert told == [0, 0, 2]


def test_an_answer_that_is_whole_at_once_names_its_worker_and_the_temperature_asked_for():
    new = []
    response = Response(request(max_tokens=2), on_new=new.append, on_sampled=None)
    part = Completion(
        token_ids=[7, 8], logprobs=[-1.0, -2.0], versions=[4, 4], temperature=9.0,
        finish_reason="length",
    )  # fmt: skip
    whole = response.add(part, worker="a")
    assert whole is not None
    assert (whole.token_ids, whole.versions, whole.worker) == ([7, 8], [4, 4], "a")
    assert whole.temperature == request(max_tokens=2).sampling.temperature
    assert sum(new) == 2


def asking_for_experts(*, max_tokens):
    asked = request(max_tokens=max_tokens, prompt=3)
    asked = replace(asked, sampling=replace(asked.sampling, experts_from=1))
    return Response(asked, on_new=lambda _: None, on_sampled=None)


def part(tokens, experts, reason="abort"):
    return Completion(
        token_ids=[7] * tokens, logprobs=[-1.0] * tokens, versions=[4] * tokens,
        temperature=1.0, finish_reason=reason,
        experts=None if experts is None else np.array(experts, np.int16)[:, None],
    )  # fmt: skip


def test_experts_are_asked_for_after_those_that_there_are():
    response = asking_for_experts(max_tokens=4)
    assert response.rest()[1].experts_from == 1
    assert response.add(part(0, [1]), worker="a") is None  # aborted while its prompt was read
    assert response.rest()[1].experts_from == 2
    assert response.add(part(1, None), worker="a") is None  # what a dead worker had told
    assert response.rest()[1].experts_from == 2
    assert response.add(part(1, [2, 3]), worker="b") is None
    prompt, sampling = response.rest()
    assert (len(prompt), sampling.max_tokens, sampling.experts_from) == (5, 2, 4)
    whole = response.add(part(2, [4, 5], "length"), worker="c")
    assert whole.experts[:, 0].tolist() == [1, 2, 3, 4, 5]  # of 7 tokens, from 1, without the last


def test_experts_that_were_lost_with_the_end_of_an_answer_leave_the_others_where_they_are():
    response = asking_for_experts(max_tokens=3)
    assert response.add(part(1, [1, 2]), worker="a") is None
    whole = response.add(part(2, None), worker="b")  # all was sampled, and its worker died
    assert whole.finish_reason == "length"
    assert whole.experts[:, 0].tolist() == [1, 2, UNKNOWN_EXPERT, UNKNOWN_EXPERT]
