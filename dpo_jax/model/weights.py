"""What of a model is trained, and what is not: two trees, and the model as one function of both.

Layers of one kind are stacked on a leading axis of one leaf, so a leaf may be trained in some layers and frozen in the
others. It is then in both trees, each with its own layers, and `Weights.rows` says which are whose.

    blocks/0/mlp/up/kernel of 4 layers, the first two frozen:
    frozen   [2, I, O]   layers 0 1
    trained  [2, I, O]   layers     2 3
    rows     ("blocks/0/mlp/up/kernel", (False, False, True, True))

The backward pass goes through all layers of a stack of which any is trained; what freezing some of them saves is their
gradients' and moments' bytes, and the optimizer's work.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import trees
from dpo_jax.errors import UserError
from dpo_jax.model.decoder import Params, abstract_params, stacks
from dpo_jax.model.spec import DecoderSpec

Trained = Mapping[str, bool | tuple[bool, ...]]
"""By leaf path whether it is trained, or for a stack of layers which of them are."""


Leaf = jax.Array | np.ndarray


@functools.partial(jax.tree_util.register_dataclass, data_fields=["trained", "frozen"], meta_fields=["rows"])
@dataclasses.dataclass(frozen=True)
class Weights:
    """Leaves that are trained and leaves that are not; together they are the model's parameters."""

    trained: Params
    frozen: Params = dataclasses.field(default_factory=dict)
    rows: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    """Of the leaves that are in both trees: which layers are trained."""

    @property
    def params(self) -> Params:
        """The model's parameters; the trained tree itself where nothing is frozen."""
        if not self.frozen:
            return self.trained
        trained, frozen, rows = trees.paths(self.trained), trees.paths(self.frozen), dict(self.rows)
        table = {**frozen, **trained}
        return trees.from_paths(
            {
                path: _joined(trained[path], frozen[path], rows[path]) if path in rows else leaf
                for path, leaf in table.items()
            }
        )


def _joined(trained: jax.Array, frozen: jax.Array, rows: Sequence[bool]) -> jax.Array:
    """The stack of all layers, of the trained and of the frozen ones; one concatenation of runs of layers."""
    dtype = trained.dtype if trained.dtype == frozen.dtype else jnp.float32
    parts, taken = [], {True: 0, False: 0}
    for whose, run in itertools.groupby(rows):
        start, count = taken[whose], len(list(run))
        part = (trained if whose else frozen)[start : start + count]
        parts.append(part.astype(dtype))
        taken[whose] += count
    return jnp.concatenate(parts)


def divided(params: Params, trained: Trained) -> Weights:
    """The two trees of a tree of parameters, by what is trained."""
    kept, frozen, rows = {}, {}, []
    for path, leaf in trees.paths(params).items():
        match trained.get(path, True):
            case True:
                kept[path] = leaf
            case False:
                frozen[path] = leaf
            case layers:
                kept[path], frozen[path] = _taken(leaf, layers, True), _taken(leaf, layers, False)
                rows.append((path, tuple(layers)))
    return Weights(trees.from_paths(kept), trees.from_paths(frozen), tuple(rows))


def _taken(leaf: Leaf, layers: Sequence[bool], whose: bool) -> Leaf:
    numbers = [number for number, trained in enumerate(layers) if trained == whose]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return leaf[numbers[0] : numbers[-1] + 1]
    return leaf[np.asarray(numbers)]


def head_is_frozen(spec: DecoderSpec, weights: Weights) -> bool:
    """Whether nothing of the head over the vocabulary is trained: neither its rows nor its bias."""
    head = "embed" if spec.tied else "head"
    return not spec.scalar_head and head in weights.frozen and head not in weights.trained


def layer_paths(spec: DecoderSpec) -> dict[str, list[str]]:
    """Names of a model's leaves as settings have them, by leaf path: `layers/N/...` for each layer N of a stack.

    `blocks/0/mlp/up/kernel` of two layers is `layers/0/mlp/up/kernel` and `layers/1/mlp/up/kernel`.
    """
    numbers = {name: layers for name, _, layers in stacks(spec)}
    found = {}
    for path in trees.paths(abstract_params(spec)):
        folder, _, rest = path.partition("/")
        stack, _, inner = rest.partition("/")
        found[path] = [f"layers/{n}/{inner}" for n in numbers[stack]] if folder == "blocks" else [path]
    return found


def what_is_trained(spec: DecoderSpec, freeze: Sequence[str]) -> Trained:
    """By leaf path what is trained where leaves that match any of these patterns, as a whole, are frozen.

    Args:
      spec: of the model.
      freeze: regular expressions over the names of `layer_paths`.

    Raises:
      UserError: a pattern is none, or matches no leaf, or nothing is left to train.
    """
    matched = what_matches(spec, freeze, "model.freeze")
    found = {p: tuple(not one for one in m) if isinstance(m, tuple) else not m for p, m in matched.items()}
    if not any(found.values()):
        raise UserError(f"model.freeze: {list(freeze)} freezes all of the model; leave something to train")
    return found


def what_matches(spec: DecoderSpec, patterns: Sequence[str], setting: str) -> Trained:
    """By leaf path whether its name (of `layer_paths`) matches any of these patterns, or in which layers.

    Raises:
      UserError: a pattern of the `setting` is none, or matches no leaf.
    """
    paths = layer_paths(spec)
    names = [name for group in paths.values() for name in group]
    compiled = [_pattern(text, names, setting) for text in patterns]
    found: dict[str, bool | tuple[bool, ...]] = {}
    for path, group in paths.items():
        layers = tuple(any(pattern.fullmatch(name) for pattern in compiled) for name in group)
        found[path] = layers[0] if len(set(layers)) == 1 else layers
    return found


def _pattern(text: str, names: Sequence[str], setting: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"{setting}: {text!r} is no regular expression ({error}); layers/[0-3]/.* is one") from None
    if not any(pattern.fullmatch(name) for name in names):
        kinds = sorted({re.sub(r"layers/\d+/", "layers/N/", name) for name in names})
        raise UserError(
            f"{setting}: {text!r} matches no leaf; patterns match whole names, which are {', '.join(kinds)}"
        )
    return pattern
