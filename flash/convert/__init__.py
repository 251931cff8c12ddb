"""`flash convert`: a configuration of another system becomes one of ours, each key told.

command.py      what is printed and written
  conversion.py     from a file's keys to a configuration that loads
    source.py           YAML, or a script's key=value words, as keys with values
    rules.py            what a table of keys is made of
    roll.py, trinity.py, verl.py, gerl.py   the tables
      counterparts.py     what of ours stands for environments, data, losses, GPUs
"""
