"""A batch is a tree of JAX whatever its leaves are, and says so where an array has the wrong shape or dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dpo_jax.data.batch import Batch
from dpo_jax.data.batches import Batches
from dpo_jax.preference.micro_batches import fold, micro_batch
from tests.support.forests import random_encoded

BATCH = Batches(random_encoded(completions=(2, 3)), 9, 1, 1, micro_tokens=32).at(0)


@pytest.mark.parametrize("leaf", [None, object(), (), jax.ShapeDtypeStruct((3,), jnp.float16), "text"])
def test_a_tree_of_batches_may_have_any_leaves(leaf):
    leaves, structure = jax.tree.flatten(BATCH)
    assert [id(x) for x in leaves] == [id(x) for x in vars(BATCH).values()]
    other = jax.tree.unflatten(structure, [leaf] * len(leaves))
    assert isinstance(other, Batch) and other.tokens is leaf and other.micro_batches is leaf
    assert vars(jax.tree.map(lambda _: leaf, BATCH)) == vars(other)


def test_leaves_are_named_by_their_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(BATCH)]
    assert paths == [f".{field.name}" for field in dataclasses.fields(Batch)]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": BATCH.tokens.astype(np.int64)},
        {"weight": BATCH.weight.astype(np.int32)},
        {"group": BATCH.group[..., :-1]},
        {"ids": BATCH.ids[0]},
        {"rank": BATCH.rank.sum(axis=-1, dtype=np.int32)},
        {"micro_batches": 1},
    ],
)
def test_an_array_of_another_shape_or_dtype_is_refused(changes):
    with pytest.raises(TypeCheckError):
        dataclasses.replace(BATCH, **changes)


def test_a_micro_batch_is_the_batch_without_its_first_axis():
    assert BATCH.tokens.shape[0] > 1
    for number in range(int(BATCH.micro_batches)):
        for name, array in vars(micro_batch(BATCH, number)).items():
            whole = getattr(BATCH, name)
            np.testing.assert_array_equal(array, whole if name == "micro_batches" else whole[number])
    shapes = jax.eval_shape(lambda batch: micro_batch(batch, 0), BATCH)
    assert shapes.tokens.shape == BATCH.tokens.shape[1:] and shapes.real.dtype == bool


def test_a_fold_visits_the_micro_batches_in_use():
    def visit(found, batch, number):
        return found.at[number].set(batch.tokens.sum())

    found = jax.jit(lambda batch: fold(visit, jnp.full(batch.tokens.shape[0] + 1, -1), batch))(BATCH)
    used = int(BATCH.micro_batches)
    assert found[:used].tolist() == BATCH.tokens[:used].sum(axis=(1, 2, 3)).tolist()
    assert set(found[used:].tolist()) == {-1}
