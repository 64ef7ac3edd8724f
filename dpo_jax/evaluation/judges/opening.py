"""Judges by name: what they need is checked first, and models are loaded last."""

import os
from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges import settings as kinds
from dpo_jax.evaluation.judges.asking import Template
from dpo_jax.evaluation.judges.endpoint import EndpointJudge
from dpo_jax.evaluation.judges.human import HumanJudge
from dpo_jax.evaluation.judges.model import open_model_judge
from dpo_jax.evaluation.judges.reward import open_reward
from dpo_jax.evaluation.judges.rule import RuleJudge
from dpo_jax.evaluation.judges.settings import JudgeSettings, named
from dpo_jax.evaluation.judging import Judge
from dpo_jax.evaluation.ledger import Ledger
from dpo_jax.hf.configs import read_spec
from dpo_jax.hf.tensors import SIDE_FILES, local_folder


def check_judge(settings: JudgeSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a judge that cannot be used, without loading a model: its folder, template, key, or server.

    Raises:
      UserError: names what is missing.
    """
    kind, where = named(settings.name)
    if kind == kinds.ENDPOINT:
        _endpoint(settings, None, environment).reach()
    elif kind in (kinds.REWARD, kinds.MODEL):
        spec = read_spec(local_folder(where, SIDE_FILES))
        if spec.scalar_head != (kind == kinds.REWARD):
            other = "model" if kind == kinds.REWARD else "reward"
            raise UserError(f"judge {settings.name}: the folder is of the other kind; give {other}:{where}")
        if kind == kinds.MODEL:
            Template(settings.template)


def open_judge(
    settings: JudgeSettings,
    *,
    folder: Path | None = None,
    mesh: Mesh | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Judge:
    """The judge that the settings name; the rule and one of a reward model are `Scorer`s.

    Args:
      settings: which judge, and how it is asked.
      folder: where a server's replies, or a person's keys, are kept, so that nobody is asked twice; None keeps none.
      mesh: devices for a model.
      environment: where a server's API key is looked up.

    Raises:
      UserError: a model cannot be used, or something that the judge needs is missing.
    """
    kind, where = named(settings.name)
    if kind == kinds.RULE:
        return RuleJudge()
    if kind == kinds.REWARD:
        return open_reward(where, mesh=mesh)
    if kind == kinds.MODEL:
        return open_model_judge(where, Template(settings.template), mesh=mesh)
    if kind == kinds.HUMAN:
        return HumanJudge(Ledger(None if folder is None else folder / "human.jsonl"), seed=settings.seed)
    return _endpoint(settings, folder, environment)


def _endpoint(settings: JudgeSettings, folder: Path | None, environment: Mapping[str, str]) -> EndpointJudge:
    template, key = Template(settings.template), _key(settings, environment)
    return EndpointJudge(settings, template, Ledger(None if folder is None else folder / "calls.jsonl"), key=key)


def _key(settings: JudgeSettings, environment: Mapping[str, str]) -> str | None:
    """The API key; no error shows it."""
    variable = settings.key_variable
    if variable is None:
        return None
    key = environment.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"judge {settings.name}: {variable} is not set to a key; export it, or correct its name")
    return key
