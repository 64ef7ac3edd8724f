"""What every block of settings shares: its base class, the strict YAML it is written in, its ranges in words.

Imports neither jax nor transformers.
"""

import dataclasses
import json
import numbers
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
import yaml.composer
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from dpo_jax.errors import COMMAND_LINE, UserError, nearest_file, printable, short


class Section(BaseModel):
    """A frozen block of settings: unknown keys are refused, defaults are validated, nan and inf are not numbers."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,
    )


# YAML 1.2 scalars. PyYAML's own (YAML 1.1) read 5e-7 as text, no as false and 010 as 8.
SCALARS: tuple[tuple[str, Callable[[str], Any]], ...] = (
    (r"~|null|Null|NULL|", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (r"[-+]?[0-9]{1,18}", int),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}
    nodes = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        self.nodes += 1
        self.depth += 1
        for wrong, problem in (
            (event.anchor is not None, "anchors and aliases (&, *) are refused"),  # few of them can stand for billions
            (getattr(event, "tag", None) is not None, "tags (!) are refused"),
            (self.depth > 20, "nested too deeply"),
            (self.nodes > 10_000, "more than 10,000 values; a config holds settings, not data"),
        ):
            if wrong:
                raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _plain(node: yaml.Node) -> Any:
    """Value of a YAML node; a list is a tuple."""
    if isinstance(node, yaml.SequenceNode):
        return tuple(_plain(item) for item in node.value)
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(key)): _plain(value) for key, value in node.value}
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:  # quoted: text, whatever it looks like
        return node.value
    return next((read(node.value) for form, read in SCALARS if re.fullmatch(form, node.value)), node.value)


def _parse(text: str, file: str | None = None) -> yaml.Node:
    """The tree of a YAML text, with line numbers; `_plain` makes values of it.

    Raises:
      UserError: not YAML, or one of the features of YAML that settings do not need; names the file and line, if any.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        problem = problem or getattr(error, "reason", None) or "syntax error"
        if "'\\t'" in problem:
            problem = "a tab where YAML wants spaces"
        raise UserError(f"{f'{file}:{line + 1}: ' if file else ''}not valid YAML: {problem}") from None
    return node or yaml.ScalarNode("", "", style=None)


SIZE_LIMIT = 1 << 20


