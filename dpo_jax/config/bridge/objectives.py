"""The losses of the other trainers as objectives of ours, and what is known to differ between the two."""

from typing import Any

from dpo_jax.config.bridge.conversion import Conversion
from dpo_jax.config.bridge.trainers import AXOLOTL, FACTORY, TORCHTUNE
from dpo_jax.errors import UserError, nearest, short
from dpo_jax.objectives.terms import names as objective_names
from dpo_jax.objectives.terms import takes

Block = dict[str, Any]

NAMES = {
    "DPOLoss": "sigmoid",
    "RSOLoss": "hinge",
    "IPOLoss": "ipo",
    "SimPOLoss": "simpo",
    "kto_pair": "kto",
    "dpo": "sigmoid",
}
"""Losses that have another name here."""
ALL = (
    *(
        "loss_type",
        "loss_weights",
        "beta",
        "label_smoothing",
        "ld_alpha",
        "f_divergence_type",
        "f_alpha_divergence_coef",
    ),
    *("use_weighting", "discopop_tau", "reference_free", "rpo_alpha", "pref_ftx", "pref_bco_weight", "loss.gamma"),
    *(
        "simpo_gamma",
        "cpo_alpha",
        "orpo_alpha",
        "desirable_weight",
        "undesirable_weight",
        "rl",
        "stage",
        "reward_model",
    ),
    "center_rewards_coefficient",
)
"""Names that speak of the loss."""
SMOOTHED = "TRL 1.16 ignores label_smoothing with sigmoid; here it is conservative DPO, as it was in TRL before"
PER_ANSWER = "the likelihood is a mean over answers there, and over the tokens of the step here"
WHOLE = "TRL's ORPO learns the prompt of the chosen answer as well; here only the answer is learned"
LAST = "of a conversation its last answer is learned here; there every answer, or every token, as its config says"
TEXT = "rows need an answer that is told from its prompt (prompt and completion, or messages); plain text has none"


def objective(c: Conversion) -> None:
    """The objective section."""
    {"kto": _kto, "orpo": _orpo, "cpo": _cpo, "reward": _reward, "sft": _sft}.get(c.method, _dpo)(c)
    c.leave(f"not needed: objective.name={_name(c)} says it", "rl", "stage", "reward_model")
    c.leave(f"the objective {_name(c)} does not use it", *ALL)


def _name(c: Conversion) -> str:
    return str(c.lines["objective.name"].value) if "objective.name" in c.lines else "list"


def _dpo(c: Conversion) -> None:
    names = c.words("loss_type") or ["sigmoid"]
    if c.trainer is AXOLOTL and c.get("rl") == "ipo":
        names = ["ipo"]
    names = [_ours(c, name) for name in names]
    if names[0] in ("orpo", "simpo") and c.trainer is FACTORY:
        return _of_factory(c, names[0])
    weights = c.get("loss_weights") or (1.0,) * len(names)
    if not isinstance(weights, tuple) or len(weights) != len(names) or not all(map(is_number, weights)):
        raise UserError(f"{_place(c, 'loss_weights')}: loss_weights: must be as many numbers as there are losses")
    blocks = [_block(c, name, float(weight)) for name, weight in zip(names, weights, strict=True)]
    sft, bco = c.get("rpo_alpha") or c.get("pref_ftx") or 0.0, c.get("pref_bco_weight") or 0.0
    if bco:
        blocks = [{**block, "weight": block["weight"] / (1 + bco)} for block in blocks]
        blocks.append(_block(c, "bco_pair", bco / (1 + bco)))
    if sft:
        blocks.append({"name": "sft", "weight": float(sft)})
    smoothed = "sigmoid" in names and c.get("label_smoothing") and c.trainer not in (FACTORY, TORCHTUNE)
    _put(c, blocks, note=SMOOTHED if smoothed else PER_ANSWER if sft and c.trainer is FACTORY else None)


def is_number(value: object) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _of_factory(c: Conversion, name: str) -> None:
    """ORPO and SimPO as LLaMA-Factory's stage dpo has them."""
    block: Block = {"name": name}
    block |= (
        {"odds_weight": c.get("beta")} if name == "orpo" else {"beta": c.get("beta"), "gamma": c.get("simpo_gamma")}
    )
    blocks = [block] + ([{"name": "sft", "weight": float(c.get("pref_ftx"))}] if c.get("pref_ftx") else [])
    _put(c, blocks, note=PER_ANSWER if name == "orpo" or len(blocks) > 1 else None)


def _kto(c: Conversion) -> None:
    loss = str(c.get("loss_type", "kto"))
    if loss not in ("kto", "sigmoid") and "objective.name" not in c.told:
        raise UserError(
            f"{_place(c, 'loss_type')}: {short(loss)} has no counterpart for single answers; give "
            "objective.name=kto behind the file, or train apo_zero on pairs"
        )
    block = {"name": "kto", "beta": c.get("beta")}
    block |= {name: c.get(name) for name in ("desirable_weight", "undesirable_weight")}
    _put(c, [block])
    c.leave("kto takes no other term; train sft before it", "pref_ftx", "rpo_alpha")


