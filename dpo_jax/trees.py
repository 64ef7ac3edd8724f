"""Trees of arrays seen as a flat table of paths `a/b/c`, and ordered tables of rules over those paths."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")
Tree = Any
"""A tree of JAX: containers of any kind, whose leaves are arrays or what stands for them (shapes, shardings, flags)."""
Params = dict[str, Any]
"""A tree of parameters: nested dicts of arrays, or of what stands for them."""


def paths(tree: Tree) -> dict[str, Any]:
    """Leaves of a nested dict by path, in the tree's own order.

    >>> paths({"a": {"b": 1, "c": 2}})
    {'a/b': 1, 'a/c': 2}
    """
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: tuple[Any, ...]) -> str:
    """A path of JAX as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def from_paths(table: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `paths` are this table.

    >>> from_paths({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in table.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def joined(*trees: Tree) -> Params:
    """One nested dict of the leaves of several; where two have the same path, the later one's."""
    return from_paths({path: leaf for tree in trees for path, leaf in paths(tree).items()})


def match(path: str, rules: Iterable[tuple[str, T]], *, table: str) -> T:
    """Value of the first rule whose pattern matches the whole path.

    Raises:
      ValueError: no rule of `table` (its name, for the message) claims the path.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(f"no rule of the {table} table matches leaf {path!r}; add one")


def map_by_rules(tree: Tree, rules: Iterable[tuple[str, T]], *, table: str) -> Params:
    """The tree with each leaf replaced by the value of the rule that claims it."""
    rules = list(rules)
    return from_paths({path: match(path, rules, table=table) for path in paths(tree)})


def num_parameters(tree: Tree) -> int:
    """Elements in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Bytes in all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def counted(tree: Tree) -> str:
    """How many numbers the arrays of a tree have, and their dtypes.

    >>> counted({"a": jax.ShapeDtypeStruct((1000, 2), "float32"), "b": jax.ShapeDtypeStruct((3,), "int8")})
    '2,003 parameters, float32, int8'
    """
    leaves = jax.tree.leaves(tree)
    dtypes = sorted({str(getattr(leaf, "dtype", type(leaf).__name__)) for leaf in leaves})
    return ", ".join([f"{sum(getattr(leaf, 'size', 0) for leaf in leaves):,} parameters", *dtypes])
