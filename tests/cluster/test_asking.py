"""Explorers that a cluster is asked for, under virtual time: the trainer's nodes come first."""

import asyncio
import contextlib

import pytest

from flash.cluster.asking import AskedExplorers, Lack
from flash.cluster.place import Place
from flash.errors import ClusterFailure, NodeLost
from flash.virtual_time import in_virtual_time


class Explorer:
    """Takes one core of a node."""

    def __init__(self, cluster, number):
        self.number = number
        self.node = None
        self._cluster = cluster
        self._placed = asyncio.Event()
        self._over = asyncio.get_running_loop().create_future()

    def start(self, node):
        self.node = node
        self._placed.set()

    def lose(self):
        self._over.set_exception(NodeLost(self.node))

    def give_up(self):
        self._over.set_result(f"explorer-{self.number} gave up")

    def hear_of_the_end(self):
        self._over.set_result("")

    async def place(self):
        await self._placed.wait()
        return Place(f"explorer-{self.number}", self.node, "host", "10.0.0.1", 1, 1, ())

    async def run(self):
        return await self._over

    def end(self):
        self._cluster.forget(self)


class Cluster:
    """Gives room to explorers first, wherever they ask at all: the trainer's misfortune.

    `trainer`: cores that it asks of each of its nodes.
    """

    def __init__(self, nodes, *, trainer):
        self.cores = dict(nodes)
        self.said = []
        self.explorers = []
        self.asked = 0
        self._trainer = trainer
        self._has = [None] * len(trainer)
        self._settle()

    @property
    def count(self):
        return len(self._trainer)

    @property
    def trains_on(self):
        return self._has

    @property
    def playing(self):
        """The nodes of explorers that have one, by number."""
        return {each.number: each.node for each in self.explorers if each.node}

    async def lack(self):
        lacks = self._has.count(None)
        able = {name for name, cores in self.cores.items() if cores >= self._trainer[0]}
        return Lack(lacks, able - {*self._has}) if lacks else Lack()

    def ask(self, number):
        self.asked += 1
        self.explorers.append(explorer := Explorer(self, number))
        self._settle()
        return explorer

    def of(self, number):
        return next(each for each in self.explorers if each.number == number)

    def forget(self, explorer):
        self.explorers.remove(explorer)
        self._settle()

    def add(self, name, cores):
        self.cores[name] = cores
        self._settle()

    def remove(self, name):
        self.lose(name)
        self.notice(name)

    def lose(self, name):
        """What the cluster does not know yet."""
        del self.cores[name]
        for explorer in self.explorers:
            if explorer.node == name:
                explorer.lose()

    def notice(self, name):
        self._has = [None if node == name else node for node in self._has]
        self._settle()

    def _free(self, name):
        of_trainer = sum(
            cores for node, cores in zip(self._has, self._trainer, strict=True) if node == name
        )
        return self.cores[name] - of_trainer - [*self.playing.values()].count(name)

    def _settle(self):
        for explorer in self.explorers:
            if not explorer.node and (name := next(filter(self._free, self.cores), None)):
                explorer.start(name)
        while None in self._has:
            number = self._has.index(None)
            fits = [
                name
                for name in self.cores
                if name not in self._has and self._free(name) >= self._trainer[number]
            ]
            if not fits:
                return
            self._has[number] = fits[0]

    @contextlib.asynccontextmanager
    async def asked_for(self, count):
        """The block begins when those explorers that have room have played for minutes."""
        explorers = AskedExplorers(self.ask, count, self, self.said.append)
        async with asyncio.TaskGroup() as tasks:
            playing = tasks.create_task(explorers.play())
            await asyncio.sleep(200.5)  # between two looks
            try:
                yield explorers
            finally:
                playing.cancel()


TWO = {"a": 2, "b": 2, "head": 1}  # nodes of which two are the trainer's, and one an explorer's


@in_virtual_time
async def test_no_explorer_is_asked_for_before_the_trainer_has_all_its_nodes():
    cluster = Cluster({"a": 2, "head": 1}, trainer=[2, 2])
    async with cluster.asked_for(3):
        await asyncio.sleep(3600)
        assert not cluster.asked
        cluster.add("b", 2)
        await asyncio.sleep(2)
        assert cluster.playing == {0: "head"}
        assert len(cluster.explorers) == 3, "the others wait for room"


@in_virtual_time
async def test_explorers_that_wait_make_way_for_a_trainer_that_has_lost_a_node():
    cluster = Cluster(TWO, trainer=[2, 2])
    async with cluster.asked_for(3):
        cluster.remove("b")
        await asyncio.sleep(2)
        assert len(cluster.explorers) == 1, "none waits"
        cluster.add("c", 2)
        await asyncio.sleep(2)
        assert cluster.trains_on == ["a", "c"]
        assert cluster.playing == {0: "head"}
        cluster.add("d", 4)
        assert cluster.playing == {0: "head", 1: "d", 2: "d"}, "they were asked for again"


@in_virtual_time
async def test_an_explorer_that_was_faster_than_the_trainer_gives_its_node_back():
    cluster = Cluster(TWO, trainer=[2, 2])
    async with cluster.asked_for(2):
        cluster.lose("b")
        cluster.add("c", 2)
        assert cluster.playing == {0: "head", 1: "c"}
        await asyncio.sleep(50)
        cluster.notice("b")
        await asyncio.sleep(5)
        assert cluster.trains_on == ["a", "c"]
        assert cluster.playing == {0: "head"}
        assert len(cluster.explorers) == 2, "it was asked for again"


