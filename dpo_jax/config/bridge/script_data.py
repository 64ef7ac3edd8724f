"""The rows that a script gives a trainer: where `train_dataset` and `eval_dataset` come from, read with `ast`.

An expression is followed, through the names that it goes by, to the call that loads it. What cannot be followed is
`Computed`, with a question in terms of the script.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from dpo_jax.config.bridge.datasets import LOADERS, is_file, where
from dpo_jax.config.bridge.source import Computed, Given
from dpo_jax.errors import short

LOADS = ("load_dataset", "load_from_disk")
CHANGES = (
    "cast filter map remove_columns rename_column rename_columns select select_columns shard skip sort take "
    "train_test_split".split()
)
"""Methods of a data set that make its rows others than those of its files; shuffling changes only their order."""
SAME_ROWS = ("shuffle", "flatten_indices", "with_format", *CHANGES)
"""Methods that are looked through: of those that change rows `_changes` in script.py speaks."""
SETS = {"train_dataset": "training", "eval_dataset": "eval"}
HELD = ("test", "valid", "eval", "dev")
"""How splits begin that are not trained on."""

Value = Callable[[ast.AST], Any]
"""Reads an expression: its value, or `Computed`."""


class NotUnderstood(ValueError):
    """Rows cannot be told from the text of a script; its text says what else is known, or nothing."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A call that loads rows, the split that is picked of them, and calls with names of the script's own around it."""

    call: ast.Call
    split: object = None
    through: tuple[ast.Call, ...] = ()


def called(node: ast.AST) -> str:
    """The last part of the name of what is called."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def data_sets(tree: ast.AST, value: Value) -> Iterator[Given]:
    """The keys `train_dataset` and `eval_dataset` of a script, with our names of the rows, and what else is known."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = sorted((call for call in calls if called(call.func) in LOADS), key=lambda call: call.lineno)
    words = {word.arg: word.value for call in calls for word in call.keywords if word.arg in SETS}
    names = Names(tree, value)
    claimed: set[int] = set()
    for key in reversed(SETS):
        if key in words and not (isinstance(words[key], ast.Constant) and value(words[key]) is None):
            yield from _given(key, words[key], names, loads, claimed)
    for key in SETS if not words else ():
        held = [call for call in loads if _is_held(call, value)]
        chosen = held if key == "eval_dataset" else [call for call in loads if call not in held]
        if chosen:
            yield from _of_loaded(key, Loaded(chosen[0]), value)


def _given(key: str, node: ast.expr, names: "Names", loads: list[ast.Call], claimed: set[int]) -> Iterator[Given]:
    """What is known of one argument. Rows for training that cannot be followed are those of the only call left."""
    try:
        sets = names.value_of(node)[0] if isinstance(node, ast.Name) else node
        if isinstance(sets, ast.Dict) and key == "eval_dataset":
            yield from _several(key, sets, names)
            return
        found = names.loaded(node)
        claimed.add(id(found.call))
        yield from _of_loaded(key, found, names.value)
    except NotUnderstood as error:
        rest = [call for call in loads if id(call) not in claimed and not _is_held(call, names.value)]
        what = f"the {SETS[key]} data set of line {node.lineno}"
        if key == "train_dataset" and len(rest) == 1 and not str(error):
            yield from _of_loaded(key, Loaded(rest[0]), names.value)
            asked = f"{what} was not understood, and is taken as that of line {rest[0].lineno}"
            yield Given(f"{key}.origin", Computed(ast.unparse(node), asked), node.lineno)
        else:
            yield _unread(key, node, str(error))


def _several(key: str, node: ast.Dict, names: "Names") -> Iterator[Given]:
    """Held-out sets by name."""
    found: dict[str, Any] = {}
    for name, inner in zip(node.keys, node.values, strict=True):
        if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
            raise NotUnderstood
        found[name.value] = _plain(_sources(names.loaded(inner), names.value, key))
    if not found:
        raise NotUnderstood
    yield Given(key, found, node.lineno)


