"""`adapter_config.json` of a PEFT folder: every key that changes what is computed is read, or refused by name."""

import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from re import _constants as constants  # pyright: ignore[reportAttributeAccessIssue]
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, NamedTuple

from dpo_jax.errors import UserError, short
from dpo_jax.hf.beside import ADAPTER_CONFIG, check_run
from dpo_jax.hf.keys import Keys
from dpo_jax.hf.tensors import read_json

HARMLESS = frozenset(
    # bookkeeping, and which modules were chosen: the tensors say that themselves
    "auto_mapping base_model_name_or_path base_model_class parent_library revision inference_mode exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out "
    # how it was initialised or trained
    "eva_config corda_config lora_ga_config loftq_config velora_config megatron_config megatron_core "
    "qalora_group_size runtime_config use_dora_ephemeral_offload".split()
)
"""Keys that may have any value."""
NOT_BUILT = {
    "layer_replication": "layers are repeated, which no model here does",
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "several adapters are mixed by a router",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "use_qalora": "inputs are averaged in groups (QALoRA)",
    "kasa_config": "the factors have singular values between them (KaSA)",
    "monteclora_config": "the factors are drawn at random (MonteCLoRA)",
}
"""Keys that change the forward pass, and why they cannot be left out."""
KEEP_BASE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Starts that leave the base as it is; pissa, olora, corda and loftq subtract from its weights."""
BIASES = ("none", "all", "lora_only")
TASKS = (None, "CAUSAL_LM", "SEQ_CLS")
MOST_REPEATS = 3
"""Unbounded repetitions in a pattern; each multiplies the time that a name which does not match takes."""
MOST_PATTERN = 300


class AdapterConfig(NamedTuple):
    """What `adapter_config.json` says, as far as it matters to what is computed."""

    file: Path
    r: int
    alpha: float
    rslora: bool
    dora: bool
    lora_bias: bool
    bias: str
    dropout: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    tokens: tuple[int, ...] | dict[str, tuple[int, ...]]
    """Replaced rows of the embedding, or by name of the embedding."""
    ties: bool
    """What is done to the embedding is done to a head that is tied to it."""
    base: str | None
    swapped: bool
    """Written by a PEFT before 0.19, which took the outputs and inputs of fused experts for each other."""

    def rank(self, path: str) -> int:
        """Rank of a module (or parameter) of this path."""
        return _first(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """What the product of its factors is multiplied by."""
        rank = self.rank(path)
        return _first(self.alpha_pattern, path, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, path: str) -> bool:
        """Whether this module was trained whole; PEFT compares the ends of texts, not of names."""
        parts = path.split(".")
        return any(".".join(parts[: end + 1]).endswith(self.modules_to_save) for end in range(len(parts)))


def _first(patterns: dict[str, Any], path: str, usual: object) -> Any:
    return next((value for key, value in patterns.items() if _compiled(key).match(path)), usual)


@functools.lru_cache(maxsize=4096)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def base_name(folder: Path) -> str | None:
    """What an adapter says its base is: a folder or a hub id."""
    base = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def read_config(folder: Path) -> AdapterConfig:
    """Checks every key of a folder's `adapter_config.json`.

    Raises:
      UserError: a key changes the forward pass and is not built, is unknown and set, or has a value that it cannot.
    """
    check_run(folder)
    file = folder / ADAPTER_CONFIG
    k = Keys(read_json(folder, ADAPTER_CONFIG), file)
    kind, task = k.take("peft_type"), k.take("task_type")
    if kind != "LORA":
        raise k.refuse("peft_type", kind, "only LORA adapters are read; merge another kind into its base with PEFT")
    if task not in TASKS:
        raise k.refuse("task_type", task, f"only {', '.join(map(str, TASKS[1:]))} can be used here")
    _check_refused(k)
    version, base = k.take("peft_version"), k.peek("base_model_name_or_path")
    found = AdapterConfig(
        file=file,
        r=k.size("r", 8),
        alpha=_number(k, "lora_alpha", k.take("lora_alpha", 8)),
        rslora=k.flag("use_rslora"),
        dora=k.flag("use_dora"),
        lora_bias=k.flag("lora_bias"),
        bias=_bias(k),
        dropout=_dropout(k),
        rank_pattern={key: _rank(k, value) for key, value in _patterns(k, "rank_pattern")},
        alpha_pattern={key: _number(k, "alpha_pattern", value) for key, value in _patterns(k, "alpha_pattern")},
        modules_to_save=_texts(k, "modules_to_save"),
        target_parameters=_texts(k, "target_parameters"),
        tokens=_tokens(k),
        ties=k.flag("ensure_weight_tying"),
        base=base if isinstance(base, str) and base else None,
        swapped=_before_019(version),
    )
    _texts(k, "target_modules")
    _check_unknown(k)
    return found


def _check_refused(k: Keys) -> None:
    merge = "merge it into its base with PEFT (merge_and_unload) and give that model"
    for name, why in NOT_BUILT.items():
        value = k.take(name)
        if value not in (None, False):
            raise k.refuse(name, value, f"{why}, which is not built here; {merge}")
    start = k.take("init_lora_weights", True)
    if not isinstance(start, bool) and start not in KEEP_BASE:
        why = (
            f"only true, false, {', '.join(KEEP_BASE)} leave the base's weights as they are; the adapter fits another "
            "base than the one it names: save it again with PEFT's path_initial_model_for_weight_conversion"
        )
        raise k.refuse("init_lora_weights", start, why)


def _check_unknown(k: Keys) -> None:
    """An unknown key with an empty value is one that is off."""
    for name, value in k.left.items():
        if name not in HARMLESS and value not in (None, False, 0, "", [], {}):
            raise k.refuse(
                short(name),
                value,
                "unknown key, and it may change what the adapter computes; if it does not, remove it from a copy",
            )


def _number(k: Keys, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise k.refuse(name, value, "a finite number is wanted")
    return float(value)


def _rank(k: Keys, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise k.refuse("rank_pattern", value, "a whole number above zero is wanted")
    return value


def _bias(k: Keys) -> str:
    value = k.take("bias", "none")
    if value not in BIASES:
        raise k.refuse("bias", value, f"must be one of {', '.join(BIASES)}")
    return value


def _dropout(k: Keys) -> float:
    value = _number(k, "lora_dropout", k.take("lora_dropout", 0.0))
    if not 0 <= value < 1:
        raise k.refuse("lora_dropout", value, "a number from 0 to below 1 is wanted")
    return value


def _texts(k: Keys, name: str) -> tuple[str, ...]:
    """A text, or a list of them."""
    value = k.take(name, [])
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise k.refuse(name, value, "a list of names is wanted")
    return tuple(items)


def _tokens(k: Keys) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    value = k.take(name, [])
    tables = value if isinstance(value, dict) else {"": value}
    for items in tables.values():
        numbers = isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)
        if not numbers or len(set(items)) != len(items):
            raise k.refuse(name, items, "a list of different token numbers is wanted, or a table of such lists")
    found = {str(key): tuple(items) for key, items in tables.items()}
    return found if isinstance(value, dict) else found[""]


def _before_019(version: object) -> bool:
    """Whether a version of PEFT is before 0.19; it is written since 0.18 only."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version) if isinstance(version, str) else None
    return numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 19)


