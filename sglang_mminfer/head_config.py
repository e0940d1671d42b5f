"""Head configs: JSON files that give every attention head its boundary and its pattern (DESIGN section 6).

The format is described in docs/head-configs.md. It is read strictly: an unknown key, a repeated key, a
value out of range or a wrong shape is a `HeadConfigError` that names the file and the place in it. Nothing in
a file is executed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec

from sglang_mminfer.families.maps import reader_of
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Pattern, fields_of, kinds
from sglang_mminfer.patterns.boundary import Boundary, Boundary2D, HeadPattern, QBoundary, patterns_of
from sglang_mminfer.patterns.dense import Dense

SCHEMA = 1
_PACKAGE = "sglang_mminfer.head_configs"
_LARGEST = 2**31 - 1  # positions are int32 in the index tables


class HeadConfigError(ValueError):
    """A head config that cannot be used. The text names the file and the place in it."""


class ModelFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model must share with the one a config was made for; the numbers are the text model's."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rope_theta: float

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}")


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a config came about. A search names its calibration input, budget and date; a hand says why.

    `details` is for whatever else a search wants to keep; nothing reads it.
    """

    how: Literal["handwritten", "search"]
    note: str
    calibration: str | None = None
    budget: str | None = None
    date: str | None = None
    details: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.note.strip():
            raise ValueError("note: expected some words, got none")
        if self.how == "search":
            for name in ("calibration", "budget", "date"):
                if not getattr(self, name):
                    raise ValueError(f'{name}: expected a value, as `how` is "search"')
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f'date: expected YYYY-MM-DD, got "{self.date}"') from None


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for all heads. Rows at absolute positions below `dense_below` see everything."""

    dense_below: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dense_below <= _LARGEST:
            raise ValueError(f"dense_below: expected an integer of 0 .. {_LARGEST}, got {self.dense_below}")


_NO_DEFAULTS = Defaults()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The top of a file; heads are read after it, each with its own place."""

    schema: int
    model: ModelFingerprint | None
    provenance: Provenance
    heads: Any
    defaults: Defaults = _NO_DEFAULTS
    named: dict[str, Any] = {}


# The tagged structs of the file are made from the pattern classes, so that a new pattern or a new field needs no second
# list here. Bounds are checked by the classes' constructors, whose sentences say what came.


