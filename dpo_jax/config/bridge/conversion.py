"""What becomes of each key of a config: a line of ours, a reason why it is left out, or a question."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from dpo_jax.config.bridge.source import Computed, Config, Given
from dpo_jax.config.bridge.trainers import OtherTrainer
from dpo_jax.config.elsewhere import answer_to
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import UserError, short
from dpo_jax.settings import SCALARS

NUMBERS = frozenset(
    """
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_steps warmup_ratio max_steps
    num_train_epochs max_steps_per_epoch per_device_train_batch_size gradient_accumulation_steps batch_size max_length
    tensor_parallel_size context_parallel_size beta label_smoothing ld_alpha f_alpha_divergence_coef discopop_tau
    simpo_gamma cpo_alpha orpo_alpha rpo_alpha pref_ftx pref_bco_weight loss.gamma desirable_weight undesirable_weight
    center_rewards_coefficient ref_model_sync_steps ref_model_mixup_alpha lora_r lora_alpha lora_dropout
    loraplus_lr_ratio eval_steps evals_per_epoch save_steps saves_per_epoch logging_steps early_stopping_patience
    test_split_size max_samples seed save_total_limit router_aux_loss_coef
    """.split()
)
"""Names whose values are numbers."""
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Converted:
    """A setting of ours: its value, the keys it was made of, and how its meaning differs from theirs."""

    value: Any
    origins: tuple[Given, ...]
    notes: tuple[str, ...] = ()
    standard: tuple[str, ...] = ()
    """Names of the defaults of the trainer that it was made of."""


@dataclasses.dataclass(frozen=True)
class Left:
    """In place of a value: why a key has no counterpart."""

    why: str


@dataclasses.dataclass
class Conversion:
    """A config on its way: `known` has its keys under TRL's names, with the trainer's defaults where it is silent."""

    config: Config
    trainer: OtherTrainer
    method: str
    devices: int | None = None
    told: frozenset[str] = frozenset()
    """Settings of ours that are given with the command, and will be used in place of what the file says."""
    known: dict[str, Given] = dataclasses.field(default_factory=dict)
    lines: dict[str, Converted] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: dict[str, str] = dataclasses.field(default_factory=dict)
    standard: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        """Sort the keys by what is known of them."""
        for given in self.config.given.values():
            name = self.name_of(given.key)
            if given.value is None:
                self.left[given.key] = "empty there"
            elif isinstance(given.value, Computed):
                self._ask_of(given, name)
            elif name in self.known:
                self.left[given.key] = f"{self.known[name].key} says the same"
            else:
                self.known[name] = self._as_number(given) if name in NUMBERS else given
        for name, value in self.trainer.default(self.method).items():
            computed = any(self.name_of(key) == name for key in self.asked_keys())
            if value is not None and name not in self.known and not computed:
                self.known[name] = Given(name, value)
                self.standard.add(name)

    def name_of(self, key: str) -> str:
        """TRL's name of a key of the file."""
        return self.trainer.names.get(key, key)

    def _as_number(self, given: Given) -> Given:
        """The key with its value as a number, whole if it is, as TRL reads texts.

        Raises:
          UserError: it is none.
        """
        text = str(given.value)
        read = next((read for form, read in SCALARS[2:4] if re.fullmatch(form, text)), None)
        if read is None:
            place = f"{short(self.config.file)}:{given.line}" if given.line else short(self.config.file)
            raise UserError(f"{place}: {short(given.key)}: {short(text)}: must be a number; correct it there")
        value = read(text)
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
        return dataclasses.replace(given, value=int(value) if whole else value)

    def asked_keys(self) -> list[str]:
        """Keys whose values only a run of the script could tell."""
        return [given.key for given in self.config.given.values() if isinstance(given.value, Computed)]

    def _ask_of(self, given: Given, name: str) -> None:
        ours = meaning_of(name) or meaning_of(given.key) or ""
        self.left[given.key] = f"is computed there: {given.value.text}"
        key = ours if ours in FIELDS else given.key
        self.asked[key] = given.value.question or f"{given.key} is computed there ({short(given.value.text)})"

    def __contains__(self, name: str) -> bool:
        """Whether a key has a value, be it a default."""
        return name in self.known

    def get(self, name: str, default: object = None) -> Any:
        """A key's value."""
        return self.known[name].value if name in self.known else default

    def words(self, name: str) -> list[str]:
        """A key's value as a list of texts; a text may hold several, with commas."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return [word.strip() for word in (value or "").split(",") if word.strip()]
        return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]

    def flag(self, name: str) -> bool:
        """Whether a key is on."""
        return str(self.get(name, False)).lower() in TRUE

    def is_given(self, name: str) -> bool:
        """Whether the file itself has a key."""
        return name in self.known and name not in self.standard

    def put(self, ours: str, value: object, *names: str, note: str | None = None) -> None:
        """Set one of our settings, made of the keys of these names. What it had before goes."""
        origins = tuple(self.known[name] for name in names if self.is_given(name))
        standard = tuple(name for name in names if name in self.standard)
        self.lines[ours] = Converted(value, origins, (note,) if note else (), standard)
        for given in origins:
            self.left.pop(given.key, None)

    def leave(self, why: str, *names: str) -> None:
        """Say why keys have no counterpart; what has become of a key already stays."""
        for name in names:
            if self.is_given(name) and not self.used(self.known[name].key):
                self.left.setdefault(self.known[name].key, why)

    def leave_below(self, why: str, *prefixes: str) -> None:
        """The same for all keys below some."""
        self.leave(why, *(name for name in self.known if name.startswith(tuple(f"{one}." for one in prefixes))))

    def used(self, key: str) -> bool:
        """Whether a key of the file has become part of a setting."""
        return any(given.key == key for line in self.lines.values() for given in line.origins)

    def settled(self, key: str) -> bool:
        """Whether it is said of a key of the file what became of it."""
        return key in self.left or self.used(key)

    def unsettled(self) -> Iterable[tuple[str, Given]]:
        """Keys of the file of which nothing is said yet."""
        return [
            (name, given) for name, given in self.known.items() if self.is_given(name) and not self.settled(given.key)
        ]


def meaning_of(name: str) -> str | None:
    """What is known of a key: one of our keys, or why it is left out. Of `a.b` also by `a`, then by `b`."""
    parts = name.split(".")
    for candidate in (*(".".join(parts[:end]) for end in range(len(parts), 0, -1)), parts[-1]):
        if (answer := answer_to(candidate)) is not None:
            return answer
    same = [key for key in FIELDS if key.rpartition(".")[2] == name]
    return same[0] if len(same) == 1 else None
