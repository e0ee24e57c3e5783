# SPDX-License-Identifier: Apache-2.0
"""Tools that a conversation offers, and calls of them: JSON text or objects, checked and made plain."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from thinkfusion.reading import DataError, Reading, show
from thinkfusion.texts import check_characters, check_data, check_written

DEEPEST = 32
"""Objects and lists within each other. Chat templates write JSON by recursion, which their engines limit."""
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# A null under these keys of a schema is a value; under any other it says that the key is absent.
_NULLABLE = frozenset({"default", "const"})


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError for anything that is none, keys given twice and NaN included."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _plain(value: Any) -> tuple[Any, str]:
    """A copy of `value` that holds nothing but JSON, and its text; raises ValueError if there is none."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        copy = json.loads(text)
        same = copy == value
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not same:
        raise ValueError("it holds keys or values that JSON has not")
    if text.count("{") + text.count("[") > DEEPEST and _depth(copy) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return copy, text


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def as_list(place: str, value: Any, reason: str) -> Sequence[Any]:
    """`value` as a sequence, nothing as an empty one."""
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        raise DataError(reason, f"{place}: found {show(value)}, expected a list.")
    return value


def read_tools(value: Any, reading: Reading) -> tuple[dict[str, Any], ...]:
    """The tools of a row, from a list or its JSON text. The reading learns the schemas of their arguments."""
    is_text = isinstance(value, str)
    if is_text:
        if not value.strip():
            return ()
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError("bad_tools", f"tools: not JSON ({error}); found {show(value)}, expected a list.") from None
    return tuple(
        _tool(f"tools[{index}]", tool, reading, filled=not is_text)
        for index, tool in enumerate(as_list("tools", value, "bad_tools"))
    )


def _tool(place: str, tool: Any, reading: Reading, *, filled: bool) -> dict[str, Any]:
    function = _function(tool)
    if function is None:
        raise DataError("bad_tools", f"{place}: found {show(tool)}, expected a function with a name.")
    _check_name(place, function["name"], "bad_tools")
    try:
        plain, text = _plain(dict(tool))
    except ValueError as error:
        raise DataError("bad_tools", f"{place}: no plain JSON ({error}); found {show(tool)}.") from None
    check_data(place, text, reading)
    kept: dict[str, Any] = _without_nulls(plain) if filled and "null" in text else plain
    if kept != plain:
        reading.repaired("filled_nulls", f"{place}: keys of the schema that are null are taken for absent.")
    reading.schemas[function["name"]] = (_function(kept) or {}).get("parameters")
    return kept


def _function(value: Any) -> Mapping[str, Any] | None:
    """The object that holds the name: `value`, or its `function`."""
    if not isinstance(value, Mapping):
        return None
    function = value.get("function")
    function = value if function is None else function
    return function if isinstance(function, Mapping) and isinstance(function.get("name"), str) else None


def _check_name(place: str, name: str, reason: str) -> None:
    if not _NAME.fullmatch(name):
        raise DataError(reason, f"{place}.name: found {show(name)}, expected letters, digits, '_', '-' and '.' only.")


def _without_nulls(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_nulls(value) for key, value in schema.items() if value is not None or key in _NULLABLE}
    return [_without_nulls(item) for item in schema] if isinstance(schema, list) else schema


def read_tool_call(place: str, call: Any, reading: Reading) -> dict[str, Any]:
    """A call as `{"name", "arguments"}`, the arguments being an object whose text a template can write."""
    function = _function(call)
    if function is None:
        raise DataError("bad_message", f"{place}: found {show(call)}, expected a function with a name.")
    _check_name(place, function["name"], "bad_message")
    given = function.get("arguments", {})
    arguments = given
    try:
        arguments, text = _plain(parse_json(given) if isinstance(given, str) else _object(given))
    except ValueError as error:
        raise DataError("bad_tool_arguments", f"{place}.arguments: not JSON ({error}); found {show(given)}.") from None
    if not isinstance(arguments, dict):
        raise DataError("bad_tool_arguments", f"{place}.arguments: found {show(arguments)}, expected an object.")
    check_characters(f"{place}.arguments", text, reading)
    check_written(f"{place}.arguments", text, reading)
    if not isinstance(given, str) and "null" in text:
        # Arrow fills the keys of all rows into each; a JSON text is left as it is by it.
        kept = _without_filled(arguments, reading.schemas.get(function["name"]))
        if kept != arguments:
            reading.repaired("filled_nulls", f"{place}.arguments: nulls under keys that the tool does not have.")
        arguments = kept
    return {"name": function["name"], "arguments": arguments}


def _object(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _without_filled(value: Any, schema: Any) -> Any:
    """`value` without the nulls whose keys its schema lacks; a schema that lists no properties tells nothing."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_without_filled(item, schema.get("items")) for item in value]
    known = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(known, dict):
        return value
    return {
        key: _without_filled(item, known.get(key)) for key, item in value.items() if item is not None or key in known
    }