def _pattern_struct(kind: str, pattern: type[Pattern]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for field in fields_of(pattern):
        default = () if field.default is dataclasses.MISSING else (field.default,)
        fields.append((field.name, field.type, *default))

    def to_pattern(self: Any) -> Pattern:
        values = {field.name: getattr(self, field.name) for field in fields_of(pattern)}
        for name, value in values.items():
            if isinstance(value, int) and value > _LARGEST:
                raise ValueError(f"{name}: expected an integer <= {_LARGEST}, got {value}")
        return pattern(**values)

    return msgspec.defstruct(
        f"_{pattern.__name__}",
        fields,
        namespace={"to_pattern": to_pattern, "__post_init__": to_pattern},
        tag_field="kind",
        tag=kind,
        forbid_unknown_fields=True,
    )


def _head_struct(tag: str, fields: list[Any]) -> Any:
    return msgspec.defstruct(f"_Head_{tag}", fields, tag_field="boundary", tag=tag, forbid_unknown_fields=True)


def _patterns_struct(name: str, keys: Sequence[str]) -> Any:
    """One optional member for each key (not a dict: msgspec names no key of a dict in its errors)."""
    names = {re.sub(r"\W", "_", key): key for key in keys}
    fields = [(field, _PATTERN | msgspec.UnsetType, msgspec.UNSET) for field in names]
    return msgspec.defstruct(name, fields, rename=names, forbid_unknown_fields=True)


_QUERY_KEYS = [m.value for m in Modality]
_PAIR_KEYS = [f"{q}/{k}" for q in _QUERY_KEYS for k in _QUERY_KEYS]
_PATTERN: Any = typing.Union[tuple(_pattern_struct(*item) for item in kinds().items())]  # noqa: UP007
_HEAD: Any = typing.Union[  # noqa: UP007
    _head_struct("none", [("pattern", _PATTERN)]),
    _head_struct("q", [("patterns", _patterns_struct("_QueryPatterns", _QUERY_KEYS))]),
    _head_struct("2d", [("patterns", _patterns_struct("_PairPatterns", _PAIR_KEYS))]),
]


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What every head of a model does.

    `form` says how `rows` are spread over the model: "all" has one head for everything, "cycle" has n heads
    and head h of layer l takes entry (l + h) % n, "layers" has one row of heads for each layer.
    """

    name: str
    provenance: Provenance
    form: Literal["all", "cycle", "layers"]
    rows: tuple[tuple[HeadPattern, ...], ...]
    model: ModelFingerprint | None = None
    defaults: Defaults = _NO_DEFAULTS
    path: str | None = None
    schema: int = SCHEMA
    num_layers: int | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        if not self.rows or not self.rows[0]:
            self._fail("heads", "expected at least one head, got none")
        if self.form != "layers":
            if len(self.rows) != 1 or (self.form == "all" and len(self.rows[0]) != 1):
                self._fail("heads", f"expected one row of heads, got {len(self.rows)}")
            return
        for i, row in enumerate(self.rows):
            if len(row) != len(self.rows[0]):
                self._fail(f"heads[{i}]", f"expected {len(self.rows[0])} heads as in heads[0], got {len(row)}")
        if self.model is not None:
            self._fit(self.model.layers, self.model.heads, "the fingerprint in `model`")

    # Reading

    @classmethod
    def load(cls, name_or_path: str | Path) -> HeadConfig:
        """Read a built-in config by its name, or a file by its path (with a separator, or ending in .json).

        Raises:
            HeadConfigError: if there is no such config, or anything in it is wrong.
        """
        text = str(name_or_path)
        if isinstance(name_or_path, Path) or "/" in text or "\\" in text or text.endswith(".json"):
            path = Path(name_or_path).expanduser()
            return cls._parse(_read(path, str(path)), path.stem, str(path))
        packaged = resources.files(_PACKAGE) / f"{text}.json"
        if not re.fullmatch(r"[\w-]+", text) or not packaged.is_file():
            raise HeadConfigError(
                f'head config "{text}": no built-in config has this name; available: '
                f"{', '.join(cls.available())}. A path needs a separator or the ending .json."
            )
        return cls._parse(_read(packaged, str(packaged)), text, str(packaged))

    @staticmethod
    def available() -> list[str]:
        """Names of the built-in configs."""
        files = (Path(entry.name) for entry in resources.files(_PACKAGE).iterdir())
        return sorted(f.stem for f in files if f.suffix == ".json")

    @classmethod
    def from_json(cls, text: str, name: str = "unnamed") -> HeadConfig:
        """Read a config that is no file (yet)."""
        return cls._parse(text, name, None)

    @classmethod
    def _parse(cls, text: str, name: str, path: str | None) -> HeadConfig:
        label = _label(path, name)
        try:
            document = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constants)
        except json.JSONDecodeError as error:
            raise HeadConfigError(
                f"{label}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            ) from None
        except RecursionError:
            raise HeadConfigError(f"{label}: not valid JSON: nested too deeply") from None
        except ValueError as error:
            raise HeadConfigError(f"{label}: {error}") from None
        schema = document.get("schema", SCHEMA) if isinstance(document, dict) else SCHEMA
        if schema != SCHEMA:  # before anything else: another version may have other keys
            raise HeadConfigError(f"{label}: schema: expected {SCHEMA}, got {json.dumps(schema)}")
        try:
            file = _convert(document, _File, "")
            named = {key: _head(value, f"named.{key}", None) for key, value in file.named.items()}
            form, rows = _heads(file.heads, named)
            return cls(name, file.provenance, form, rows, file.model, file.defaults, path, file.schema)
        except _Misplaced as error:
            raise HeadConfigError(f"{label}: {error}") from None

    # Asking

    def patterns(self, layer: int, num_heads: int | None = None) -> list[HeadPattern]:
        """One pattern for each query head of a layer: all heads of the model, not those of one rank.

        Before `bind` the number of heads may be unknown: then an "all" config gives ONE pattern that stands
        for every head, and a "cycle" config needs `num_heads`.
        """
        heads = num_heads if num_heads is not None else self.num_heads
        layers = len(self.rows) if self.form == "layers" else self.num_layers
        if layer < 0 or (layers is not None and layer >= layers):
            self._fail("heads", f"expected a layer of 0 .. {(layers or 1) - 1}, asked for layer {layer}")
        if self.form == "all":
            return list(self.rows[0]) * (heads or 1)
        if self.form == "cycle":
            if heads is None:
                self._fail("heads.cycle", "the number of heads must be known: bind the config to a model first")
            return [self.rows[0][(layer + h) % len(self.rows[0])] for h in range(heads)]
        if heads is not None and heads != len(self.rows[layer]):
            self._fail(f"heads[{layer}]", f"has {len(self.rows[layer])} heads, asked for {heads}")
        return list(self.rows[layer])

    def is_dense(self, layer: int) -> bool:
        """True if no head of the layer leaves anything out."""
        row = self.rows[layer] if self.form == "layers" else self.rows[0]
        return all(isinstance(pattern, Dense) for head in row for pattern in patterns_of(head))

    def bind(self, hf_config: Any) -> HeadConfig:
        """This config for one model: checked against it, and with its number of layers and heads."""
        self.check_model(hf_config)
        self._check_strides(hf_config)
        shape = fingerprint_of(hf_config)
        return dataclasses.replace(self, num_layers=shape.layers, num_heads=shape.heads)

    def check_model(self, hf_config: Any) -> None:
        """Compare with a transformers config.

        Raises:
            HeadConfigError: naming every field that differs, with both values.
        """
        if self.model is None and self.form != "layers":
            return
        found = fingerprint_of(hf_config)
        if self.model is not None:
            made, has = msgspec.to_builtins(self.model), msgspec.to_builtins(found)
            differing = [
                f"{field} (config {value}, model {has[field]})"
                for field, value in made.items()
                if value != has[field] and not (field == "rope_theta" and math.isclose(value, has[field], rel_tol=1e-6))
            ]
            if differing:
                self._fail("model", f"was made for another model: {', '.join(differing)}")
        if self.form == "layers":
            self._fit(found.layers, found.heads, "the model")

    def _check_strides(self, hf_config: Any) -> None:
        """Refuse what could never be sparse: lines through columns where the model's tokens have none."""
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

    def _fit(self, layers: int, heads: int, whose: str) -> None:
        if len(self.rows) != layers:
            self._fail("heads", f"expected {layers} layers as in {whose}, got {len(self.rows)}")
        if len(self.rows[0]) != heads:
            self._fail("heads[0]", f"expected {heads} heads as in {whose}, got {len(self.rows[0])}")

    def _fail(self, where: str, what: str) -> NoReturn:
        raise HeadConfigError(f"{_label(self.path, self.name)}: {where}: {what}")

    def describe(self) -> str:
        """One line for the log."""
        distinct = list(dict.fromkeys(head for row in self.rows for head in row))
        first = words_of(distinct[0])
        if self.form == "all":
            heads = f"all heads {first}"
        else:
            shape = "cycled over heads" if self.form == "cycle" else f"{len(self.rows)} x {len(self.rows[0])} heads"
            heads = f"{shape}, {len(distinct)} distinct, the first {first}"
        model = "any model" if self.model is None else self.model.architecture
        dense = f"; rows below {self.defaults.dense_below} dense" if self.defaults.dense_below else ""
        return f"{self.name} ({model}, {self.provenance.how}): {heads}{dense}"

    # Writing

    def to_json(self) -> str:
        """The text of a file that reads back as this config, a line for each head or layer.

        Heads of the "layers" form go through the table of names, so that 28 x 28 of them stay readable.
        """
        top: list[tuple[str, str]] = [("schema", json.dumps(self.schema))]
        top.append(("model", _compact(msgspec.to_builtins(self.model))))
        top.append(("provenance", _block(msgspec.to_builtins(self.provenance).items())))
        top.append(("defaults", _compact(msgspec.to_builtins(self.defaults))))
        if self.form == "layers":
            names = _names(head for row in self.rows for head in row)
            top.append(("named", _block((name, _head_json(head)) for head, name in names.items())))
            lines = [_compact([names[head] for head in row]) for row in self.rows]
            top.append(("heads", "[\n    " + ",\n    ".join(lines) + "\n  ]"))
        elif self.form == "cycle":
            lines = [_compact(_head_json(head)) for head in self.rows[0]]
            top.append(("heads", '{"cycle": [\n    ' + ",\n    ".join(lines) + "\n  ]}"))
        else:
            top.append(("heads", _compact({"all": _head_json(self.rows[0][0])})))
        return "{\n" + ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in top) + "\n}\n"


