"""Text and YAML values as the types of options, checked strictly, and those types in words."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from puna.errors import UserError, nearest

INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
ESCAPE = re.compile(r"\\([ntr\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value`, from YAML or as the text of the command line, as the type `hint`. Raises UserError, which names `name`.

    An integer is an optional sign and digits; a number must be finite. Neither takes blanks, underscores or words.
    """
    try:
        return _convert(value, hint)
    except (ValueError, OverflowError, yaml.YAMLError, RecursionError):
        close = nearest(str(value), map(str, typing.get_args(hint))) if typing.get_origin(hint) is Literal else ""
        raise UserError(f"{name} takes {in_words(hint)}, not {value!r:.200}{close}") from None


def unescape(text: str) -> str:
    r"""The text with \n, \t, \r, \\, \xHH and \uHHHH replaced by their characters, and other backslashes kept."""
    return ESCAPE.sub(lambda match: ESCAPES.get(match[1]) or chr(int(match[1][1:], 16)), text)


def bare(hint: Any) -> Any:
    """`T` of an optional `T | None`."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if _is_union(hint) and len(members) == 1 else hint


def is_list(hint: Any) -> bool:
    return typing.get_origin(bare(hint)) is tuple


def in_words(hint: Any) -> str:
    """The values of a type in words, for error messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return " or ".join(in_words(member) for member in args if member is not type(None))
    if origin is Literal:
        *most, last = map(str, args)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is tuple:
        return {int: "whole numbers, as in 1,4,16", float: "numbers, as in 0.5,1"}.get(args[0], "text")
    if origin in (dict, Mapping):
        return "a mapping, as in '{13: -100}'"
    return {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}.get(hint, "text")


def metavar(hint: Any) -> str:
    """The placeholder of a value in --help."""
    hint = bare(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return "|".join(metavar(member) for member in args if member is not type(None))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return metavar(args[0]) + (",..." if args[0] in (int, float) else "")
    return {bool: "true|false", int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(hint, "{KEY: VALUE}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _convert(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        if value is None and type(None) in args:
            return None
        for member in args:
            if member is not type(None):
                try:
                    return _convert(value, member)
                except ValueError:
                    continue
        raise ValueError
    if origin is Literal:
        for choice in args:
            if value == choice or str(value) == str(choice):
                return choice
        raise ValueError
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        if args[0] in (int, float):  # 128,512
            items = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
        return tuple(_convert(item, args[0]) for item in items)
    if origin in (dict, Mapping):
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError
        return {_convert(key, args[0]): _convert(item, args[1]) for key, item in value.items()}
    if hint is bool:
        if isinstance(value, str) and value.lower() in BOOLEANS:
            return BOOLEANS[value.lower()]
        if isinstance(value, bool):
            return value
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    if hint is int and not (isinstance(value, int) or isinstance(value, str) and INTEGER.fullmatch(value)):
        raise ValueError
    if hint is float and (isinstance(value, str) and not NUMBER.fullmatch(value) or not math.isfinite(float(value))):
        raise ValueError
    if hint is Path and value == "":  # Path("") would be the working directory
        raise ValueError
    return Path(str(value)).expanduser() if hint is Path else hint(value)
