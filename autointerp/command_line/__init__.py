"""What the commands in ``cli.py`` share: their options, how values are read, how a command ends.

It is imported before every command, `--help` among them, so nothing here imports what takes time.
"""
