"""Models as functions of rows and of prompts: log-probabilities of pairs, and answers."""

import functools
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32

from dpo_jax import sharding
from dpo_jax.config import keywords
from dpo_jax.data.batch import Batch
from dpo_jax.data.encode import Encoded, collect
from dpo_jax.data.messages import BadRow
from dpo_jax.data.report import KINDS, TOO_LONG, UNRANKED, Report
from dpo_jax.data.settings import BatchSettings, DataSettings
from dpo_jax.data.templates import template_source
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, nearest, short
from dpo_jax.evaluation import generate as generation
from dpo_jax.evaluation import winrate
from dpo_jax.evaluation.models import decoding_of, open_model
from dpo_jax.hf.adapted import adapted
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Execution, Model, Params, cast, check_model
from dpo_jax.model.settings import MeshSettings, ModelSettings
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import make_terms
from dpo_jax.preference import heldout
from dpo_jax.preference.scoring import score_batch
from dpo_jax.python import rows as memory
from dpo_jax.python.restoring import restored
from dpo_jax.python.wording import in_python
from dpo_jax.run import models
from dpo_jax.run.data import Data, Packing, check_tokens

Folder = str | os.PathLike
PAIRS = 32
"""Pairs that are scored at a time."""
DECODING = ("temperature", "top_p", "top_k")
"""What `generate` takes of how tokens are chosen."""


KNOWN_AS = {
    "max_length": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "do_sample": "temperature",
    "random_seed": "seed",
    "messages": "prompts",
}
"""What others call arguments of `generate`."""


class PairLogprobs(NamedTuple):
    """Log-probabilities of the answers of P pairs, in nats, in the order in which `dpo_loss` takes them."""

    policy_chosen_logps: Float32[np.ndarray, " P"]
    policy_rejected_logps: Float32[np.ndarray, " P"]
    reference_chosen_logps: Float32[np.ndarray, " P"]
    reference_rejected_logps: Float32[np.ndarray, " P"]


def score_pairs(
    policy: Model | Folder,
    reference: Model | Folder,
    rows: object,
    *,
    tokenizer: Tokenizer | None = None,
    **data: Any,
) -> PairLogprobs:
    """The four log-probabilities of each pair: `dpo_loss(*score_pairs(policy, reference, rows), beta=0.1)`.

    Prompts and answers become tokens as in training, and each number is the sum over its answer's tokens.

    Args:
      policy: a `Model`, or the folder or hub id of one, or of an adapter.
      reference: the same; may be the policy itself.
      rows: preferences in memory, or a file, a folder, a hub data set, as for `fit`. A row has one pair, in order; a
        row of ranked answers has several.
      tokenizer: what `load_tokenizer` gave; that of the folder that is named, if it is None.
      **data: settings of the section `data`, such as `max_length=512` or `as_chat=True`.

    Warns:
      UserWarning: `max_length` has cut tokens off, with how many of what.

    Raises:
      UserError: a row cannot be used, so that numbers and rows would not go together; or a model or setting is wrong.
    """
    for name, model in (("policy", policy), ("reference", reference)):
        check_model(f"score_pairs: {name}", model, folder=True)
    with in_python():
        settings = _data_settings(data)
    named = [model for model in (policy, reference) if not isinstance(model, Model)]
    if tokenizer is None and not named:
        raise UserError(
            "score_pairs: tokenizer: is needed where both models are in memory; give load_tokenizer(FOLDER)"
        )
    with restored(), tempfile.TemporaryDirectory(prefix="dpo_jax-") as folder:
        tokenizer = tokenizer or load_tokenizer(adapted(os.fspath(named[0])).base)
        left: dict[str, str] = {}
        source = str(memory.keep(rows, Path(folder), "rows", left)) if memory.are_rows(rows) else rows
        with in_python(rows=Path(str(source)) if source is not rows else None), memory.explained(left):
            encoded, report = _pairs(source, tokenizer, settings)
            mesh = _mesh_of(policy, reference)
            first = _scored(_on(policy, mesh), encoded, tokenizer, mesh)
            same = reference is policy or (isinstance(reference, Folder) and reference == policy)
            second = first if same else _scored(_on(reference, mesh), encoded, tokenizer, mesh)
    if (cuts := _cuts(report, settings.max_length)) is not None:
        warnings.warn(cuts, UserWarning, stacklevel=2)
    return PairLogprobs(*first, *second)