def _patterns(k: Keys, name: str) -> Iterable[tuple[str, Any]]:
    """The rows of a table by pattern; each must be a regular expression that is quick to try."""
    value = k.take(name, {})
    if not isinstance(value, dict):
        raise k.refuse(name, value, "a table of values by name is wanted")
    for key in value:
        why = _fault(key)
        if why:
            raise UserError(f"{k.file}: {name}: {short(key)!r} {why}; name the modules one by one")
    return value.items()


def _fault(pattern: str) -> str | None:
    """What is wrong with a pattern: an error, or a form that may take for ever."""
    if len(pattern) > MOST_PATTERN:
        return f"has more than {MOST_PATTERN} characters"
    try:
        _compiled(pattern)
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression ({error})"
    repeats, nested = _repeats(parsed, inside=False)
    return "repeats what it repeats, and may take for ever" if nested or repeats > MOST_REPEATS else None


def _repeats(parsed: Any, inside: bool) -> tuple[int, bool]:
    """How many repetitions of more than a few there are, and whether one stands in another."""
    count, nested = 0, False
    for op, argument in parsed:
        repeated = op in (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT) and argument[1] > 8
        if repeated:
            count, nested = count + 1, nested or inside
        for part in _inner(argument):
            found = _repeats(part, inside or repeated)
            count, nested = count + found[0], nested or found[1]
    return count, nested


def _inner(argument: object) -> Iterable[Any]:
    """The parsed parts within an operation's argument."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _inner(part)
