"""Simulates runs: the engine's own control plane in virtual time, on simulated parts.

>>> from flash.simulate import Scenario, simulate
>>> simulate(Scenario(steps=10, alpha=1, workers={"count": 16})).samples_per_s

A name's module is imported when the name is asked for: help needs the settings alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
