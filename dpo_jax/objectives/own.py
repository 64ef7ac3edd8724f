"""Digests of objectives that are not the package's: a run goes on only under the function that it was begun with.

What counts is what a row computes: the source of its functions (their bytecode where there is none), what these take
from outside, and the row's other fields but for the texts about it. Comments and layout do not count.
"""

import ast
import functools
import inspect
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from dpo_jax.files import digest_of
from dpo_jax.objectives.rows import NamedSum, Objective
from dpo_jax.objectives.table import OBJECTIVES, RECIPES, SHIPPED

TEXTS = ("equation", "paper", "when")
"""Fields of a row that say what it is, and change nothing."""
_INSTALLED = (str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


def own_digests(names: Iterable[str]) -> dict[str, str]:
    """The digest of each of these objectives that is not as the package has it, by name."""
    found = {}
    for name in names:
        row = OBJECTIVES.get(name) or RECIPES.get(name)
        if row is not None and row is not SHIPPED.get(name):
            found[name] = digest_of(_row_text(row))
    return found


def _row_text(row: Objective | NamedSum) -> str:
    fields = row._asdict() if isinstance(row, NamedSum) else vars(row)
    return _text({name: value for name, value in fields.items() if name not in TEXTS}, set())


def _text(value: Any, seen: set[int]) -> str:
    """What is the same for two values, of two processes too, only if they compute the same, as far as can be seen."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return "again"
    seen.add(id(value))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(inner, seen)}' for key, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_text(inner, seen) for inner in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_text(inner, seen) for inner in value))}}}"
    if hasattr(value, "tolist"):
        return f"{value.dtype}{value.tolist()}"
    if isinstance(value, ModuleType):
        return value.__name__
    return _callable_text(value, seen)


def _callable_text(value: Any, seen: set[int]) -> str:
    """Of a function, or of what behaves like one; of any other object what its class is, and what it holds."""
    if isinstance(value, functools.partial):
        return f"partial {_text([value.func, value.args, value.keywords], seen)}"
    if isinstance(value, MethodType):
        return f"method {_text([value.__func__, value.__self__], seen)}"
    if (inner := inspect.unwrap(value)) is not value:
        return f"{type(value).__name__} {_text(inner, seen)}"
    if isinstance(value, FunctionType):
        return _function_text(value, seen) if _is_own(value.__code__.co_filename) else _name(value)
    kind = value if isinstance(value, type) else type(value)
    if not _is_own(_file_of(kind)):
        return _name(kind)
    return f"{_source(kind)} {_text(getattr(value, '__dict__', None) if kind is not value else None, seen)}"


def _file_of(kind: type) -> str | None:
    try:
        return inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None


def _is_own(file: str | None) -> bool:
    """Whether a file is the user's, and no library's; a notebook's cell and a line of a shell are."""
    return file is not None and not file.startswith(_INSTALLED)


def _name(value: FunctionType | type) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _function_text(function: FunctionType, seen: set[int]) -> str:
    """Source, defaults, and what the function takes from around it and from its module."""
    around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    outside = {name: _cell(cell) for name, cell in around.items()} | dict(_globals_of(function))
    parts = [_source(function), function.__defaults__, function.__kwdefaults__, outside]
    return " ".join(_text(part, seen) for part in parts)


def _cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty as yet
        return None


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Names of a module that a function uses, and those that it uses of the user's other modules."""
    names = sorted(_names(function.__code__))
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        yield name, value
        if isinstance(value, ModuleType) and _is_own(getattr(value, "__file__", None)):
            yield from ((f"{name}.{inner}", vars(value)[inner]) for inner in names if inner in vars(value))


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _source(value: Callable[..., Any]) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        return _code_text(value.__code__) if isinstance(value, FunctionType) else _name(value)
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # a lambda in the middle of something
        return text


def _code_text(code: CodeType) -> str:
    consts = [_code_text(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {consts}"