def _unread(key: str, node: ast.expr, why: str) -> Given:
    """The key without rows, and what is asked: `why` says more, or, where it begins with `is`, all that there is."""
    asked = f"the {SETS[key]} data set of line {node.lineno} "
    asked += why if why.startswith("is ") else "was not understood" + (f" ({why})" if why else "")
    if key == "eval_dataset" and "give " not in why:
        asked += "; give data.eval=FILE behind the file"
    return Given(key, Computed(ast.unparse(node), asked), node.lineno)


def _of_loaded(key: str, found: Loaded, value: Value) -> Iterator[Given]:
    try:
        sources = _sources(found, value, key)
    except NotUnderstood as error:
        yield _unread(key, found.call, str(error))
        return
    yield Given(key, _plain(sources), found.call.lineno)
    for call in found.through:
        name = called(call.func)
        yield Given(f"{key}.{name}", Computed(ast.unparse(call)), call.lineno)
    for word in found.call.keywords:
        if word.arg not in (None, "path", "name", "split", "data_files", "data_dir", "dataset_path"):
            yield Given(f"load_dataset.{word.arg}", value(word.value), word.value.lineno)


def _plain(sources: tuple[str, ...]) -> Any:
    return sources[0] if len(sources) == 1 else sources


# --------------------------------------------------------------------------------------------- names of a script


class Names:
    """What the names of a script are assigned, and by it the call that an expression comes from."""

    def __init__(self, tree: ast.AST, value: Value) -> None:
        """Collect the assignments of a script."""
        self.value = value
        self.assigned: dict[str, list[tuple[int, ast.expr, int | None]]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, ast.AnnAssign) and node.value is not None:
                self._assign(node.target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.assigned.setdefault(target.id, []).append((target.lineno, value, None))
        elif isinstance(target, ast.Tuple):
            for index, one in enumerate(target.elts):
                if isinstance(one, ast.Name):
                    self.assigned.setdefault(one.id, []).append((one.lineno, value, index))

    def loaded(self, node: ast.expr, split: object = None, depth: int = 0) -> Loaded:
        """The call that the rows of an expression come from.

        Raises:
          NotUnderstood: that cannot be told.
        """
        if depth > 50:
            raise NotUnderstood
        if isinstance(node, ast.Name):
            value, index = self.value_of(node)
            return self._part(value, index, split, depth) if index is not None else self.loaded(value, split, depth + 1)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant | ast.Name) and split is None:
            return self._picked(node, depth)
        if isinstance(node, ast.IfExp) and isinstance(node.orelse, ast.Constant) and node.orelse.value is None:
            return self.loaded(node.body, split, depth + 1)
        if isinstance(node, ast.Call):
            return self._called(node, split, depth)
        raise NotUnderstood

    def value_of(self, node: ast.Name) -> tuple[ast.expr, int | None]:
        """What a name is where it is read: its last value before, and the index of the name among several.

        Raises:
          NotUnderstood: it has none, or one of several, as a condition says.
        """
        found = sorted(self.assigned.get(node.id, []), key=lambda one: one[0])
        before = [one for one in found if one[0] < node.lineno] or (found if len(found) == 1 else [])
        if not before:
            raise NotUnderstood
        _, value, index = before[-1]
        own = any(isinstance(inner, ast.Name) and inner.id == node.id for inner in ast.walk(value))
        if len(before) > 1 and not own:
            raise NotUnderstood
        return value, index

    def _part(self, value: ast.expr, index: int, split: object, depth: int) -> Loaded:
        """Of several names that are assigned at once, the one at an index."""
        if isinstance(value, ast.Tuple) and index < len(value.elts):
            return self.loaded(value.elts[index], split, depth + 1)
        if isinstance(value, ast.Call) and called(value.func) == "load_dataset":
            splits = self.value(next((word.value for word in value.keywords if word.arg == "split"), value))
            if isinstance(splits, tuple) and index < len(splits):
                return Loaded(value, splits[index])
        raise NotUnderstood

    def _picked(self, node: ast.Subscript, depth: int) -> Loaded:
        """`rows["train"]`; of a data set that the script divides itself, only what is trained on is in its file."""
        split, inner = self.value(node.slice), node.value
        if not isinstance(split, str):
            raise NotUnderstood
        if isinstance(inner, ast.Name):
            inner, index = self.value_of(inner)
            inner = node.value if index is not None else inner
        if isinstance(inner, ast.Call) and called(inner.func) == "train_test_split":
            if split == "train":
                return self.loaded(inner, None, depth + 1)
            share = next((word.value for word in inner.keywords if word.arg == "test_size"), None)
            shown = self.value(share) if share is not None else None
            wanted = shown if isinstance(shown, float) else "SHARE"
            raise NotUnderstood(f"is a share of the rows; give data.eval_fraction={wanted} behind the file")
        return self.loaded(node.value, split, depth + 1)

    def _called(self, node: ast.Call, split: object, depth: int) -> Loaded:
        name = called(node.func)
        if name in LOADS:
            return Loaded(node, split)
        if isinstance(node.func, ast.Attribute) and name in SAME_ROWS:
            return self.loaded(node.func.value, split, depth + 1)
        if len(node.args) >= 1 and isinstance(node.func, ast.Name):  # prepare(rows)
            found = self.loaded(node.args[0], split, depth + 1)
            return dataclasses.replace(found, through=(*found.through, node))
        raise NotUnderstood


