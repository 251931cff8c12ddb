"""From a configuration to the parts of a run: see `open_parts` in `open.py`."""
