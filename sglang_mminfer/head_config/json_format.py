"""The JSON of head configs (docs/head-configs.md): reading it strictly, and writing it.

An unknown key, a repeated key, a value out of range or a wrong shape is a `Misplaced` that names the place in the file.
Nothing in a file is executed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NoReturn

import msgspec

from sglang_mminfer.head_config.fingerprint import ModelFingerprint
from sglang_mminfer.head_config.provenance import NEEDED, NO_DEFAULTS, Defaults, Provenance
from sglang_mminfer.modality.segments import Modality
from sglang_mminfer.patterns.base import Pattern, fields_of, kinds
from sglang_mminfer.patterns.boundary import Boundary, Boundary2D, HeadPattern, QBoundary

SCHEMA = 1

Form = Literal["all", "cycle", "layers"]


class Misplaced(ValueError):
    """An error at a place in a file. The message names the place; the caller adds the name of the file.

    It is one line, whatever keys and names of the file it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class Content(NamedTuple):
    """What a file holds. form, rows: as in `HeadConfig`."""

    provenance: Provenance
    form: Form
    rows: tuple[tuple[HeadPattern, ...], ...]
    model: ModelFingerprint | None
    defaults: Defaults


def decode(text: str) -> Content:
    """Read a file's text.

    Raises:
        Misplaced: naming the place and what was expected there.
    """
    try:
        document = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constants)
    except json.JSONDecodeError as error:
        raise Misplaced(f"not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise Misplaced("not valid JSON: nested too deeply") from None
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # an escape that is half of a pair: nobody can write it again, or print it
        raise Misplaced(f"expected Unicode text, got {error.object[error.start]!a}") from None
    schema = document.get("schema", SCHEMA) if isinstance(document, dict) else SCHEMA
    if schema != SCHEMA:  # before anything else: another version may have other keys
        raise Misplaced(f"schema: expected {SCHEMA}, got {json.dumps(schema)}")
    file = _convert(document, _File, "")
    named = {key: _head(value, f"named.{key}", None) for key, value in file.named.items()}
    form, rows = _heads(file.heads, named)
    return Content(file.provenance, form, rows, file.model, file.defaults)


def encode(content: Content) -> str:
    """The text of a file that reads back as this content, with a line for each head or layer.

    In the "layers" form heads are written by their names in `named`, so that 28 x 28 of them stay readable.
    """
    top: list[tuple[str, str]] = [("schema", json.dumps(SCHEMA))]
    top.append(("model", _compact(msgspec.to_builtins(content.model))))
    top.append(("provenance", _block(msgspec.to_builtins(content.provenance).items())))
    top.append(("defaults", _compact(msgspec.to_builtins(content.defaults))))
    if content.form == "layers":
        names = _names(head for row in content.rows for head in row)
        top.append(("named", _block((name, _head_json(head)) for head, name in names.items())))
        lines = [_compact([names[head] for head in row]) for row in content.rows]
        top.append(("heads", "[\n    " + ",\n    ".join(lines) + "\n  ]"))
    elif content.form == "cycle":
        lines = [_compact(_head_json(head)) for head in content.rows[0]]
        top.append(("heads", '{"cycle": [\n    ' + ",\n    ".join(lines) + "\n  ]}"))
    else:
        top.append(("heads", _compact({"all": _head_json(content.rows[0][0])})))
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in top) + "\n}\n"


# ---- reading -------------------------------------------------------------------------------------------------


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The top level of a file. Heads are converted later, one by one, so that an error names the head's place."""

    schema: int
    model: ModelFingerprint | None
    provenance: Provenance
    heads: Any
    defaults: Defaults = NO_DEFAULTS
    named: dict[str, Any] = {}


# The tagged structs of the file are made from the pattern classes, so that a new pattern or a new field needs no second
# list here. Bounds are checked by the classes' constructors, whose sentences say what came.


