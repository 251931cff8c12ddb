"""Changes of the log's schema, one file each in `versions/`, applied by Alembic.

A database that is new is made as `flash/log/schema.py` says and marked with the newest of them.
"""
