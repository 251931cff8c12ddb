"""A cluster that can't hold what is asked of it is told so before anything starts."""

import socket

import pytest

from flash.cluster.config import ClusterConfig
from flash.cluster.room import Node, check_answers, check_room


def asked(**fields) -> ClusterConfig:
    return ClusterConfig.model_validate({"kind": "ray", **fields})


def test_what_fits_is_allowed():
    nodes = [Node("a", 16, 8), Node("b", 16, 8)]
    check_room(
        asked(trainer={"gpus": 8, "cpus": 8}, explorers={"min": 2, "gpus": 4, "cpus": 4}), nodes
    )


def test_a_trainer_that_no_single_node_can_hold_is_refused_with_what_there_is():
    nodes = [Node("a", 16, 4), Node("b", 16, 4), Node("c", 8, 0)]
    with pytest.raises(ValueError) as refused:
        check_room(asked(trainer={"gpus": 8}), nodes)
    assert str(refused.value) == (
        "cluster.trainer.cpus=1 with cluster.trainer.gpus=8: no node has them; there are 2 nodes "
        "of 16 cores and 4 GPUs, 1 node of 8 cores and 0 GPUs: ask for less, or add a node"
    )


def test_explorers_that_fit_in_all_but_not_on_nodes_are_refused_with_how_many_would():
    nodes = [Node("a", 4, 3), Node("b", 4, 3)]
    with pytest.raises(ValueError, match="there is room for 2; there are 2 nodes of 4 cores and 3"):
        check_room(asked(explorers={"min": 3, "gpus": 2}), nodes)


def test_the_trainers_node_is_the_one_that_leaves_most_to_explorers():
    nodes = [Node("gpu", 4, 4), Node("cpu", 1, 0)]
    check_room(asked(trainer={"cpus": 1}, explorers={"min": 2, "gpus": 2, "cpus": 2}), nodes)


def test_a_controller_that_is_bound_to_its_disk_must_fit_there():
    nodes = [Node("disk", 1, 0), Node("gpu", 16, 8)]
    with pytest.raises(ValueError, match="node disk, whose disk alone has the run's folder, lacks"):
        check_room(asked(trainer={"gpus": 8}), nodes, pinned="disk")


def test_no_explorer_need_be_there_where_a_cluster_grows():
    check_room(asked(explorers={"min": 0, "max": 8, "gpus": 8}), [Node("a", 1, 0)])


def test_as_many_may_come_as_are_needed_unless_more_are_named():
    assert asked(explorers={"min": 2}).explorers.most == 2
    assert asked(explorers={"min": 0}).explorers.most == 1
    assert asked(explorers={"min": 2, "max": 5}).explorers.most == 5


def test_an_address_where_nobody_listens_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cluster.address='{address}': nobody answers there"):
            check_answers(address)
        taken.listen()
        check_answers(address)


def test_what_the_trainer_has_is_not_given_to_explorers():
    with pytest.raises(ValueError, match="there is room for 1; there is 1 node of 4 cores and 0"):
        check_room(asked(trainer={"cpus": 2}, explorers={"min": 2, "cpus": 2}), [Node("a", 4, 0)])
