"""A run on a cluster: controller and explorers as actors of Ray, which places and replaces them.

config.py      what is asked of a cluster; only the last two import ray
room.py        whether a cluster can hold it
roles.py       what each role is started with
controller.py  the controller's role ─┐  each runs a command of ours under a guard (command.py)
explorer.py    an explorer's role    ─┘
ranks.py       the role of the trainer's ranks on a further node, and the trainer's side of it
remote.py      roles that are actors elsewhere, for who calls them
launch.py      `flash train --cluster ray`: the roles as actors, from their start to their end
"""
