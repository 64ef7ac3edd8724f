"""Answers drawn from a model for each prompt, scored by a judge, and made into preferences: a folder of them.

    record.json     what it was made by (model, settings, seed, prompts, judge), and once it is whole what came of it
    answers.jsonl   every answer of every prompt, with its score
    pairs.jsonl     the preferences
    README.md       says so, for whoever is given the folder as data: `data.train` here, or `datasets`
    parts/          answers of some prompts each, while it is not whole

An answer depends on its prompt, its place in the list of answers, the settings and the seed. A part is written whole,
so the files are the same whether the process was killed in between or not.
"""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dpo_jax.data.templates import Codec
from dpo_jax.errors import UserError, redacted_values
from dpo_jax.evaluation.generate import Decoding, generate
from dpo_jax.evaluation.judges.settings import RULE, JudgeSettings
from dpo_jax.evaluation.judging import Judge
from dpo_jax.evaluation.models import open_model
from dpo_jax.evaluation.preferences import Scored, rows_of, scored
from dpo_jax.evaluation.settings import CollectSettings
from dpo_jax.evaluation.winrate import (
    Asked,
    Question,
    prompt_codec,
    prompt_tokens,
    read_comparable,
    read_questions,
    stop_tokens,
    text_of,
)
from dpo_jax.files import LOCK, digest_of, file_digest, sweep, write_whole
from dpo_jax.hf import peft
from dpo_jax.hf.adapted import Adapted
from dpo_jax.hf.configs import find_model
from dpo_jax.hf.tensors import SIDE_FILES, local_folder, weights_digest
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.model.decoder import Model

RECORD, ANSWERS, PAIRS, PARTS, JUDGE = "record.json", "answers.jsonl", "pairs.jsonl", "parts", "judge"
CARD = f"""---
configs:
- config_name: default
  data_files: {PAIRS}
---
Preferences between a model's answers. `{PAIRS}` has the rows, `{ANSWERS}` every answer with its score, and `{RECORD}`
what they were made by.
"""
RESULT = "dpo_jax.json"
"""What an export says of its run, which changes no answer."""
BATCHES_OF_A_PART = 4
"""A process that is killed loses the answers of so many batches at most."""
Row = dict[str, Any]


class Writer(NamedTuple):
    """Who answers: a model on its devices, how its prompts become tokens, and what ends its answers."""

    model: Model
    coder: Codec
    stop: tuple[int, ...]
    mesh: Mesh | None = None


def read_asked(path: str, judge: JudgeSettings, *, as_chat: bool = False) -> Sequence[Asked | Question]:
    """The prompts of a file of prompts or of preferences; of questions, for the rule. `as_chat` as of
    `read_comparable`.

    Raises:
      UserError: it, or one of its rows, is not as it must be.
    """
    return read_questions(path, as_chat=as_chat) if judge.name == RULE else read_comparable(path, as_chat=as_chat)[0]


def open_writer(
    folder_or_hub_id: str | Path, *, dtype: str = "auto", adapter: Path | None = None, mesh: Mesh | None = None
) -> Writer:
    """The model of a folder with its own tokenizer; `dtype` and what follows as for `open_model`.

    Raises:
      UserError: there is none, or it cannot be used.
    """
    tokenizer = load_tokenizer(local_folder(folder_or_hub_id, SIDE_FILES))
    stop = stop_tokens(folder_or_hub_id, tokenizer)
    model = open_model(folder_or_hub_id, dtype=dtype, adapter=adapter, mesh=mesh)
    return Writer(model, prompt_codec(tokenizer), stop, mesh)


def model_digest(folder_or_hub_id: str | Path) -> str:
    """Of all that a model's answers depend on: its weights, its config, its tokenizer and template."""
    folder = find_model(folder_or_hub_id)
    names = sorted(name for name in os.listdir(folder) if name.endswith((".json", ".jinja")) and name != RESULT)
    return digest_of("".join([weights_digest(folder), *(f"{name} {file_digest(folder / name)}" for name in names)]))


def facts_of(model: Adapted) -> dict[str, str]:
    """Digests of all that the answers of a model, and of its adapter, depend on."""
    adapter = {} if model.adapter is None else {"adapter": file_digest(model.adapter / peft.FILE)}
    return {"weights": model_digest(model.base), **adapter}


