"""A cluster that can't hold what is asked of it is told so before anything starts."""

import socket

import pytest

from flash import config as configuration
from flash.cluster.config import ClusterConfig
from flash.cluster.room import Node, check_answers, check_room, check_shared
from flash.warm_start.small_policy import create


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


def test_a_trainer_on_several_nodes_must_find_as_many_that_hold_its_ranks():
    nodes = [Node("a", 16, 8), Node("b", 16, 8), Node("c", 16, 0)]
    check_room(asked(trainer={"nodes": 2, "gpus": 8}, explorers={"min": 1}), nodes)
    with pytest.raises(ValueError) as refused:
        check_room(asked(trainer={"nodes": 3, "gpus": 8}), nodes)
    assert str(refused.value) == (
        "cluster.trainer.nodes=3 of cluster.trainer.cpus=1 with cluster.trainer.gpus=8: only 2 "
        "nodes have them; there are 2 nodes of 16 cores and 8 GPUs, 1 node of 16 cores and 0 GPUs: "
        "ask for less, or add a node"
    )


def test_explorers_have_what_the_trainers_nodes_leave():
    nodes = [Node("a", 4, 4), Node("b", 4, 4), Node("c", 4, 0)]
    few = {"trainer": {"nodes": 2, "cpus": 2}, "explorers": {"min": 2, "gpus": 4, "cpus": 2}}
    check_room(asked(**few), nodes)
    few["trainer"]["cpus"] = 3  # one of the nodes with GPUs must have ranks
    with pytest.raises(ValueError, match=r"gpus=0, nodes=2\) there is room for 1; there are"):
        check_room(asked(**few), nodes)


def test_ranks_on_several_nodes_are_refused_what_these_do_not_share(tmp_path):
    words = map(str, range(10))
    reference = create(tmp_path / "reference", words, layers=1, hidden_size=32, heads=2)
    config = configuration.load(
        "frozen_lake",
        {
            "cluster": "ray", "cluster.trainer.nodes": 2, "trainer.ranks": 2,
            "trainer.kl": {"coefficient": 0.1, "reference": str(reference)},
        },
    )  # fmt: skip
    marker = tmp_path / "marker"
    check_shared(config, marker, lambda path: path in (marker, reference))
    with pytest.raises(ValueError) as refused:
        check_shared(config, marker, lambda path: path == marker)
    assert str(refused.value) == (
        f"trainer.kl.reference='{reference}' with cluster.trainer.nodes=2: not all nodes that may "
        f"have ranks see it: name a folder on a disk that they share, or use "
        f"cluster.trainer.nodes=1"
    )
    with pytest.raises(ValueError, match=r"runs_dir='runs' with .*nodes=2: not all nodes"):
        check_shared(config, marker, lambda path: path == reference)


def hosts(count, nodes, **fields):
    check_room(asked(**fields), nodes, hosts=count)


def test_hosts_that_ask_for_nothing_are_on_their_explorers_nodes():
    hosts(100, [Node("a", 2, 0)], explorers={"min": 1})


def test_hosts_have_what_the_trainer_and_the_least_explorers_leave():
    nodes = [Node("gpu", 16, 8), Node("cpu", 8, 0)]
    few = {"trainer": {"gpus": 4, "cpus": 8}, "explorers": {"min": 2, "gpus": 2, "cpus": 4}}
    hosts(2, nodes, hosts={"cpus": 2}, **few)
    with pytest.raises(ValueError) as refused:
        hosts(3, nodes, hosts={"cpus": 2}, **few)
    assert str(refused.value) == (
        "cluster.hosts.cpus=2 of each of 6 environment hosts and reward processes, 3 of each of "
        "cluster.explorers.min=2: beside the trainer and these explorers there is room for 4; "
        "there are 1 node of 16 cores and 8 GPUs, 1 node of 8 cores and 0 GPUs: ask for less, or "
        "add a node"
    )


def test_trainer_and_explorers_are_counted_where_they_leave_most_to_hosts():
    nodes = [Node("a", 3, 0), Node("b", 4, 0), Node("c", 4, 0)]
    for ordered in (nodes, nodes[::-1]):
        hosts(2, ordered, hosts={"cpus": 4}, explorers={"min": 1, "cpus": 2})
        with pytest.raises(ValueError, match="there is room for 2; there are"):
            hosts(3, ordered, hosts={"cpus": 4}, explorers={"min": 1, "cpus": 2})


def test_hosts_of_explorers_that_need_not_be_there_are_not_counted():
    hosts(4, [Node("a", 1, 0)], hosts={"cpus": 2}, explorers={"min": 0, "max": 8})
