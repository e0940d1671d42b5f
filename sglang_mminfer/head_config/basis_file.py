"""The low-rank forms of a model's heads in a file beside its head config: NAME.basis.npz beside NAME.json.

A NumPy archive of three arrays: `header`, JSON text with `schema`, `model` (a fingerprint) and `provenance` as in a
head config; `queries` and `keys`, float32 [layers, n, rank, D], as in `Basis`. It may have a fourth: `shares`, float32
[layers, query heads], as in `Basis`, of heads that choose by the pattern `rule` of the header. Whatever else it holds,
or holds otherwise, is an error. Nothing in it is executed: pickled objects are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch

from sglang_mminfer.head_config.fingerprint import HeadConfigError, ModelFingerprint
from sglang_mminfer.head_config.json_format import Misplaced, pattern_from_json, pattern_to_json
from sglang_mminfer.head_config.provenance import Provenance
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.basis import Basis, basis_of

SCHEMA = 1
ENDING = ".basis.npz"
ARRAYS = ("header", "queries", "keys")
SHARES = "shares"


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    schema: int
    model: ModelFingerprint
    provenance: Provenance
    rule: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class ModelBasis:
    """The bases of all layers of a model.

    queries, keys: float32 [layers, n, rank, D], see `Basis`. A layer whose attention is no plain one has 0.
    shares: float32 [layers, query heads], from 0 to 1, see `Basis`; None: they are not known.
    rule: the pattern of heads that visit these shares; None like `shares`.
    """

    model: ModelFingerprint
    provenance: Provenance
    queries: torch.Tensor
    keys: torch.Tensor
    shares: torch.Tensor | None = None
    rule: Adaptive | None = None

    @classmethod
    def of_moments(
        cls,
        model: ModelFingerprint,
        provenance: Provenance,
        q_moments: torch.Tensor,
        k_moments: torch.Tensor,
        rank: int,
        *,
        shared: bool = True,
    ) -> ModelBasis:
        """From the second moments of a calibration run.

        Args:
            q_moments: float64 [layers, Hq, D, D]; k_moments: float64 [layers, Hkv, D, D], see `basis.second_moments`.
            shared: the query heads of a KV head share a form.

        Raises:
            ValueError: no such rank.
        """
        layers = [basis_of(q, k, rank, shared=shared) for q, k in zip(q_moments, k_moments)]
        queries, keys = (torch.stack(part) for part in zip(*((layer.queries, layer.keys) for layer in layers)))
        return cls(model, provenance, queries, keys)

    def with_shares(self, shares: torch.Tensor, rule: Adaptive) -> ModelBasis:
        """The same with what heads visit that choose by a rule; as it is if that is not known (NaN) of some, or if the
        rule asks for a higher rank."""
        if shares.isnan().any() or rule.rank > self.rank:
            return self
        return dataclasses.replace(self, shares=shares, rule=rule)

    @property
    def rank(self) -> int:
        """The largest rank that it serves."""
        return self.queries.shape[2]

    @cached_property
    def digest(self) -> str:
        """A digest of the numbers by which rows choose: what rows see, and so what is cached, follows from them."""
        content = hashlib.sha256()
        for part in (self.queries, self.keys):
            content.update(str(tuple(part.shape)).encode())
            content.update(np.ascontiguousarray(part.numpy()).tobytes())
        return content.hexdigest()[:12]

    def layer(self, number: int, first_head: int, count: int, device: torch.device) -> Basis:
        """The basis of the query heads [first_head, first_head + count) of a layer, which are those of one rank."""
        own = slice(first_head, first_head + count)
        shares = self.shares_of(number)
        return Basis(self.queries[number], self.keys[number], shares).part(own, self.model.heads).to(device)

    def shares_of(self, layer: int) -> torch.Tensor | None:
        """float32 [query heads]; None: they are not known."""
        return self.shares[layer] if self.shares is not None and bool(self.queries[layer].any()) else None

    def save(self, path: str | Path) -> None:
        """Write it; `load` reads it back."""
        rule = None if self.rule is None else pattern_to_json(self.rule)
        header = msgspec.json.encode(_Header(SCHEMA, self.model, self.provenance, rule)).decode()
        arrays = {"header": np.array(header), "queries": self.queries.numpy(), "keys": self.keys.numpy()}
        if self.shares is not None:
            arrays[SHARES] = self.shares.numpy()
        with Path(path).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> ModelBasis:
        """Read a file.

        Raises:
            HeadConfigError: naming the file, the place in it, and what was expected there.
        """

        def fail(what: str) -> NoReturn:
            raise HeadConfigError(f"{path}: {what}")

        try:
            with np.load(path, allow_pickle=False) as archive:
                if set(archive.files) - {SHARES} != set(ARRAYS):
                    expected = f"{', '.join(ARRAYS)}, and perhaps {SHARES}"
                    fail(f"expected the arrays {expected}, got {', '.join(archive.files) or 'none'}")
                header, queries, keys = (archive[name] for name in ARRAYS)
                shares = archive[SHARES] if SHARES in archive.files else None
        except FileNotFoundError:
            fail("no such file")
        except HeadConfigError:
            raise
        except (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            fail(f"not a NumPy archive of plain arrays: {error}")
        if header.dtype.kind != "U" or header.ndim:
            fail(f"header: expected one text, got {header.dtype} {list(header.shape)}")
        try:
            found = msgspec.json.decode(str(header), type=_Header)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            fail(f"header: {error}")
        if found.schema != SCHEMA:
            fail(f"header.schema: expected {SCHEMA}, got {found.schema}")
        model = found.model
        for name, array in (("queries", queries), ("keys", keys)):
            shape = f"[{model.layers}, {model.kv_heads} or {model.heads}, rank, {model.head_dim}]"
            fits = array.ndim == 4 and (array.shape[0], array.shape[3]) == (model.layers, model.head_dim)
            fits = fits and array.shape[1] in (model.kv_heads, model.heads) and 1 <= array.shape[2] <= model.head_dim
            if array.dtype != np.float32 or not fits:
                fail(f"{name}: expected float32 {shape} as in header.model, got {array.dtype} {list(array.shape)}")
            if not np.isfinite(array).all():
                fail(f"{name}: expected finite numbers")
        if queries.shape != keys.shape:
            fail(f"keys: expected the shape of queries {list(queries.shape)}, got {list(keys.shape)}")
        if (shares is None) != (found.rule is None):
            fail(f"{SHARES}: expected together with header.rule, the pattern of heads that visit them")
        basis = cls(model, found.provenance, torch.from_numpy(queries), torch.from_numpy(keys))
        if shares is None or found.rule is None:
            return basis
        if shares.dtype != np.float32 or shares.shape != (model.layers, model.heads):
            expected = f"float32 [{model.layers}, {model.heads}] as in header.model"
            fail(f"{SHARES}: expected {expected}, got {shares.dtype} {list(shares.shape)}")
        if not ((shares >= 0) & (shares <= 1)).all():
            fail(f"{SHARES}: expected numbers from 0 to 1")
        try:
            rule = pattern_from_json(found.rule, "header.rule")
        except Misplaced as error:
            fail(str(error))
        if not isinstance(rule, Adaptive):
            fail(f"header.rule: expected a pattern that chooses keys by a basis, got {rule.kind}")
        return dataclasses.replace(basis, shares=torch.from_numpy(shares), rule=rule)
