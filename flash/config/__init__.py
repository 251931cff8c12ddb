"""The configuration of a run: small frozen models, validated once, before any process starts.

source.py     a preset or YAML file, with the command line's changes
  yaml_text.py    YAML in which no key comes twice
  mistakes.py     validated; each mistake a line with its remedy
    run.py            Config: RunFields, and what they must agree on
      fields.py           a run's own fields and its sections; each section is beside its part
      together.py         what the sections must agree on
capacity.py   whether this machine has what it takes
"""

from flash.config.callables import try_environment, try_environments
from flash.config.capacity import check_capacity
from flash.config.listing import fields, variants
from flash.config.mistakes import validated
from flash.config.model import SMALL
from flash.config.run import Config
from flash.config.source import load, parse, presets

__all__ = [
    "SMALL",
    "Config",
    "check_capacity",
    "fields",
    "load",
    "parse",
    "presets",
    "try_environment",
    "try_environments",
    "validated",
    "variants",
]