@dataclasses.dataclass
class GivenSettings:
    """Settings by dotted key, where each came from, and what was wrong so far, a line for each fault."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    unreadable: list[str] = dataclasses.field(default_factory=list)
    origin: str = COMMAND_LINE  # the place to name for a setting that is nowhere

    def put(
        self, node: yaml.Node, key: str, where: str, file: str | None = None, seen: dict[str, str] | None = None
    ) -> None:
        """Take over a value, or every value of a block; `file` numbers the lines of a block's keys, and `seen` has the
        keys of the same text so far, so that one that it has twice, in a block and dotted, is a fault.

        A value in place of a whole section, as null or a list of objectives, ends what was given of it before.
        """
        seen = {} if seen is None else seen
        if not isinstance(node, yaml.MappingNode):
            self._forget(key, but=seen)
            self.values[key], self.where[key] = _plain(node), where
            return
        for name, value in node.value:
            here = f"{file}:{name.start_mark.line + 1}" if file else where
            inner = f"{key}.{name.value}" if key else str(name.value)
            if inner in seen:
                self.problems.append(f"{here}: {short(inner)}: is given twice, first at {seen[inner]}; keep one")
            seen[inner] = here
            self.put(value, inner, here, file, seen)

    def _forget(self, key: str, but: Collection[str] = ()) -> None:
        """Take out a value, so that the next stands in the order in which they were given last, and those inside it."""
        inside = [known for known in self.values if known.startswith(f"{key}.") and known not in but]
        for known in [key, *inside]:
            self.values.pop(known, None)

    def read(self, file: str) -> None:
        """Take over a YAML file."""
        self.origin = short(file)
        try:
            with open(file, "rb") as handle:
                content = handle.read(SIZE_LIMIT + 1)
            if len(content) > SIZE_LIMIT:
                raise UserError(f"{self.origin}: is larger than 1 MiB; a config holds settings, not data")
            node = _parse(content.decode("utf-8-sig"), self.origin)
        except OSError as error:
            self.unreadable.append(f"{self.origin}: {error.strerror or error}{_near_files(file)}")
        except UnicodeDecodeError as error:
            self.unreadable.append(f"{self.origin}: is not UTF-8 text (byte {error.start}); save it as UTF-8")
        except UserError as error:
            self.unreadable.append(str(error))
        else:
            if isinstance(node, yaml.MappingNode):
                self.put(node, "", self.origin, self.origin)
            else:
                self.unreadable.append(f"{self.origin}: holds no settings; the top level must be `section:` blocks")

    def gather(self, block: str) -> None:
        """Make one value of the values of a block: of `block.a`, `block.b` and so on. Null, or a value in place of the
        block, removes those before it."""
        found: Any = None
        mine = [key for key in self.values if key == block or key.startswith(f"{block}.")]
        if mine in ([], [block]):
            return
        where = self.where[mine[-1]]
        for key in mine:
            value = self.values.pop(key)
            if key == block:
                found = value
                continue
            found = found if isinstance(found, dict) else {}
            *outer, name = key.removeprefix(f"{block}.").split(".")
            inside = found
            for part in outer:
                inside[part] = inside[part] if isinstance(inside.get(part), dict) else {}
                inside = inside[part]
            inside[name] = value
        self.values[block], self.where[block] = found, where

    def give(self, key: str, value: object, where: str, but: Collection[str] = ()) -> None:
        """Take over a Python value, or every value of a mapping; a list becomes a tuple, a path text, a number of NumPy
        one of Python. In place of a section it ends what was given before of that, `but` for these keys."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self.give(f"{key}.{name}" if key else str(name), inner, where, but)
            return
        self._forget(key, but)
        self.values[key], self.where[key] = _as_setting(value), where

    def override(self, key: str, text: str) -> None:
        """Take over `key=text` of the command line."""
        try:
            self.put(_parse(text, None), key.replace("-", "_"), COMMAND_LINE)
        except UserError as error:
            self.unreadable.append(f"{COMMAND_LINE}: {short(key)}: {error}; quote the value")


def _as_setting(value: object) -> Any:
    """A value of a program as YAML would have it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real | list | tuple | Mapping):
        return value
    if isinstance(value, Mapping):
        return {str(name): _as_setting(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map(_as_setting, value))
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _near_files(file: str) -> str:
    path = Path(file)
    others = [other for folder in (Path("configs"), path.parent) for other in folder.glob("*.y*ml") if other != path]
    near = nearest_file(path, others)
    return f"; did you mean {near}?" if near else "; settings are given as FILE.yaml or section.key=value"


def _kind(annotation: object, bounds: str = "") -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(annotation) is tuple:
        return f"a list of {'blocks of settings' if typing.get_origin(arguments[0]) is dict else _kind(arguments[0])}"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_kind(argument, bounds) for argument in arguments)
    if typing.get_origin(annotation) is dict:
        return "a block of names and values"
    words: dict[object, str] = {
        Any: "anything",
        str: "text",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        types.NoneType: "null",
    }
    return words[annotation] + (bounds if annotation in (int, float) else "")


def allowed(field: FieldInfo) -> str:
    """What a setting may be, in words: `a whole number > 0 or null`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [(sign, getattr(rule, name, None)) for rule in field.metadata for name, sign in signs.items()]
    return _kind(field.annotation, " and".join(f" {sign} {limit}" for sign, limit in limits if limit is not None))


def shown(value: object) -> str:
    """A value as a message has it: as JSON, on one line, not too long."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}..."


def described(key: str, field: FieldInfo) -> list[str]:
    """A setting in lines of help: its name, what it takes, its default, and what it means."""
    default = "required" if field.is_required() else f"default {shown(field.get_default(call_default_factory=True))}"
    about = textwrap.wrap(field.description or "", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {key}  ({allowed(field)}; {default})", *about]
