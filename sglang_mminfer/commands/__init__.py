"""What can be typed: one module for each command, with its options and their checks.

A module here imports typer and Python's own modules alone at module level. What a command does lies in `tools`, and is
imported when the words are read and checked: so help and wrong words are answered at once.
"""