def fingerprint_of(hf_config: Any) -> ModelFingerprint:
    """The fingerprint of a transformers config; of its text model where it has one inside."""
    text = hf_config
    if hasattr(hf_config, "get_text_config"):
        text = hf_config.get_text_config()
    elif getattr(hf_config, "text_config", None) is not None:
        text = hf_config.text_config
    architectures = getattr(hf_config, "architectures", None) or [getattr(hf_config, "model_type", None)]
    try:
        heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
        return ModelFingerprint(
            architecture=str(architectures[0]),
            layers=int(text.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
            hidden_size=hidden,
            rope_theta=_rope_theta(text),
        )
    except AttributeError as error:
        raise HeadConfigError(f"the model's config has no text model a head config could fit: {error}") from None


def _rope_theta(text: Any) -> float:
    """Transformers 5 keeps it in `rope_parameters`, by layer type where they differ; older ones apart."""
    parameters = getattr(text, "rope_parameters", None) or {}
    for source in (parameters, parameters.get("full_attention") or {}):
        if source.get("rope_theta") is not None:
            return float(source["rope_theta"])
    return float(getattr(text, "rope_theta", None) or 10000.0)


class _Misplaced(ValueError):
    """Something wrong at a place of the file whose name the caller knows."""


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


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice and the last one win; here that is a mistake."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f'key "{key}" stands twice in one object')
        result[key] = value
    return result


def _no_constants(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _heads(value: Any, named: Mapping[str, HeadPattern]) -> tuple[Any, tuple[tuple[HeadPattern, ...], ...]]:
    if isinstance(value, list):
        rows = []
        for i, row in enumerate(value):
            if not isinstance(row, list):
                raise _Misplaced(f"heads[{i}]: expected a list of heads (one layer), got {_kind(row)}")
            rows.append(tuple(_head(head, f"heads[{i}][{j}]", named) for j, head in enumerate(row)))
        return "layers", tuple(rows)
    if isinstance(value, dict) and list(value) == ["all"]:
        return "all", ((_head(value["all"], "heads.all", named),),)
    if isinstance(value, dict) and list(value) == ["cycle"]:
        if not isinstance(value["cycle"], list):
            raise _Misplaced(f"heads.cycle: expected a list of heads, got {_kind(value['cycle'])}")
        return "cycle", (tuple(_head(head, f"heads.cycle[{i}]", named) for i, head in enumerate(value["cycle"])),)
    got = f"the keys {', '.join(value) or 'none'}" if isinstance(value, dict) else _kind(value)
    raise _Misplaced(f'heads: expected {{"all": head}}, {{"cycle": [heads]}} or a list of layers, got {got}')


def _head(value: Any, where: str, named: Mapping[str, HeadPattern] | None) -> HeadPattern:
    """One head, or the name of one where `named` is given."""
    if isinstance(value, str) and named is not None:
        if value not in named:
            raise _Misplaced(f'{where}: no head is named "{value}"; named: {", ".join(named) or "none"}')
        return named[value]
    struct = _convert(value, _HEAD, where)
    if hasattr(struct, "pattern"):
        return struct.pattern.to_pattern()
    patterns = {
        key: getattr(struct.patterns, field).to_pattern()
        for field, key in zip(struct.patterns.__struct_fields__, struct.patterns.__struct_encode_fields__)
        if getattr(struct.patterns, field) is not msgspec.UNSET
    }
    if not patterns:
        raise _Misplaced(f"{where}.patterns: expected at least one pattern, got none")
    _check_overlap(list(patterns), f"{where}.patterns")
    if struct.__struct_config__.tag == "q":
        return QBoundary({Modality(key): pattern for key, pattern in patterns.items()})
    pairs = {tuple(Modality(m) for m in key.split("/")): pattern for key, pattern in patterns.items()}
    return Boundary2D(typing.cast(dict[tuple[Modality, Modality], Any], pairs))


def _check_overlap(keys: list[str], where: str) -> None:
    """In the file's own words, before the boundary classes check it in theirs."""
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            sides = [(Modality(a), Modality(b)) for a, b in zip(first.split("/"), second.split("/"))]
            if all(a.covers(b) or b.covers(a) for a, b in sides):
                raise _Misplaced(f'{where}: "{first}" and "{second}" overlap, so that one head has two patterns')


_ALTERNATIVES = {field.name: list(field.choices) for pattern in kinds().values() for field in fields_of(pattern)}
_ALTERNATIVES |= {"kind": list(kinds()), "boundary": ["none", "q", "2d"], "how": ["handwritten", "search"]}
_TYPES = {"object": "an object", "array": "a list", "str": "a string", "int": "an integer"}
_TYPES |= {"float": "a number", "bool": "true or false", "null": "null"}


def _convert(value: Any, into: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        raise _Misplaced(_restate(str(error), where)) from None


def _restate(text: str, where: str) -> str:
    """msgspec's sentence, place first: "heads[3][5].pattern.sink: expected an integer >= 0, got -1"."""
    message, _, place = text.partition(" - at `$")
    where = (where + place.removesuffix("`")).lstrip(".")
    if match := re.fullmatch(r"(?:[A-Z]\w*\.)?([a-z]\w*): (.*)", message, re.DOTALL):  # ours, or a pattern's
        where, message = f"{where}.{match[1]}".lstrip("."), match[2]
    elif match := re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", message):
        known = "unknown" in message.partition("`")[0]
        message = f'unknown key "{match[1]}"' if known else f'missing key "{match[1]}"'
    elif match := re.fullmatch(r"Expected `(.*)`, got `(.*)`", message):
        expected = " or ".join(_TYPES.get(t, t) for t in match[1].split(" | "))
        message = f"expected {expected}, got {_TYPES.get(match[2], match[2])}"
    elif match := re.fullmatch(r"Invalid (?:enum )?value (.*)", message):
        known_values = _ALTERNATIVES.get(where.rpartition(".")[2])
        message = f"expected one of {', '.join(known_values)}, got {match[1]}" if known_values else message
    return f"{where}: {message}" if where else message


def _kind(value: Any) -> str:
    for types, words in (
        (dict, "an object"),
        (list, "a list"),
        (str, "a string"),
        (bool, "true or false"),
        ((int, float), "a number"),
    ):
        if isinstance(value, types):
            return words
    return "null"


def _pattern_json(pattern: Any) -> dict[str, Any]:
    return {"kind": pattern.kind, **dataclasses.asdict(pattern)}


def _head_json(head: HeadPattern) -> dict[str, Any]:
    if isinstance(head, QBoundary):
        return {"boundary": "q", "patterns": {m.value: _pattern_json(p) for m, p in head.patterns.items()}}
    if isinstance(head, Boundary2D):
        patterns = {f"{q.value}/{k.value}": _pattern_json(p) for (q, k), p in head.patterns.items()}
        return {"boundary": "2d", "patterns": patterns}
    return {"boundary": "none", "pattern": _pattern_json(head)}


def _names(heads: Iterator[HeadPattern]) -> dict[HeadPattern, str]:
    """A name for each distinct head: its kind, numbered from 1 where it occurs with other values too."""
    names: dict[HeadPattern, str] = {}
    count: dict[str, int] = {}
    for head in heads:
        if head not in names:
            base = f"boundary_{head.kind}" if isinstance(head, Boundary) else head.kind
            count[base] = count.get(base, 0) + 1
            names[head] = f"{base}_{count[base]}"
    return names


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


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(items: Any) -> str:
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_compact(value)}" for key, value in items) + "\n  }"
