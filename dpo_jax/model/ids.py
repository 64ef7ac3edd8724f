"""Token ids that somebody gives to a model: whether they are rows of its tokens.

Letters: B rows, T positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from dpo_jax.errors import UserError

LAYOUT = "give ids of tokens as rows [B, T], such as [[1, 2, 3]]"


def checked(where: str, tokens: Any, vocab_size: int) -> Int[Array, "B T"]:
    """Rows of token ids in int32, of arrays or lists of whole numbers.

    Of ids that are being traced only shape and dtype are known; `from_unknown` marks what they make of a row.

    Raises:
      UserError: begins with `where`; they are no rows of whole numbers, or one is no id of the model's.
    """
    if not isinstance(tokens, jax.Array | np.ndarray):
        try:
            tokens = np.asarray(tokens)
        except jax.errors.TracerArrayConversionError:
            tokens = jnp.asarray(tokens)
        except ValueError as error:
            raise UserError(f"{where}: are rows of different lengths; pad them, or give one at a time") from error
    if len(tokens.shape) != 2:
        raise UserError(f"{where}: are of shape {list(tokens.shape)}; {LAYOUT}")
    if tokens.size and not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"{where}: are of dtype {tokens.dtype}; {LAYOUT}, which are whole numbers")
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        _check_known(where, np.asarray(tokens), vocab_size)
    return jnp.asarray(tokens).astype(jnp.int32)


def _check_known(where: str, tokens: np.ndarray, vocab_size: int) -> None:
    wide = tokens.astype(np.uint64 if tokens.dtype == np.uint64 else np.int64)
    wrong = np.argwhere((wide < 0) | (wide >= vocab_size))
    if len(wrong):
        row, position = map(int, wrong[0])
        raise UserError(
            f"{where}: [{row}, {position}] is {wide[row, position]}, and the model's ids are 0 to {vocab_size - 1}; "
            "give padding the id of any token, and ids from the model's own tokenizer"
        )


def from_unknown(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B T"]:
    """Positions that come after an id which is none of the model's, or have one."""
    return jnp.cumsum((tokens < 0) | (tokens >= vocab_size), axis=1) > 0