def _pattern_struct(kind: str, pattern: type[Pattern]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for field in fields_of(pattern):
        default = () if field.default is dataclasses.MISSING else (field.default,)
        fields.append((field.name, field.type, *default))

    def to_pattern(self: Any) -> Pattern:
        return pattern(**{field.name: getattr(self, field.name) for field in fields_of(pattern)})

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
    """A struct with one optional field for each key. It is no dict, because msgspec's errors name no key of a dict."""
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


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys. The json module would take the last value; here a repeated key is an error."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise Misplaced(f'key "{key}" stands twice in one object')
        result[key] = value
    return result


def _no_constants(constant: str) -> NoReturn:
    raise Misplaced(f"{constant} is not JSON")


def _heads(value: Any, named: Mapping[str, HeadPattern]) -> tuple[Any, tuple[tuple[HeadPattern, ...], ...]]:
    if isinstance(value, list):
        rows = []
        for i, row in enumerate(value):
            if not isinstance(row, list):
                raise Misplaced(f"heads[{i}]: expected a list of heads (one layer), got {_kind(row)}")
            rows.append(tuple(_head(head, f"heads[{i}][{j}]", named) for j, head in enumerate(row)))
        return "layers", tuple(rows)
    if isinstance(value, dict) and list(value) == ["all"]:
        return "all", ((_head(value["all"], "heads.all", named),),)
    if isinstance(value, dict) and list(value) == ["cycle"]:
        if not isinstance(value["cycle"], list):
            raise Misplaced(f"heads.cycle: expected a list of heads, got {_kind(value['cycle'])}")
        return "cycle", (tuple(_head(head, f"heads.cycle[{i}]", named) for i, head in enumerate(value["cycle"])),)
    got = f"the keys {', '.join(value) or 'none'}" if isinstance(value, dict) else _kind(value)
    raise Misplaced(f'heads: expected {{"all": head}}, {{"cycle": [heads]}} or a list of layers, got {got}')


def _head(value: Any, where: str, named: Mapping[str, HeadPattern] | None) -> HeadPattern:
    """A head, written out or, if `named` is given, by its name there.

    Args:
        where: the head's place in the file, for errors.
    """
    if isinstance(value, str) and named is not None:
        if value not in named:
            raise Misplaced(f'{where}: no head is named "{value}"; named: {", ".join(named) or "none"}')
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
        raise Misplaced(f"{where}.patterns: expected at least one pattern, got none")
    _check_overlap(list(patterns), f"{where}.patterns")
    if struct.__struct_config__.tag == "q":
        return QBoundary({Modality(key): pattern for key, pattern in patterns.items()})
    pairs = {tuple(Modality(m) for m in key.split("/")): pattern for key, pattern in patterns.items()}
    return Boundary2D(typing.cast(dict[tuple[Modality, Modality], Any], pairs))


def _check_overlap(keys: list[str], where: str) -> None:
    """Raises Misplaced if two keys overlap. The boundary classes check it too, but their errors name no place."""
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            sides = [(Modality(a), Modality(b)) for a, b in zip(first.split("/"), second.split("/"))]
            if all(a.covers(b) or b.covers(a) for a, b in sides):
                raise Misplaced(f'{where}: "{first}" and "{second}" overlap, so that one head has two patterns')


_ALTERNATIVES = {field.name: list(field.choices) for pattern in kinds().values() for field in fields_of(pattern)}
_ALTERNATIVES |= {"kind": list(kinds()), "boundary": ["none", "q", "2d"], "how": list(NEEDED)}
_TYPES = {"object": "an object", "array": "a list", "str": "a string", "int": "an integer"}
_TYPES |= {"float": "a number", "bool": "true or false", "null": "null"}


def _convert(value: Any, into: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        raise Misplaced(_restate(str(error), where)) from None


def _restate(text: str, where: str) -> str:
    """msgspec's sentence, place first: "heads[3][5].pattern.sink: expected an integer >= 0, got -1"."""
    message, _, place = text.partition(" - at `$")
    where = (where + place.removesuffix("`")).lstrip(".")
    if match := re.fullmatch(r"(?:[A-Z]\w*\.)?([a-z]\w*): (.*)", message, re.DOTALL):  # ours, or a pattern's
        where, message = f"{where}.{match[1]}".lstrip("."), match[2]
    elif match := re.fullmatch(r"Object (?:contains unknown|missing required) field `(.*)`", message):
        is_unknown = "unknown" in message.partition("`")[0]
        message = f'unknown key "{match[1]}"' if is_unknown else f'missing key "{match[1]}"'
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


def pattern_from_json(value: Any, where: str) -> Pattern:
    """The pattern that `pattern_to_json` turned into JSON values.

    Args:
        where: its place in the file, for errors.

    Raises:
        Misplaced: naming the place and what was expected there.
    """
    pattern: Pattern = _convert(value, _PATTERN, where).to_pattern()
    return pattern


# ---- writing -------------------------------------------------------------------------------------------------


def pattern_to_json(pattern: Any) -> dict[str, Any]:
    """A pattern without a boundary as JSON values."""
    return {"kind": pattern.kind, **dataclasses.asdict(pattern)}


def _head_json(head: HeadPattern) -> dict[str, Any]:
    if isinstance(head, QBoundary):
        return {"boundary": "q", "patterns": {m.value: pattern_to_json(p) for m, p in head.patterns.items()}}
    if isinstance(head, Boundary2D):
        patterns = {f"{q.value}/{k.value}": pattern_to_json(p) for (q, k), p in head.patterns.items()}
        return {"boundary": "2d", "patterns": patterns}
    return {"boundary": "none", "pattern": pattern_to_json(head)}


def _names(heads: Iterator[HeadPattern]) -> dict[HeadPattern, str]:
    """A name for each distinct head: its kind and a number, from 1 for each kind."""
    names: dict[HeadPattern, str] = {}
    count: dict[str, int] = {}
    for head in heads:
        if head not in names:
            base = f"boundary_{head.kind}" if isinstance(head, Boundary) else head.kind
            count[base] = count.get(base, 0) + 1
            names[head] = f"{base}_{count[base]}"
    return names


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(items: Any) -> str:
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {_compact(value)}" for key, value in items) + "\n  }"
