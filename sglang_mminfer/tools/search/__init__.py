"""The search for a head config: measure candidates in the real engine, then share out one budget over all heads."""

BOUNDARIES = ("none", "q", "2d")
"""What a head may have: one pattern over everything, one for each modality of rows, one for each pair."""
