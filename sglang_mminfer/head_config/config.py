"""A head config: what every head of a model does, and whether it fits a model (design, section 6)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

from sglang_mminfer.families.maps import reader_of
from sglang_mminfer.head_config import hub, json_format
from sglang_mminfer.head_config.basis_file import ENDING, ModelBasis
from sglang_mminfer.head_config.fingerprint import HeadConfigError, ModelFingerprint, fingerprint_of
from sglang_mminfer.head_config.json_format import SCHEMA
from sglang_mminfer.head_config.provenance import NO_DEFAULTS, Defaults, Provenance
from sglang_mminfer.patterns.adaptive import Adaptive
from sglang_mminfer.patterns.boundary import Boundary2D, HeadPattern, QBoundary, patterns_of
from sglang_mminfer.patterns.dense import Dense

_PACKAGE = "sglang_mminfer.head_configs"


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What every head of a model does.

    Attributes:
        name: a built-in config's name, or the name of a file without its ending.
        form: how `rows` are spread over the model. "all": one head for everything. "cycle": one row of n heads, of
            which head h of layer l takes entry (l + h) % n. "layers": one row of heads for each layer of the model,
            which is empty for a layer without full attention.
        model: the model that the config was made for; None: any model.
        path: the file that the config was read from; on the hub `hf://owner/repo@commit/path/file.json`; None: no file.
        basis: the low-rank forms of the model's heads, for patterns that choose keys by them; None: these choose by
            q . k itself.
        num_layers, num_heads: those of the model that the config is bound to; None before `bind`.
        full_layers: the layers of that model with full attention, as in `ModelFingerprint`.

    Raises:
        HeadConfigError: if `rows` do not fit `form` or `model`.
    """

    name: str
    provenance: Provenance
    form: Literal["all", "cycle", "layers"]
    rows: tuple[tuple[HeadPattern, ...], ...]
    model: ModelFingerprint | None = None
    defaults: Defaults = NO_DEFAULTS
    path: str | None = None
    schema: int = SCHEMA
    num_layers: int | None = None
    num_heads: int | None = None
    full_layers: tuple[int, ...] | None = None
    basis: ModelBasis | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        if not any(self.rows):
            self._fail("heads", "expected at least one head, got none")
        self._check_basis()
        if self.form != "layers":
            if len(self.rows) != 1 or (self.form == "all" and len(self.rows[0]) != 1):
                self._fail("heads", f"expected one row of heads, got {len(self.rows)}")
            return
        first = next(i for i, row in enumerate(self.rows) if row)
        for i, row in enumerate(self.rows):
            if row and len(row) != len(self.rows[first]):
                expected = f"{len(self.rows[first])} heads as in heads[{first}]"
                self._fail(f"heads[{i}]", f"expected {expected}, got {len(row)}")
        if self.model is not None:
            self._fit(self.model, "the fingerprint in `model`")

    # Reading

    @classmethod
    def load(cls, name_or_path: str | Path) -> HeadConfig:
        """Read a built-in config by its name, a file by its path (with a separator, or ending in .json), or a file on
        the Hugging Face Hub by `hf://owner/repo[@revision]/path/file.json`. With a file comes the basis that lies
        beside it, if there is one: see `basis_file`.

        Raises:
            HeadConfigError: if there is no such config, or anything in it is wrong.
        """
        text = str(name_or_path)
        if hub.is_hub_name(text):
            found = hub.download(text)
            config = cls._parse(_read(found.config, found.name), found.config.stem, found.name)
            return dataclasses.replace(config, basis=ModelBasis.load(found.basis)) if found.basis else config
        if isinstance(name_or_path, Path) or "/" in text or "\\" in text or text.endswith(".json"):
            path = Path(name_or_path).expanduser()
            config = cls._parse(_read(path, str(path)), path.stem, str(path))
            beside = path.with_name(path.stem + ENDING)
            return dataclasses.replace(config, basis=ModelBasis.load(beside)) if beside.is_file() else config
        if text not in cls.available():
            raise HeadConfigError(
                f'head config "{text}": no built-in config has this name; available: '
                f"{', '.join(cls.available())}. A path needs a separator or the ending .json."
            )
        packaged = resources.files(_PACKAGE) / f"{text}.json"
        return cls._parse(_read(packaged, str(packaged)), text, str(packaged))

    @staticmethod
    def available() -> list[str]:
        """Names of the built-in configs."""
        files = (Path(entry.name) for entry in resources.files(_PACKAGE).iterdir())
        return sorted(f.stem for f in files if f.suffix == ".json")

    @classmethod
    def from_json(cls, text: str, name: str = "unnamed") -> HeadConfig:
        """Read a config from the text of a file. Errors: as `load`."""
        return cls._parse(text, name, None)

    @classmethod
    def _parse(cls, text: str, name: str, path: str | None) -> HeadConfig:
        try:
            content = json_format.decode(text)
        except json_format.Misplaced as error:
            raise HeadConfigError(f"{_label(path, name)}: {error}") from None
        return cls(name, content.provenance, content.form, content.rows, content.model, content.defaults, path)

    # Questions

    def patterns(self, layer: int, num_heads: int | None = None) -> list[HeadPattern]:
        """One pattern for each query head of a layer: all heads of the model, not those of one rank. A layer without
        attention has none.

        Before `bind` the number of heads may be unknown. Then an "all" config gives ONE pattern that stands for
        every head, and a "cycle" config needs `num_heads`.

        Raises:
            HeadConfigError: if the config has no such layer, or another number of heads, or a "cycle" config does not
                know the number.
        """
        heads = num_heads if num_heads is not None else self.num_heads
        layers = len(self.rows) if self.form == "layers" else self.num_layers
        if not isinstance(layer, int) or layer < 0 or (layers is not None and layer >= layers):
            expected = "a layer" if layers is None else f"a layer of 0 .. {layers - 1}"
            self._fail("heads", f"expected {expected}, asked for layer {layer!r}")
        if self.full_layers is not None and layer not in self.full_layers:
            return []
        if self.form == "all":
            return list(self.rows[0]) * (heads or 1)
        if self.form == "cycle":
            if heads is None:
                self._fail("heads.cycle", "the number of heads must be known: bind the config to a model first")
            return [self.rows[0][(layer + h) % len(self.rows[0])] for h in range(heads)]
        if heads is not None and self.rows[layer] and heads != len(self.rows[layer]):
            self._fail(f"heads[{layer}]", f"has {len(self.rows[layer])} heads, asked for {heads}")
        return list(self.rows[layer])

    @property
    def layers(self) -> list[list[HeadPattern]]:
        """The patterns of every layer of the model that this config is bound to."""
        assert self.num_layers is not None
        return [self.patterns(layer) for layer in range(self.num_layers)]

    @property
    def basis_rank(self) -> int:
        """The largest rank that a pattern asks of a basis; 0: none chooses keys by a basis."""
        return max(pattern.basis_rank for row in self.rows for head in row for pattern in patterns_of(head))

    @property
    def rule(self) -> Adaptive | None:
        """By which most heads choose keys, of those without a boundary; None: none does."""
        counts = Counter(head for row in self.rows for head in row if isinstance(head, Adaptive))
        return counts.most_common(1)[0][0] if counts else None

    def is_dense(self, layer: int) -> bool:
        """True if no head of the layer leaves anything out, or the layer has no attention."""
        if self.full_layers is not None and layer not in self.full_layers:
            return True
        return _are_dense(self.rows[layer] if self.form == "layers" else self.rows[0])

    @property
    def all_dense(self) -> bool:
        """True if no head of any layer leaves anything out."""
        return all(map(_are_dense, self.rows))

    def bind(self, hf_config: Any) -> HeadConfig:
        """This config for one model: checked against the model, and with its numbers of layers and heads.

        Raises:
            HeadConfigError: if the config does not fit the model.
        """
        self.check_model(hf_config)
        self._check_strides(hf_config)
        shape = fingerprint_of(hf_config)
        return dataclasses.replace(self, num_layers=shape.layers, num_heads=shape.heads, full_layers=shape.full_layers)

    def with_dense(self, heads: Iterable[tuple[int, int]]) -> HeadConfig:
        """This config, which is bound to a model, with some heads dense.

        Args:
            heads: (layer, head) of each.
        """
        rows = self.layers
        for layer, head in heads:
            rows[layer][head] = Dense()
        return dataclasses.replace(self, form="layers", rows=tuple(map(tuple, rows)))

    def check_model(self, hf_config: Any) -> None:
        """Compare this config with the transformers config of a model.

        Raises:
            HeadConfigError: naming every field that differs, with both values.
        """
        models = [("model", self.model), ("model of the basis", self.basis.model if self.basis else None)]
        if all(model is None for _, model in models) and self.form != "layers":
            return
        fingerprint = fingerprint_of(hf_config)
        for where, model in models:
            if model is None:
                continue
            pairs = {field: (getattr(model, field), getattr(fingerprint, field)) for field in model.__struct_fields__}
            differing = [
                f"{field} (config {value}, model {actual})"
                for field, (value, actual) in pairs.items()
                if value != actual and not (field == "rope_theta" and math.isclose(value, actual, rel_tol=1e-6))
            ]
            if differing:
                self._fail(where, f"was made for another model: {', '.join(differing)}")
        if self.form == "layers":
            self._fit(fingerprint, "the model")

    def _check_strides(self, hf_config: Any) -> None:
        """Refuse patterns that need columns if the model's vision tokens have none: they could never be sparse."""
        reader = reader_of(hf_config)
        if reader is None or reader.has_raster:
            return
        for layer, row in enumerate(self.rows):
            for number, head in enumerate(row):
                if by_column := next((p for p in patterns_of(head) if p.raster_stride == "row"), None):
                    where = {"all": "heads.all", "cycle": f"heads.cycle[{number}]"}.get(self.form)
                    self._fail(
                        where or f"heads[{layer}][{number}]",
                        f'a {by_column.kind} of stride "row" needs columns, and the vision tokens of this model are '
                        'merged and have neither rows nor columns; use stride "frame"',
                    )

    def _check_basis(self) -> None:
        if self.basis is not None and self.basis_rank > self.basis.rank:
            rank = self.basis.rank
            self._fail("heads", f"expected a rank of at most {rank}, which the basis has, got {self.basis_rank}")

    def _fit(self, model: ModelFingerprint, whose: str) -> None:
        if len(self.rows) != model.layers:
            self._fail("heads", f"expected {model.layers} layers as in {whose}, got {len(self.rows)}")
        for i, row in enumerate(self.rows):
            heads = model.heads if i in model.attention_layers else 0
            if len(row) != heads:
                without = "" if heads else ", where this layer has no attention"
                self._fail(f"heads[{i}]", f"expected {heads} heads as in {whose}{without}, got {len(row)}")

    def _fail(self, where: str, what: str) -> NoReturn:
        raise HeadConfigError(f"{_label(self.path, self.name)}: {where}: {what}")

    def describe(self, without_basis: str = "no basis: by q . k") -> str:
        """One line for the log.

        Args:
            without_basis: what heads do that choose by a basis, if there is none.
        """
        distinct = list(dict.fromkeys(head for row in self.rows for head in row))
        first = words_of(distinct[0])
        if self.form == "all":
            heads = f"all heads {first}"
        else:
            full = [row for row in self.rows if row]
            shape = "cycled over heads" if self.form == "cycle" else f"{len(full)} x {len(full[0])} heads"
            heads = f"{shape}, {len(distinct)} distinct, the first {first}"
        model = "any model" if self.model is None else self.model.architecture
        dense = f"; rows below {self.defaults.dense_below} dense" if self.defaults.dense_below else ""
        basis = ""
        if self.basis_rank:
            basis = f"; keys are chosen by a basis of rank {self.basis.rank}" if self.basis else f"; {without_basis}"
        place = f" from {self.path}" if self.path and hub.is_hub_name(self.path) else ""
        return f"{self.name}{place} ({model}, {self.provenance.how}): {heads}{dense}{basis}"

    # Writing

    def save(self, path: str | Path) -> None:
        """Write the config as JSON, with its basis beside it: `load` reads both back."""
        path = Path(path)
        beside = path.with_name(path.stem + ENDING)
        if self.basis is not None:
            self.basis.save(beside)
        else:
            beside.unlink(missing_ok=True)  # that of an earlier config of this name
        path.write_text(self.to_json())

    def to_json(self) -> str:
        """The text of a file that reads back as this config."""
        return json_format.encode(json_format.Content(self.provenance, self.form, self.rows, self.model, self.defaults))


def _are_dense(heads: Iterable[HeadPattern]) -> bool:
    return all(isinstance(pattern, Dense) for head in heads for pattern in patterns_of(head))


def _label(path: str | None, name: str) -> str:
    return path or f'head config "{name}"'


def _read(source: Any, label: str) -> str:
    try:
        return source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise HeadConfigError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise HeadConfigError(f"{label}: expected a file, this is a directory") from None
    except UnicodeDecodeError as error:
        raise HeadConfigError(f"{label}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise HeadConfigError(f"{label}: cannot be read: {error}") from None


def words_of(head: HeadPattern) -> str:
    """A head's pattern in a few words."""
    if isinstance(head, QBoundary):
        return "q(" + ", ".join(f"{m}: {words_of(p)}" for m, p in head.patterns.items()) + ")"
    if isinstance(head, Boundary2D):
        return "2d(" + ", ".join(f"{q}/{k}: {words_of(p)}" for (q, k), p in head.patterns.items()) + ")"
    values = [
        (f.name if value is True else f"{f.name} {value}")
        for f in dataclasses.fields(head)
        if (value := getattr(head, f.name)) is not False
    ]
    return f"{head.kind}({', '.join(values)})" if values else head.kind
