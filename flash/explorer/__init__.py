"""Explorers: processes that play a run's episodes, wherever they are. See docs/cluster.md.

    controller                                        explorer
    RolloutLoop ⇄ crew.py  Fleet ⇄ server.py ─link.py─ explore.py ⇄ player.py ⇄ AgentCrew ⇄ hub
                             └ hub.py  FleetHub                       └ spool.py

What they say to each other is in messages.py.
"""
