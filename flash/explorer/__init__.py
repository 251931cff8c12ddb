"""Explorers: processes that play a run's episodes, wherever they are. See docs/cluster.md.

    controller                                        explorer
    RolloutLoop ⇄ crew.py  Fleet ⇄ gate.py ──link.py── explore.py ⇄ player.py ⇄ AgentCrew ⇄ hub
                             ├ hub.py  FleetHub                       └ spool.py             │
                             └ senders.py ═══════════════ NCCL ═════════════════════ workers ┘

What they say to each other is in messages.py.
"""
