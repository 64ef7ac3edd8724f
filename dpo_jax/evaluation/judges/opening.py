"""Judges by name."""

from pathlib import Path

from jax.sharding import Mesh

from dpo_jax.errors import UserError
from dpo_jax.evaluation.judges import settings as kinds
from dpo_jax.evaluation.judges.reward import open_reward
from dpo_jax.evaluation.judges.rule import RuleJudge
from dpo_jax.evaluation.judges.settings import JudgeSettings, named
from dpo_jax.evaluation.judging import Judge


def open_judge(settings: JudgeSettings, *, folder: Path | None = None, mesh: Mesh | None = None) -> Judge:
    """The judge that the settings name; one of a reward model, and the rule, are `Scorer`s.

    Args:
      settings: which judge, and how it is asked.
      folder: where a server's answers, and a person's, are kept, so that nobody is asked twice.
      mesh: devices for a model.

    Raises:
      UserError: a model cannot be used, or something that the judge needs is missing.
    """
    kind, where = named(settings.name)
    if kind == kinds.RULE:
        return RuleJudge()
    if kind == kinds.REWARD:
        return open_reward(where, mesh=mesh)
    raise UserError(f"judge {settings.name}: not built yet")
