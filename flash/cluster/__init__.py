"""A run on a cluster: controller and explorers as actors of Ray, which places and replaces them.

config.py      what is asked of a cluster; imports no ray, nor do the next three
room.py        whether a cluster can hold it
roles.py       what each role is started with
controller.py  the controller's role ─┐  each runs a command of ours under a guard (command.py)
explorer.py    an explorer's role    ─┘
launch.py      `flash train --cluster ray`: the roles as actors, from their start to their end
"""
