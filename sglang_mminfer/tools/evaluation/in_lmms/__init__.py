"""What lmms-eval runs, in its own environment, where nothing else of this package is: its client, and our tasks.

`lmms.py` copies these modules to where lmms-eval finds them. They import nothing of ours.
"""
