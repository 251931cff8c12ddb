"""A run on a cluster: controller and explorers as actors of Ray, which places and replaces them.

config.py      what is asked of a cluster; only the last two import ray
room.py        whether a cluster can hold it
roles.py       what each role is started with
controller.py  the controller's role ─┐  each runs a command of ours under a guard (command.py)
explorer.py    an explorer's role    ─┘
ranks.py       the role of the trainer's ranks on a further node, and the trainer's side of it
hosts.py       the role of an environment host or reward process, and the explorer's side of it
far.py         processes on another node, as if they ran here: what both of these are made of
asking.py      explorers that are asked for after the trainer, and make way for it
remote.py      roles that are actors elsewhere, for who calls them
launch.py      `flash train --cluster ray`: the roles as actors, from their start to their end
"""
