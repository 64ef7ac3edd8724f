"""Settings of a judge. Imports neither jax nor transformers."""

from typing import NamedTuple

from pydantic import Field, field_validator

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
        return Named(ENDPOINT, judge)
    kind, _, where = judge.partition(":")
    if kind in (REWARD, MODEL) and where:
        return Named(kind, where)
    raise ValueError(f"must be {KINDS}")


class JudgeSettings(Section):
    """A judge, and how it is asked."""

    name: str = Field(description=f"who judges: {KINDS}")

    @field_validator("name")
    @classmethod
    def _is_a_judge(cls, value: str) -> str:
        named(value)
        return value
