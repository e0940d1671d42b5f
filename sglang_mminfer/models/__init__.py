"""Models that SGLang cannot serve by itself: one folder for each family, this level for what they share.

A family's folder is imported only for a checkpoint of it. Its `__init__` is light (the config, the chat template,
names) and follows the contract of `registration.Family`; model and processor stand in files of their own.
"""
