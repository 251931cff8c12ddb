"""Simulates runs: the engine's own control plane in virtual time, on simulated parts.

>>> from flash.simulate import Scenario, simulate
>>> simulate(Scenario(steps=10, alpha=1, workers={"count": 16})).samples_per_s
"""

from flash.simulate.results import Result
from flash.simulate.run import simulate
from flash.simulate.scenario import Scenario, load

__all__ = ["Result", "Scenario", "load", "simulate"]
