"""Their values in our words, by our setting: for keys that lead to it and need no rule of their own."""

import typing
from collections.abc import Callable
from typing import Any

from dpo_jax.config.bridge.conversion import FALSE, TRUE, Left
from dpo_jax.config.run import FIELDS


def loggers(value: object) -> Any:
    """Of the services in `report_to` those that there are; TensorBoard's files are written anyway."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else []
    kind = next(one for one in typing.get_args(FIELDS["log.loggers"].annotation) if one is not Ellipsis)
    known = tuple(name for name in names if name in typing.get_args(kind))
    rest = [name for name in names if name not in (*known, "none", "tensorboard", "all")]
    if not known:
        what = f"{', '.join(map(str, rest))} is not there" if rest else "none is the default"
        return Left(f"{what}; metrics.jsonl and TensorBoard's files are always written (log section)")
    return known


def _whole(value: object) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _steps(value: object) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        return Left("is a share of all steps there; log.every counts steps")
    return max(_whole(value), 1) if isinstance(value, int | float) else value


def _flag(value: object) -> Any:
    text = str(value).lower()
    return True if text in TRUE else False if text in FALSE else value


def _when(
    there: Callable[[Any], bool], why: str, change: Callable[[Any], Any] = lambda value: value
) -> Callable[[Any], Any]:
    return lambda value: change(value) if there(value) else Left(why)


VALUES: dict[str, Callable[[Any], Any]] = {
    "model.attention": lambda value: Left(
        "not needed: model.attention=auto finds what is fast and right on the device"
    ),
    "model.remat": lambda value: Left("not needed: model.remat=auto keeps what fits into the device's memory"),
    "model.resize_embedding": _flag,
    "model.path": str,
    "model.revision": str,
    "data.template": _when(
        lambda value: isinstance(value, str) and value.endswith((".jinja", ".j2", ".txt")),
        "the model's own chat template is used; data.template takes a Jinja file with another",
    ),
    "model.freeze": lambda value: Left("names what is trained; model.freeze takes patterns of the leaves that are not"),
    "data.workers": _when(lambda value: isinstance(value, int), "not needed: data.workers is chosen here"),
    "data.shuffle": _flag,
    "data.first": _whole,
    "log.every": _steps,
    "log.loggers": loggers,
    "reference.mode": _when(
        lambda value: str(value).lower() in TRUE,
        "not needed: reference.mode=cached is the default",
        lambda value: "cached",
    ),
    "reference.update_every": _whole,
    "checkpoint.keep": _when(lambda value: isinstance(value, int) and value > 0, "checkpoint.keep has a default of 2"),
    "adapter.rslora": _flag,
    "adapter.dora": _flag,
    "mesh.data": _when(lambda value: value not in (0, 1), "1 is the default"),
    "mesh.fsdp": _when(lambda value: value not in (0, 1), "all devices that the other axes leave is the default"),
    "mesh.tensor": _when(lambda value: value not in (0, 1), "1 is the default"),
    "mesh.context": _when(lambda value: value not in (0, 1), "1 is the default"),
}
"""A function of the value; `Left` in place of a result says why there is none."""
