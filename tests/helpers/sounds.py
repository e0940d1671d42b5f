"""Sound files that the tests make."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np


def make_sound(path: Path, seconds: float, seed: int) -> Path:
    """Writes noise to a .wav file and returns its path: one channel, 16,000 samples a second of 16 bits each."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(16_000 * seconds)).astype(np.int16)
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return path
