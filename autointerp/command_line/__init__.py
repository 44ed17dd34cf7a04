"""From flags to one call and its output: the commands that ``cli.py`` registers.

Must import nothing slow at module level: every command, even `--help`, imports this package.
"""