@in_virtual_time
async def test_an_explorer_that_begins_elsewhere_as_the_trainer_loses_a_node_plays_on():
    cluster = Cluster(TWO, trainer=[2, 2])
    async with cluster.asked_for(2):
        cluster.lose("b")
        cluster.add("c", 1)
        await asyncio.sleep(5)
        cluster.notice("b")
        await asyncio.sleep(5)
        assert cluster.playing == {0: "head", 1: "c"}
        assert cluster.asked == 2


@in_virtual_time
async def test_an_explorer_of_a_lost_node_is_asked_for_again_after_the_trainer():
    cluster = Cluster({"a": 3, "head": 1}, trainer=[2])
    async with cluster.asked_for(2):
        assert cluster.playing == {0: "a", 1: "head"}
        cluster.remove("a")
        cluster.add("b", 2)
        await asyncio.sleep(5)
        assert cluster.trains_on == ["b"]
        assert cluster.playing == {1: "head"}
        cluster.add("c", 1)
        assert cluster.playing == {1: "head", 0: "c"}


@in_virtual_time
async def test_an_explorer_whose_process_ends_as_often_as_it_starts_is_no_busy_loop():
    cluster = Cluster(TWO, trainer=[2, 2])

    def ask(number):
        explorer = cluster.ask(number)
        explorer.lose()
        return explorer

    explorers = AskedExplorers(ask, 1, cluster, cluster.said.append)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60):
            await explorers.play()
    assert 30 <= cluster.asked <= 61


@in_virtual_time
async def test_what_a_trainer_waits_for_is_said_once_and_that_it_has_it():
    cluster = Cluster(TWO, trainer=[2, 2])
    async with cluster.asked_for(3):
        cluster.remove("b")
        await asyncio.sleep(3600)
        lacks = (
            "explorers wait for the trainer, which lacks 1 of 2 nodes: Ray has none with room "
            "(cluster.trainer); 1 of 3 play on"
        )
        assert cluster.said == [lacks]
        cluster.add("c", 2)
        await asyncio.sleep(2)
        has = "the trainer has all its nodes: explorers are asked for again"
        assert cluster.said == [lacks, has]
        cluster.remove("a")
        cluster.add("d", 2)
        await asyncio.sleep(60)
        assert cluster.said == [lacks, has], "a node that is replaced at once is not worth a line"


@in_virtual_time
async def test_explorers_of_one_node_after_another_make_way_for_a_trainer_but_for_the_last():
    cluster = Cluster({"a": 2, "b": 2, "c": 2, "small": 1}, trainer=[2, 2])
    cluster.add("d", 3)
    async with cluster.asked_for(9):
        assert sorted(cluster.playing.values()) == [*"cc", *"ddd", "small"]
        cluster.remove("b")
        await asyncio.sleep(55)
        assert len(cluster.playing) == 6, "the node may be back soon"
        await asyncio.sleep(10)
        assert cluster.trains_on == ["a", "c"], "of those that are large enough, it costs the least"
        assert "explorer-0, explorer-1 on node c make way for the trainer" in " ".join(cluster.said)
        assert sorted(cluster.playing.values()) == [*"ddd", "small"]

        await asyncio.sleep(100)
        cluster.remove("a")
        await asyncio.sleep(65)
        assert cluster.trains_on == ["d", "c"]
        assert [*cluster.playing.values()] == ["small", "d"], "what the trainer leaves of d is used"


@in_virtual_time
async def test_what_one_node_is_not_enough_for_takes_another_minute():
    cluster = Cluster(dict.fromkeys("abcde", 2), trainer=[2, 2])
    async with cluster.asked_for(6):
        cluster.remove("a")
        cluster.remove("b")
        await asyncio.sleep(115)
        assert cluster.trains_on == ["c", None]
        assert sorted(cluster.playing.values()) == [*"ddee"]
        await asyncio.sleep(10)
        assert cluster.trains_on == ["c", "d"]
        assert sorted(cluster.playing.values()) == [*"ee"]


@in_virtual_time
async def test_explorers_all_of_which_are_where_the_trainer_could_be_stay():
    cluster = Cluster({"a": 2, "b": 2}, trainer=[2])
    async with cluster.asked_for(2):
        cluster.remove("a")
        await asyncio.sleep(3600)
        assert [*cluster.playing.values()] == ["b", "b"], "a trainer without explorers learns not"
        assert cluster.trains_on == [None]


@in_virtual_time
async def test_a_run_fails_when_the_last_explorer_has_given_up_whether_others_were_lost_or_not():
    cluster = Cluster(TWO | {"c": 1}, trainer=[2, 2])
    explorers = AskedExplorers(cluster.ask, 2, cluster, cluster.said.append)
    playing = asyncio.create_task(explorers.play())
    await asyncio.sleep(2)
    cluster.of(0).give_up()
    cluster.remove(cluster.playing[1])
    await asyncio.sleep(5)
    assert not playing.done()
    assert cluster.said == ["explorer-0 gave up"]
    cluster.of(1).give_up()
    with pytest.raises(ClusterFailure, match="no explorer is left: explorer-1 gave up"):
        await playing


@in_virtual_time
async def test_at_the_end_of_a_run_nobody_waits_for_explorers_that_wait_for_room():
    cluster = Cluster(TWO | {"c": 1}, trainer=[2, 2])
    explorers = AskedExplorers(cluster.ask, 3, cluster, cluster.said.append)
    playing = asyncio.create_task(explorers.play())
    await asyncio.sleep(2)
    assert cluster.playing == {0: "head", 1: "c"}
    cluster.remove("c")
    await asyncio.sleep(2)
    explorers.ask_no_more()
    await asyncio.sleep(2)
    assert [explorer.number for explorer in cluster.explorers] == [0]
    cluster.of(0).hear_of_the_end()
    async with asyncio.timeout(1):
        await playing
    assert not cluster.said
