"""Needles in long videos and mixed conversations, for models that were trained to find them (examples/needle_vlm)."""
