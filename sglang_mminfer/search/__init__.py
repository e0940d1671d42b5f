"""The search for a head config: measure candidates in the real engine, then share out one budget over all heads."""
