"""The arrays that hold the pairs of a step.

Letters: M micro-batches, D shards (devices that split the batch), R rows, T slots of a row, K scored tokens, C
completions and P pairs that a shard's micro-batch may hold, W completions of a ranking (0 where none is compared as
one).
"""

import dataclasses
from typing import Any

from jaxtyping import Bool, Float32, Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """One step's pairs as packed prompt groups: numpy arrays, arrays on devices, or their shapes and dtypes.

    L are the leading axes: M and D, or D alone in one micro-batch. Every array but the last is split over D, and M is
    walked in turn. `preference.micro_batches` makes it a tree of jax, whose leaves may then be anything.

    Padding: group 0; completion C (one past the end); ids -1; `real` false.

    Attributes:
      tokens: of each slot.
      group: prompt group of each slot, from 1 in each row.
      branch: 0 prompt, then 1, 2, ... by completion.
      position: place in the text.
      source: slot (row * T + column) whose hidden state predicts.
      target: the token predicted.
      completion: which of the shard's completions it belongs to.
      chosen: completion preferred (the paper's yw_idxs).
      rejected: completion not preferred (yl_idxs).
      weight: of each pair.
      margin: nats.
      label: chance that chosen is the better one.
      real: whether there is a pair.
      noise: uniform in (0, 1), from (seed, step) and the pair's place in its step.
      ranked: completions of the pair's prompt.
      rank: their ranks, 0 is best, -1 for none.
      reference: reference log-probability of each scored token, nats.
      lengths: scored tokens of each completion.
      last: slot of each completion's last token.
      ids: number of each completion in the data set, -1 for none.
      prompts: number of each completion's prompt in the data set, -1 for none.
      micro_batches: how many of the M are in use.
    """

    tokens: Int32[Any, "*L R T"]
    group: Int32[Any, "*L R T"]
    branch: Int32[Any, "*L R T"]
    position: Int32[Any, "*L R T"]
    source: Int32[Any, "*L K"]
    target: Int32[Any, "*L K"]
    completion: Int32[Any, "*L K"]
    chosen: Int32[Any, "*L P"]
    rejected: Int32[Any, "*L P"]
    weight: Float32[Any, "*L P"]
    margin: Float32[Any, "*L P"]
    label: Float32[Any, "*L P"]
    real: Bool[Any, "*L P"]
    noise: Float32[Any, "*L P"]
    ranked: Int32[Any, "*L P W"]
    rank: Int32[Any, "*L P W"]
    reference: Float32[Any, "*L K"]
    lengths: Float32[Any, "*L C"]
    last: Int32[Any, "*L C"]
    ids: Int32[Any, "*L C"]
    prompts: Int32[Any, "*L C"]
    micro_batches: Int32[Any, ""]