def _data_settings(given: Mapping[str, Any]) -> DataSettings:
    """The section `data` of a run that has nothing else to say; no row may be left out."""
    if given.get("max_bad_fraction"):
        raise UserError(
            f"score_pairs: max_bad_fraction: {short(str(given['max_bad_fraction']))}: no row may be left out, as each "
            "number goes with its row; leave the setting away, and correct bad rows or take them out"
        )
    section = {"train": "rows", "max_bad_fraction": 0.0, **given}
    return keywords.run_of({"model": "model", "output": "none", "data": section}, origin="score_pairs").data


def _pairs(source: Any, tokenizer: Tokenizer, settings: DataSettings) -> tuple[Encoded, Report]:
    encoded, report = collect(source, tokenizer, settings)
    report.check(None)
    first = {KINDS[kind]: lines[0] for kind, lines in reversed(report.examples.items())}
    if report.too_long:
        where = first[TOO_LONG]
        raise UserError(
            f"score_pairs: data.max_length: {settings.max_length} leaves nothing of {report.too_long} rows "
            f"(first: {where}); raise it, or leave these rows out"
        )
    if report.unranked:
        raise UserError(
            f"score_pairs: {report.unranked} rows prefer no answer (first: {first[UNRANKED]}); leave them out, or give "
            "chosen and rejected"
        )
    if encoded.single.any():
        where = encoded.first_origin(np.flatnonzero(encoded.single))
        raise UserError(f"score_pairs: {where}: has one answer; a pair has a chosen and a rejected one")
    return encoded, report


def _cuts(report: Report, max_length: int) -> str | None:
    """What rows have lost, in a line; None where that is nothing."""
    kinds = (("prompt truncated", "prompts"), ("completion truncated", "answers"))
    lost = [
        f"{report.counts[kind]:,} of {report.rows:,} rows lose {report.cut[kind]:,} tokens of their {what}"
        for kind, what in kinds
        if kind in report.cut
    ]
    return f"score_pairs: max_length={max_length}: {', '.join(lost)}; raise max_length to score all" if lost else None


def _mesh_of(*given: Model | Folder) -> jax.sharding.Mesh:
    """The devices on which the models in memory lie; all of this machine where none does."""
    found = [model for model in given if isinstance(model, Model)]
    devices = sorted(jax.tree.leaves(found[0].params)[0].devices(), key=lambda each: each.id) if found else None
    return models.make_mesh(MeshSettings(), ModelSettings(path="."), devices)


def _on(given: Model | Folder, mesh: jax.sharding.Mesh) -> Model:
    """The model on the devices of a mesh: one in memory as it is, one of a folder in what its devices compute in."""
    if isinstance(given, Model):
        return Model(given.spec, jax.device_put(given.params, sharding.param_shardings(given.params, mesh)))
    base, adapter, _ = adapted(os.fspath(given))
    return open_model(base, adapter=adapter, mesh=mesh)