# ---------------------------------------------------------------------------------------------- calls that load


def _is_held(call: ast.Call, value: Value) -> bool:
    split = next((word.value for word in call.keywords if word.arg == "split"), None)
    return split is not None and str(value(split)).startswith(HELD)


def _sources(found: Loaded, value: Value, key: str) -> tuple[str, ...]:
    """Our names of what a call loads.

    Raises:
      NotUnderstood: it cannot be told from the text, or has no name here.
    """
    words = {word.arg: value(word.value) for word in found.call.keywords if word.arg}
    order = ("path", "name", "data_dir", "data_files") if called(found.call.func) == "load_dataset" else ("path",)
    words = {**dict(zip(order, map(value, found.call.args), strict=False)), **words}
    path, files, folder = words.get("path", words.get("dataset_path")), words.get("data_files"), words.get("data_dir")
    split = found.split if found.split is not None else words.get("split")
    asked = (path, files, folder, split, words.get("name"))
    if not isinstance(path, str) or any(_is_computed(one) for one in asked) or not isinstance(split, str | None):
        raise NotUnderstood
    if order == ("path",):
        return (f"{path}:{split}" if split else path,)
    if path in LOADERS and files is not None:
        return _files(files, folder, split, key)
    if path in LOADERS and isinstance(folder, str):
        return (f"{folder}:{split}" if split else folder,)
    if files is not None or folder is not None or path in LOADERS:
        raise NotUnderstood("no part of a data set can be named here; download it and name its files")
    if is_file(path) and "[" in (split or ""):
        raise NotUnderstood("a file has no splits; write its rows into a file of their own")
    return where(path, words.get("name"), split)


def _is_computed(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return isinstance(value, Computed) or any(_is_computed(one) for one in inner)


def _files(files: Any, folder: object, split: str | None, key: str) -> tuple[str, ...]:
    """Files by name, as a list, or by the split that they are of."""
    parts = re.fullmatch(r"\w+", split or "train")
    if parts is None:
        raise NotUnderstood(f"files have no such part as {short(str(split))}; write its rows into a file of their own")
    if isinstance(files, dict):
        wanted = split or (next(iter(files)) if len(files) == 1 else "train" if key == "train_dataset" else None)
        if wanted not in files:
            raise NotUnderstood
        files = files[wanted]
    names = files if isinstance(files, tuple) else (files,)
    if not names or not all(isinstance(name, str) for name in names):
        raise NotUnderstood
    if any(set("*?[") & set(name) for name in names):
        raise NotUnderstood("files are named one by one here")
    return tuple(f"{folder.rstrip('/')}/{name}" if isinstance(folder, str) else name for name in names)