def collect(
    folder: Path,
    made_by: Mapping[str, Any],
    asked: Sequence[Asked | Question],
    settings: CollectSettings,
    opened: Callable[[], tuple[Writer, Judge]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fill the folder, or what is missing of it, and return what came of it (see `summary`).

    Args:
      folder: held by this process.
      made_by: what the files depend on beside the prompts and the settings, as JSON values.
      asked: the prompts.
      settings: how answers are drawn and paired.
      opened: loads model and judge; called if there is anything to do.
      say: is told how far it is.

    Raises:
      UserError: the folder holds something else, was made by something else, or was changed since it was whole.
    """
    sampling = settings.model_dump(mode="json")
    facts = redacted_values({"sampling": sampling, "prompts": prompts_digest(asked), **made_by})
    known = _known(folder, facts)
    if "result" in known:
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        return known["result"]
    _write_json(folder / RECORD, facts)
    parts = folder / PARTS
    parts.mkdir(exist_ok=True)
    sweep(folder)
    size = max(1, BATCHES_OF_A_PART * settings.batch_size // settings.answers)
    starts = range(0, len(asked), size)
    missing = [start for start in starts if not _part(parts, start).exists()]
    writer, judge = opened() if missing else (None, None)
    for start in missing:
        assert writer is not None and judge is not None
        some = asked[start : start + size]
        say(f"prompts {start + 1} to {start + len(some)} of {len(asked)}")
        rows = _answered(writer, judge, some, settings, first=start * settings.answers)
        write_whole(_part(parts, start), _lines(rows))
    return _finish(folder, facts, [_part(parts, start) for start in starts], settings)


def prompts_digest(asked: Sequence[Asked | Question]) -> str:
    """Of the prompts and what is good, wherever they stand."""
    told = [[item.prompt, item.good.pattern if isinstance(item, Question) else None] for item in asked]
    return digest_of(json.dumps(told))


def drawn(
    writer: Writer, asked: Sequence[Asked | Question], decoding: Decoding, *, copies: int = 1, **how: Any
) -> list[list[tuple[str, int, bool]]]:
    """So many answers to each prompt: text, number of tokens, whether the model ended it. `how` as for `generate`."""
    prompts = [prompt_tokens(item.prompt, writer.coder, item.where) for item in asked]
    many = [prompt for prompt in prompts for _ in range(copies)]
    found = generate(writer.model.spec, writer.model.params, many, decoding, mesh=writer.mesh, **how)
    told = [(text_of(writer.coder.tokenizer, one.tokens), len(one.written), one.finished) for one in found]
    return [told[start : start + copies] for start in range(0, len(told), copies)]


def _answered(
    writer: Writer, judge: Judge, asked: Sequence[Asked | Question], settings: CollectSettings, *, first: int
) -> list[Row]:
    """A row for each prompt, with its answers and their scores."""
    decoding = Decoding(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k, stop=writer.stop)
    how = {"copies": settings.answers, "seed": settings.seed, "first": first, "batch_size": settings.batch_size}
    answers = drawn(writer, asked, decoding, **how)
    scores = scored(judge, asked, [[text for text, _, _ in several] for several in answers])
    return [
        {
            "prompt": item.prompt,
            "answers": [
                {"text": text, "tokens": tokens, "finished": finished, "score": score}
                for (text, tokens, finished), score in zip(several, own, strict=True)
            ],
        }
        for item, several, own in zip(asked, answers, scores, strict=True)
    ]


def _finish(folder: Path, facts: dict[str, Any], parts: Sequence[Path], settings: CollectSettings) -> dict[str, Any]:
    rows = [json.loads(line) for part in parts for line in part.read_text("utf-8").split("\n") if line]
    pairs = [list(rows_of(row["prompt"], _of(row), settings.pairs, settings.margin)) for row in rows]
    write_whole(folder / ANSWERS, _lines(rows))
    write_whole(folder / PAIRS, _lines(row for several in pairs for row in several))
    write_whole(folder / "README.md", CARD)
    result = summary(rows, [len(several) for several in pairs])
    sums = {name: file_digest(folder / name) for name in (ANSWERS, PAIRS)}
    _write_json(folder / RECORD, {**facts, "result": result, "sha256": sums})
    shutil.rmtree(folder / PARTS)
    return result


def _of(row: Row) -> list[Scored]:
    return [Scored(answer["text"], answer["score"]) for answer in row["answers"]]


def summary(rows: Sequence[Row], made: Sequence[int]) -> dict[str, Any]:
    """What came of the prompts, of which so many rows of preferences were made each.

    `unjudged` answers are those of which the judge said nothing that can be understood; `repeated` ones say what an
    earlier answer to their prompt says; `all_the_same` prompts have no two different answers that have a score; `tied`
    prompts have, and no two that are told apart by the margin.
    """
    answers = [answer for row in rows for answer in row["answers"]]
    different = [{answer.text for answer in _of(row) if answer.score is not None} for row in rows]
    scores = [answer["score"] for answer in answers if answer["score"] is not None]
    best = [max((a.score for a in _of(row) if a.score is not None), default=None) for row in rows]
    best = [score for score in best if score is not None]
    return {
        "prompts": len(rows),
        "answers": len(answers),
        "cut_off": sum(not answer["finished"] for answer in answers),
        "without_words": sum(not answer["text"].strip() for answer in answers),
        "unjudged": sum(answer["score"] is None and bool(answer["text"].strip()) for answer in answers),
        "repeated": sum(len(row["answers"]) - len({answer.text for answer in _of(row)}) for row in rows),
        "all_the_same": sum(len(texts) < 2 for texts in different),
        "tied": sum(len(texts) > 1 and not rows for texts, rows in zip(different, made, strict=True)),
        "rows": sum(made),
        "mean_score": statistics.fmean(scores) if scores else None,
        "mean_best_score": statistics.fmean(best) if best else None,
    }


# ---------------------------------------------------------------------------------------------- files


def _known(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the folder; empty where there is none yet."""
    path = folder / RECORD
    if not path.exists():
        strangers = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, PARTS, JUDGE))
        strangers = [name for name in strangers if not name.endswith(".tmp")]
        if strangers:
            raise UserError(f"{folder} holds other things ({strangers[0]}, ...); name a new or empty folder")
        return {}
    try:
        known = json.loads(path.read_bytes())
        before = {name: value for name, value in known.items() if name not in ("result", "sha256")}
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; remove {folder}, or name another folder") from None
    before["model"] = facts.get("model")  # its weights are what counts, not where they lie
    if changed := list(differences(before, facts)):
        raise UserError(f"{folder} was made by other settings ({changed[0]}); name another folder")
    for name, digest in known.get("sha256", {}).items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise UserError(f"{folder / name} is not as it was written; remove {folder}, or name another folder")
    return known


def differences(old: object, new: object, name: str = "") -> Iterator[str]:
    """What differs between two values of JSON, as `a.b: 1 -> 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {json.dumps(old)[:60]} -> {json.dumps(new)[:60]}"


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:08d}.jsonl"


def _lines(rows: Iterator[Row] | Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_json(path: Path, value: object) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
