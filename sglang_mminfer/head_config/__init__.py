"""Head configs: JSON files that give every attention head its boundary and its pattern (design, section 6)."""

from sglang_mminfer.head_config.basis_file import ModelBasis
from sglang_mminfer.head_config.config import HeadConfig, words_of
from sglang_mminfer.head_config.fingerprint import HeadConfigError, ModelFingerprint, fingerprint_of
from sglang_mminfer.head_config.provenance import Defaults, Provenance

__all__ = [
    "Defaults",
    "HeadConfig",
    "HeadConfigError",
    "ModelBasis",
    "ModelFingerprint",
    "Provenance",
    "fingerprint_of",
    "words_of",
]