def _scored(
    model: Model, encoded: Encoded, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> tuple[Float32[np.ndarray, " P"], Float32[np.ndarray, " P"]]:
    """Log-probabilities of chosen and of rejected answers."""
    longest, most = int(encoded.sequence_lengths().max()), model.spec.positions
    if most is not None and longest > most:
        raise UserError(
            f"score_pairs: data.max_length: a row has {longest} tokens, and the model knows {most} positions"
        )
    check_tokens(Data(encoded, {}, 0, {}), model.spec.vocab_size, tokenizer)
    dtype = model.params["embed"]["embedding"].dtype
    terms = make_terms([{"name": "sigmoid"}])
    settings = ModelSettings(path=".", compute_dtype=dtype.name)
    objective = models.make_objective(settings, terms, model.spec, Weights(model.params), mesh)
    batches = Packing.of(BatchSettings(pairs=PAIRS), longest, terms, mesh).sweep(encoded, model.spec)
    score = functools.partial(_scores, model.spec, execution=objective.execution)
    place = functools.partial(sharding.place, mesh=mesh)
    tokens = heldout.token_logprobs(score, cast(model.params, dtype), batches, place)
    sums = np.add.reduceat(tokens.astype(np.float64), encoded.scored_start).astype(np.float32)
    return sums[encoded.chosen], sums[encoded.rejected]


@functools.partial(jax.jit, static_argnums=0, static_argnames="execution")
def _scores(spec: DecoderSpec, params: Params, batch: Batch, *, execution: Execution) -> Float32[Array, "M D K"]:
    return score_batch(spec, params, batch, execution=execution)


# ---------------------------------------------------------------------------------------------- answers


def generate(
    model: Model | Folder,
    prompts: Any,
    *,
    tokenizer: Tokenizer | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    **decoding: Any,
) -> Any:
    """A model's answers, as texts: `generate("runs/first/model", ["What is 7 plus 5?"])`.

    Args:
      model: a `Model`, or the folder or hub id of one, or of an adapter.
      prompts: a prompt, or a list of them; each a text, or messages `{"role": ..., "content": ...}`.
      tokenizer: what `load_tokenizer` gave; that of the folder, if it is None.
      chat: whether a text is a user's message and goes through the chat template, or is gone on with; None: where
        there is a template.
      max_new_tokens: an answer that is this long is cut off.
      seed: decides what is drawn.
      **decoding: `temperature` (0 is greedy), `top_p` and `top_k`; what is not given is as the folder's
        generation_config.json has it.

    Returns:
      A text for a prompt, a list of texts for a list.

    Raises:
      UserError: a prompt or an argument is not as it must be, or there is no such model.
    """
    if strange := [name for name in decoding if name not in DECODING]:
        known = (*DECODING, "max_new_tokens", "seed", "chat", "tokenizer")
        near = KNOWN_AS.get(strange[0]) or nearest(strange[0], known)
        raise UserError(f"generate: {short(strange[0])}: no such argument; give {near or ', '.join(known)}")
    check_model("generate: model", model, folder=True)
    asked, alone = _asked(prompts)
    with restored():
        base, adapter, _ = (None, None, "") if isinstance(model, Model) else adapted(os.fspath(model))
        if tokenizer is None and base is None:
            raise UserError("generate: tokenizer: is needed with a model in memory; give load_tokenizer(FOLDER)")
        tokenizer = tokenizer or load_tokenizer(str(base))
        # of a model in memory, what the folder of its tokenizer says
        folder = base or str(getattr(tokenizer, "name_or_path", ""))
        how = decoding_of(folder, tokenizer, max_new_tokens=max_new_tokens, **decoding)
        ids = _prompt_ids(asked, tokenizer, chat)
        opened = model if isinstance(model, Model) else open_model(str(base), adapter=adapter)
        answers = generation.generate(opened.spec, opened.params, ids, how, seed=seed)
    texts = [winrate.text_of(tokenizer, answer.tokens) for answer in answers]
    return texts[0] if alone else texts


def _asked(prompts: Any) -> tuple[list[Any], bool]:
    """Prompts, and whether there was one, and no list: a text, a message, or messages."""
    if isinstance(prompts, str | Mapping):
        return [prompts if isinstance(prompts, str) else [prompts]], True
    try:
        found = list(prompts)
    except TypeError:
        what = "a text, messages with role and content, or a list of such prompts"
        raise UserError(f"generate: prompts: is of type {type(prompts).__name__}; give {what}") from None
    alone = bool(found) and isinstance(found[0], Mapping)
    return [found] if alone else found, alone


def _prompt_ids(prompts: Sequence[Any], tokenizer: Tokenizer, chat: bool | None) -> list[list[int]]:
    coder = winrate.prompt_codec(tokenizer)
    chat = template_source(tokenizer, None) is not None if chat is None else chat
    found = []
    for number, prompt in enumerate(prompts, 1):
        where, message = f"prompt {number}", [{"role": "user", "content": prompt}]
        try:
            asked = winrate.prompt_of(message if chat and isinstance(prompt, str) else prompt)
        except BadRow as error:
            raise UserError(f"generate: {where}: {error}; give a text, or messages with role and content") from error
        found.append(winrate.prompt_tokens(asked, coder, where))
    return found
