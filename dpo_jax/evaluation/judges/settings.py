"""Settings of a judge. Imports neither jax nor transformers."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from dpo_jax.settings import Section

RULE, REWARD, MODEL, ENDPOINT, HUMAN = "rule", "reward", "model", "endpoint", "human"
KINDS = "rule, reward:FOLDER, model:FOLDER, human, or http(s)://HOST:PORT/v1"


class Named(NamedTuple):
    """What kind of judge is meant, and which one: a folder, or a server's address."""

    kind: str
    where: str = ""


def named(judge: str) -> Named:
    """The judge that a name means.

    >>> named("reward:runs/r/model"), named("http://localhost:8000/v1").kind
    (Named(kind='reward', where='runs/r/model'), 'endpoint')

    Raises:
      ValueError: it means none.
    """
    if judge in (RULE, HUMAN):
        return Named(judge)
    if judge.startswith(("http://", "https://")):
        return Named(ENDPOINT, _address(judge))
    kind, _, where = judge.partition(":")
    if kind in (REWARD, MODEL) and where:
        return Named(kind, where)
    raise ValueError(f"must be {KINDS}")


def labels(judges: Sequence[str]) -> list[str]:
    """What each of a run's judges is called in the names of metrics and files: nothing for the first, the kind for any
    other, with a number from the second of a kind on.

    >>> labels(["rule", "reward:a", "reward:b"])
    ['', 'reward', 'reward_2']

    Raises:
      ValueError: a name means no judge.
    """
    kinds = [named(judge).kind for judge in judges]
    counts = [kinds[1 : place + 1].count(kind) for place, kind in enumerate(kinds)]
    return ["" if not n else kind if n == 1 else f"{kind}_{n}" for kind, n in zip(kinds, counts, strict=True)]


def _address(url: str) -> str:
    """The address below which a server's API lies, without a slash at its end."""
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    else:
        if "@" in parts.netloc:
            raise ValueError("must hold no password; put the key into an environment variable, and name that")
    if not sound or not url.isascii() or not url.isprintable() or parts.query or parts.fragment:
        raise ValueError("must be an address such as http://localhost:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions")


class JudgeSettings(Section):
    """A judge, and how it is asked."""

    name: str = Field(description=f"who judges: {KINDS}")
    template: str | None = Field(
        default=None, description="of a model or a server: Jinja file of what it is asked (default: the package's)"
    )
    model: str | None = Field(default=None, description="of a server: the model's name there")
    key_variable: str | None = Field(
        default=None, description="of a server: name of the environment variable that holds its API key"
    )
    calls_at_once: int = Field(default=8, gt=0, le=256, description="of a server: most calls at a time")
    timeout: float = Field(default=120.0, gt=0, description="of a server: seconds that a call may take")
    attempts: int = Field(
        default=8, gt=0, description="of a server: how often a call is made that fails, with longer and longer pauses"
    )
    call_budget: int | None = Field(
        default=None, gt=0, description="of a server: calls that may be made in all, failed ones included"
    )
    token_budget: int | None = Field(
        default=None, gt=0, description="of a server: tokens after which, by its own count, no call is made any more"
    )
    body: dict[str, Any] = Field(
        default_factory=dict, description="of a server: more fields of each call's JSON; null takes one out"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of a person: which answer stands where")

    @model_validator(mode="after")
    def _fits_the_judge(self) -> "JudgeSettings":
        idle = sorted(self.model_fields_set - {"name", "seed", *used_by(self.name)})
        if idle:
            raise ValueError(f"{idle[0]}: the judge {self.name} does not use it; leave it out")
        if named(self.name).kind == ENDPOINT and not self.model:
            raise ValueError(
                "model: a server is to be told which of its models judges; give --judge-model or evaluation.judge_model"
            )
        return self


OF_ENDPOINT = (
    "model",
    "key_variable",
    "calls_at_once",
    "timeout",
    "attempts",
    "call_budget",
    "token_budget",
    "body",
)
"""Settings that only a server's judge uses."""


def used_by(judge: str) -> tuple[str, ...]:
    """The settings that a judge of this name uses, beside `name` and `seed`; raises as `named`."""
    return {MODEL: ("template",), ENDPOINT: ("template", *OF_ENDPOINT)}.get(named(judge).kind, ())