def _orpo(c: Conversion) -> None:
    _put(c, [{"name": "orpo", "odds_weight": c.get("orpo_alpha", c.get("beta"))}], note=WHOLE)


def _cpo(c: Conversion) -> None:
    loss = _ours(c, str(c.get("loss_type", "sigmoid")))
    sft = 0.0 if c.trainer is TORCHTUNE else float(c.get("cpo_alpha", 1.0))
    gamma = c.get("loss.gamma", 0.5) if c.trainer is TORCHTUNE else c.get("simpo_gamma", 0.5)
    if loss == "simpo":
        block: Block = {"name": "simpo", "beta": c.get("beta", 2.0), "gamma": gamma}
    else:
        block = {"name": loss, "beta": c.get("beta"), "reference_free": True}
    if c.get("label_smoothing"):
        block["label_smoothing"] = c.get("label_smoothing")
    if loss == "sigmoid" and sft:
        _put(c, [{**block, "name": "cpo", "reference_free": None, "sft_weight": sft}])
    else:
        _put(c, [block] + ([{"name": "sft", "weight": sft}] if sft else []))


def _reward(c: Conversion) -> None:
    _put(c, [{"name": "reward", "center": c.get("center_rewards_coefficient")}])


def _sft(c: Conversion) -> None:
    _put(c, [{"name": "sft"}], note=TEXT if c.is_given("dataset_text_field") else LAST)


def _ours(c: Conversion, name: str) -> str:
    """Our name of a loss.

    Raises:
      UserError: there is no such objective.
    """
    last = name.rpartition(".")[2]
    found = NAMES.get(last, last)
    if found not in objective_names() and "objective.name" in c.told:
        return "sigmoid"
    if found not in objective_names():
        near = nearest(last, [*objective_names(), *NAMES], 0.8)
        meant = f" (did you mean {near}?)" if near else ""
        raise UserError(
            f"{_place(c, 'loss_type')}: loss {short(last)!r} is no objective here{meant}; give objective.name=NAME "
            f"behind the file, one of {', '.join(objective_names())}"
        )
    return found


def _place(c: Conversion, name: str) -> str:
    given = c.known.get(name)
    return f"{short(c.config.file)}:{given.line}" if given is not None and given.line else short(c.config.file)


def _block(c: Conversion, name: str, weight: float) -> Block:
    """One loss of TRL's DPO with all that it takes."""
    beta = c.get("loss.gamma", 0.1) if name == "hinge" and c.trainer is TORCHTUNE else c.get("beta")
    divergence = c.get("f_divergence_type")
    wanted = {
        "beta": beta,
        "label_smoothing": c.get("label_smoothing"),
        "divergence": str(divergence).rpartition(".")[2].lower() if divergence else None,
        "divergence_alpha": c.get("f_alpha_divergence_coef") if "alpha" in str(divergence) else None,
        "ld_alpha": c.get("ld_alpha"),
        "weighting": "wpo" if c.flag("use_weighting") else None,
        "tau": c.get("discopop_tau"),
        "reference_free": True if c.flag("reference_free") else None,
        "desirable_weight": c.get("desirable_weight"),
        "undesirable_weight": c.get("undesirable_weight"),
    }
    if name == "exo_pair" and not wanted["label_smoothing"]:
        wanted["label_smoothing"] = 1e-3
    return {"name": name, **{key: value for key, value in wanted.items() if key in takes(name)}, "weight": weight}


MADE_OF = {
    "name": ("loss_type", "rl", "stage", "reward_model"),
    "beta": ("beta", "loss.gamma"),
    "label_smoothing": ("label_smoothing",),
    "divergence": ("f_divergence_type",),
    "divergence_alpha": ("f_alpha_divergence_coef",),
    "ld_alpha": ("ld_alpha",),
    "weighting": ("use_weighting",),
    "tau": ("discopop_tau",),
    "reference_free": ("reference_free",),
    "desirable_weight": ("desirable_weight",),
    "undesirable_weight": ("undesirable_weight",),
    "center": ("center_rewards_coefficient",),
    "odds_weight": ("orpo_alpha", "beta"),
    "gamma": ("simpo_gamma", "loss.gamma"),
    "sft_weight": ("cpo_alpha",),
    "weight": ("loss_weights", "rpo_alpha", "pref_ftx", "pref_bco_weight", "cpo_alpha"),
}
"""What each setting of an objective is made of; the names that a config has of these."""


def _put(c: Conversion, blocks: list[Block], note: str | None = None) -> None:
    blocks = [{key: value for key, value in block.items() if value is not None} for block in blocks]
    if len(blocks) == 1 and blocks[0].get("weight", 1.0) == 1.0:
        for key, value in blocks[0].items():
            if key != "weight":
                c.put(f"objective.{key}", value, *MADE_OF[key], note=note if key == "name" else None)
        return
    keys = {key for block in blocks for key in block}
    made = dict.fromkeys(name for key in MADE_OF if key in keys for name in MADE_OF[key])
    c.put("objective", tuple(blocks), *made, note=note)
