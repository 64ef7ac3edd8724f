"""The model card of an export: YAML front matter for the hub, then what was done."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_jax.errors import printable, public
from dpo_jax.hf.tensors import member


def base_name(like: str | Path, card: Mapping[str, Any] | None = None) -> str:
    """Public name of the model that `like` is: what the card says, a hub id, or the folder's own name."""
    folder = Path(like).expanduser().resolve()
    if card is not None and "base_model" in card:
        return public(card["base_model"])
    if not folder.is_dir():
        return str(like)
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def front_matter(origin: Path) -> dict[str, Any]:
    """The part of the base's model card that goes for what is made of it."""
    if not os.path.lexists(origin / "README.md"):
        return {}
    text = member(origin, "README.md").read_bytes()[: 1 << 16].decode("utf-8", "replace")
    block = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        table = yaml.safe_load(block.group(1)) if block else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}  # someone else's card; it only costs us the licence line
    wanted = ("license", "license_name", "license_link", "language")
    kept = {key: table.get(key) for key in wanted} if isinstance(table, dict) else {}
    return {key: value for key, value in kept.items() if isinstance(value, str) or _strings(value)}


def _strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
"""The hub rejects a card whose front matter names a model or a data set by anything else."""

CARD = """\
---
{front}---

# {title}

{text}
"""

WRITTEN = "{base}, written by `dpo_jax`."

DPO = """\
{base}, trained on preference pairs with Direct Preference Optimization (DPO) by `dpo_jax`, in JAX.
{files}"""

UNCHANGED = "tokenizer and its chat template are unchanged"
OTHER_TEMPLATE = "tokenizer is unchanged, and its chat template is the one that it was trained with (data.template)"
SAME_FILES = f"Names, dtypes and files are those of the base model; the {UNCHANGED}."
ADAPTER_FILES = """\
This is a low-rank adapter (LoRA), to be loaded with its base model; it brings that model's tokenizer and template."""

OBJECTIVES = """\
{{base}}, trained by `dpo_jax`, in JAX, with {names}.
{{files}}"""

BRADLEY_TERRY = f"""\
{{base}}, trained as a reward model on preference pairs with the Bradley-Terry loss by `dpo_jax`, in JAX. A scalar head
gives a text its score, read at the text's last token: the difference of the scores of two answers to a prompt is the
log-odds that the first is preferred. Names, dtypes and files of all other tensors are those of the base model; the
{UNCHANGED}."""

CITATION = """\
## Citation

```bibtex
@inproceedings{rafailov2023direct,
  title     = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author    = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and Ermon, Stefano and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://arxiv.org/abs/2305.18290}
}
```"""  # noqa: E501


class CardKind(NamedTuple):
    """What a card says by the model's head: its task on the hub; how it was trained in a tag, a word and a text."""

    task: str
    tag: str
    title: str
    trained: str
    citation: str | None
    files: str = SAME_FILES
    library: str = "transformers"


LANGUAGE_MODEL = CardKind("text-generation", "dpo", "DPO", DPO, CITATION)
ADAPTER_MODEL = LANGUAGE_MODEL._replace(files=ADAPTER_FILES, library="peft")
REWARD_MODEL = CardKind("text-classification", "reward-model", "reward model", BRADLEY_TERRY, None)


def model_card(
    base: str,
    inherited: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    *,
    kind: CardKind = LANGUAGE_MODEL,
    note: str = "",
) -> str:
    """A model card. Paths in it are cut down to names.

    `inherited` is front matter taken over from the base (its licence); `card` is described in `save_hf`; `note` is a
    paragraph about the folder's use.
    """
    datasets = [name for name in (card or {}).get("datasets", ()) if HUB_ID.fullmatch(name)]
    card = {} if card is None else {key: public(value) for key, value in card.items()}
    unknown = sorted(card.keys() - {"base_model", "datasets", "metrics", "config", "objectives", "notes"})
    if unknown:
        raise ValueError(
            f"model card has no part {unknown[0]!r}; parts: base_model, datasets, metrics, config, objectives, notes"
        )
    if kind.tag == LANGUAGE_MODEL.tag and (objectives := card.get("objectives")):
        kind = _by_objectives(kind, objectives)
    front: dict[str, Any] = {"base_model": base} if HUB_ID.fullmatch(base) else {}
    front |= {"library_name": kind.library, "pipeline_tag": kind.task}
    front |= {**inherited, "tags": [kind.tag, "dpo_jax", "jax"] if card else ["dpo_jax", "jax"]}
    if datasets:
        front["datasets"] = datasets
    parts = [(kind.trained if card else WRITTEN).format(base=printable(base), files=kind.files)]
    if ((card.get("config") or {}).get("data") or {}).get("template"):
        parts = [part.replace(UNCHANGED, OTHER_TEMPLATE) for part in parts]
    parts += [*([note] if note else []), *(printable(said) for said in card.get("notes", ()))]
    if card.get("metrics"):
        rows = [f"| {printable(str(name))} | {_number(value)} |" for name, value in card["metrics"].items()]
        parts.append("\n".join(["## Results", "", "| metric | value |", "| --- | --- |", *rows]))
    if card.get("config"):
        text = yaml.safe_dump(card["config"], sort_keys=False)
        parts.append("## Settings\n\n" + "".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))
    parts += [kind.citation] if card and kind.citation else []
    title = printable(base.rsplit("/", 1)[-1]) + (f" ({kind.title})" if card else "")
    dumped = yaml.safe_dump(front, sort_keys=False)
    return CARD.format(front=dumped, title=title, text="\n\n".join(parts))


def _by_objectives(kind: CardKind, objectives: Mapping[str, str]) -> CardKind:
    """What a card says of a language model that was trained with these objectives (name -> what is said of it)."""
    if list(objectives) == ["sigmoid"]:
        return kind
    names, tag = " + ".join(objectives), next(iter(objectives)).replace("_", "-")
    text = OBJECTIVES.format(names=", ".join(f"`{name}` ({about})" for name, about in objectives.items()))
    return kind._replace(tag=tag, title=names, trained=text, citation=None)


def _number(value: float | None) -> str:
    """Of a record, where null stands for a number that is not finite."""
    return "not finite" if value is None else f"{value:.6g}"
