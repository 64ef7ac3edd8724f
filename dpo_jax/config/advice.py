"""What to do about keys that are no settings: the nearest one, ours for another trainer's, or another command."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dpo_jax.config.console import program
from dpo_jax.config.elsewhere import FOREIGN, answer_to
from dpo_jax.errors import nearest, short
from dpo_jax.settings import allowed

WITH_VALUE = {
    name: answer
    for names, answer in (
        (
            "gradient_checkpointing activation_checkpointing enable_activation_checkpointing",
            "model.remat=block (or leave it out: auto keeps what fits into memory)",
        ),
        ("bf16", "model.compute_dtype=bfloat16"),
        ("precompute_ref_log_probs", "reference.mode=cached, which is the default"),
        ("sync_ref_model", "reference.update_every, in steps: reference.update_every=512"),
        ("attn_implementation flash_attention", "model.attention=auto, which is the default"),
        ("rpo_alpha pref_ftx nll_alpha", "objective.sft_weight, which objective.name=rpo takes"),
        ("cpo_alpha", "objective.sft_weight, which objective.name=cpo takes"),
        ("orpo_alpha", "objective.odds_weight, which objective.name=orpo takes"),
        ("simpo_gamma", "objective.gamma, which objective.name=simpo takes"),
        ("gamma_beta_ratio", "objective.gamma, the ratio times beta, which objective.name=simpo takes"),
        ("discopop_tau", "objective.tau, which objective.name=discopop takes"),
        ("center_rewards_coefficient", "objective.center, which objective.name=reward takes"),
        ("use_weighting", "objective.weighting=wpo"),
        ("push_to_hub", "export.push=OWNER/NAME"),
    )
    for name in names.split()
}
"""What is said of names from elsewhere whose value is another here too, or that an objective must be named for."""


def advice(key: str, fields: Mapping[str, FieldInfo]) -> str:
    """What to do about a key that is none of the settings `fields`."""
    parent, _, name = key.rpartition(".")
    if parent and (answer := FOREIGN.get(key.lower())):
        return f"no such setting; {f'did you mean {answer}?' if answer in fields else answer}"
    if parent in fields:
        return f"{parent} takes {allowed(fields[parent])}, not a block"
    of_section = [known for known in fields if parent and known.startswith(f"{parent}.") and known.endswith(f"_{name}")]
    of_name = [known for known in fields if known.rpartition(".")[2] == name]
    if likely := of_section or of_name:
        return f"no such setting; did you mean {' or '.join(likely)}?"
    if answer := answer_to(name):
        return f"no such setting; {_here(name, answer, fields)}"
    by_name = {known.rpartition(".")[2]: known for known in fields}
    inside = {known.rpartition(".")[2]: known for known in fields if parent and known.startswith(f"{parent}.")}
    like = inside.get(nearest(name[:80], inside) or "") if inside else nearest(key[:80], fields, 0.7)
    near = like or by_name.get(nearest(name[:80], by_name, 0.7) or "")
    return f"no such setting; did you mean {near}?" if near else "no such setting; --help lists them all"


def _here(name: str, answer: str, fields: Mapping[str, FieldInfo]) -> str:
    """What a name from elsewhere is here, with the value where that cannot be taken over as it is."""
    if answer not in fields:
        return answer
    if hint := WITH_VALUE.get(name.lower()):
        return f"here it is {hint}"
    chosen = any(get_origin(kind) is Literal for kind in _kinds(fields[answer]))
    return f"here it is {answer}, {allowed(fields[answer])}" if chosen else f"here it is {answer}"


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """Types that a setting may be of."""
    return (field.annotation, *get_args(field.annotation))


def no_block(key: str, value: object, fields: Mapping[str, FieldInfo]) -> str:
    """What to do about a value in place of a section: give it to the section's first setting, if that takes it."""
    first = next(known for known in fields if known.startswith(f"{key}."))
    told = type(value) in _kinds(fields[first]) or value in get_args(fields[first].annotation)
    return f"must be a block of settings, such as {first}" + (f"={short(str(value))}" if told else "")


def another_kind(where: Mapping[str, str], unknown: Sequence[str], given: Mapping[str, Any]) -> str | None:
    """What to do with settings that are not of a run at all: of rounds, or of another trainer; None if they may be.

    `where` has the place of each key, `unknown` those that are no settings, and `given` the others, by section.
    """
    if rounds := next((key for key in unknown if key == "rounds" or key.startswith("rounds.")), None):
        return f"{where[rounds]}: {short(rounds)}: is of the command rounds; run it with {program('rounds')}"
    theirs = [key for key in unknown if "." not in key and answer_to(key)]
    if len(theirs) < 3 or any(given[section] for section in ("model", "data")):
        return None
    file = where[theirs[0]].partition(":")[0]
    return (
        f"{file}: has settings of another trainer ({', '.join(theirs[:3])}, ...), and no model or data as they are "
        f"given here; {program('convert')} config {file} writes the file that is wanted"
    )
