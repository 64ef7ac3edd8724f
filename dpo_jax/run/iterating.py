"""Rounds of iterative DPO (arXiv:2312.16682, arXiv:2404.19733): what one is made of, and how its model is judged.

output/rounds.json        the settings, and a line of the table for each model that is judged
output/held-out/N.json    answers of round N's model to held-out prompts, with scores; 0 is the first model
output/round-N/           an ordinary run
output/round-N/collected/ what it was trained on (see evaluation/collecting.py)
"""

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dpo_jax.config import run as config
from dpo_jax.config.rounds import RoundsSettings
from dpo_jax.config.run import Run
from dpo_jax.errors import UserError, redacted_values
from dpo_jax.evaluation.collecting import (
    PAIRS,
    Writer,
    collect,
    differences,
    drawn,
    facts_of,
    open_writer,
    prompts_digest,
    read_asked,
)
from dpo_jax.evaluation.generate import Decoding
from dpo_jax.evaluation.judges.opening import check_judge, open_judge
from dpo_jax.evaluation.judging import Contest, Judge, Scorer
from dpo_jax.evaluation.settings import CollectSettings
from dpo_jax.evaluation.winrate import Asked, Question, texts_note
from dpo_jax.files import sweep, write_whole
from dpo_jax.hf.adapted import Adapted
from dpo_jax.hf.configs import find_model
from dpo_jax.hf.merged import FILES
from dpo_jax.hf.tensors import local_folder
from dpo_jax.model.settings import AdapterSettings
from dpo_jax.run import models, output

RECORD, HELD_OUT, JUDGE = "rounds.json", "held-out", "judge"


class Rounds:
    """What all rounds share: settings, prompts, devices, and the judge, who is fetched when there is work for him."""

    def __init__(self, run: Run, settings: RoundsSettings):
        """Reads the prompts.

        Raises:
          UserError: they cannot be read, or the output folder holds rounds of other settings.
        """
        self.run, self.settings, self.folder = run, settings, Path(run.output)
        how = {"as_chat": run.data.as_chat}  # asked as the answers will be trained on
        self.asked: Sequence[Asked | Question] = read_asked(settings.prompts, settings.judge, **how)
        self.held_out: Sequence[Asked | Question] = (
            [] if settings.held_out is None else read_asked(settings.held_out, settings.judge, **how)
        )
        check_judge(settings.judge)
        self.mesh = models.make_mesh(run.mesh, run.model)
        self.table: list[dict[str, Any]] = []
        self._check_record()
        sweep(self.folder)
        sweep(self.folder / HELD_OUT)

    @functools.cached_property
    def judge(self) -> Judge:
        """The judge."""
        return open_judge(self.settings.judge, folder=self.folder / JUDGE, mesh=self._several)

    @property
    def _several(self) -> jax.sharding.Mesh | None:
        return self.mesh if self.mesh.size > 1 else None

    def model(self, number: int) -> Adapted:
        """What a round left, a model or an adapter of the first one; of 0, where the first round starts."""
        if number and not self.run.adapter.used:
            return Adapted(str(self.round_folder(number) / output.MODEL), None, "")
        return Adapted(self._base, self.round_folder(number) / output.ADAPTER if number else self._first_adapter, "")

    @functools.cached_property
    def _base(self) -> str:
        return str(find_model(self.run.model.path, self.run.model.revision))

    @functools.cached_property
    def _first_adapter(self) -> Path | None:
        path, revision = self.run.adapter.path, self.run.adapter.revision
        return None if path is None else local_folder(path, FILES, revision)

    def round_folder(self, number: int) -> Path:
        """The output of a round's run."""
        return self.folder / f"round-{number}"

    # ------------------------------------------------------------------------------------------ one round

    def collect(self, number: int) -> dict[str, Any]:
        """Fill the round's folder of preferences, if it is not, with answers of the model before it.

        Raises:
          UserError: no two answers were told apart, or as `collecting.collect`.
        """
        folder = self.round_folder(number) / output.COLLECTED
        folder.mkdir(parents=True, exist_ok=True)
        start = self.model(number - 1)
        judge = self.settings.judge.model_dump(mode="json")
        name = self.run.model.path if number == 1 else str(start.adapter or start.base)
        made_by = {"model": name, **facts_of(start), "dtype": self._dtype, "judge": judge}
        values = {name: getattr(self.settings, name) for name in CollectSettings.model_fields}
        settings = CollectSettings(**{**values, "seed": (self.settings.seed + number - 1) % 2**32})

        def opened() -> tuple[Writer, Judge]:
            writer = self._writer(start)
            if note := texts_note(self.asked, writer.coder.tokenizer, "data.as_chat=true"):
                _say(number, note)
            return writer, self.judge

        found = collect(folder, made_by, self._prompts(number), settings, opened, lambda line: _say(number, line))
        if not found["rows"]:
            raise UserError(
                f"round {number}: no two answers to a prompt were told apart ({found['all_the_same']} prompts have one "
                f"answer only, {found['tied']} tie); raise rounds.answers or rounds.temperature, or lower rounds.margin"
            )
        return found

    def run_of(self, number: int) -> Run:
        """The settings of a round's run."""
        run, folder = self.run, self.round_folder(number)
        first = self.settings.reference == "first" and number > 1 and run.reference.mode != "none"
        update = {
            "data": run.data.model_copy(update={"train": str(folder / output.COLLECTED / PAIRS)}),
            "output": str(folder),
        }
        if number > 1 and run.adapter.used:
            path, own = str(self.model(number - 1).adapter), {"dropout", "lr_ratio"}
            update["adapter"] = AdapterSettings(path=path, **run.adapter.model_dump(include=own))
            update["reference"] = run.reference.model_copy(update={"adapter": "base"} if first else {})
        elif number > 1:
            moved = {"path": self.model(number - 1).base, "revision": None}
            update["model"] = run.model.model_copy(update=moved)
            reference = {"path": run.model.path, "revision": run.model.revision} if first else {}
            update["reference"] = run.reference.model_copy(update=reference)
        return run.model_copy(update=update)

    def _prompts(self, number: int) -> Sequence[Asked | Question]:
        count = self.settings.prompts_a_round
        if count is None or count >= len(self.asked):
            return self.asked
        return [self.asked[((number - 1) * count + place) % len(self.asked)] for place in range(count)]

    @property
    def _dtype(self) -> str:
        return models.compute_dtype(self.run.model, self.mesh)

    def _writer(self, model: Adapted) -> Writer:
        return open_writer(model.base, dtype=self._dtype, adapter=model.adapter, mesh=self._several)

    # ------------------------------------------------------------------------------------------ judging

    def measure(self, number: int, collected: Mapping[str, Any]) -> None:
        """Add a round's model to the table: its score on held-out prompts, and its win rate over the first model."""
        row: dict[str, Any] = {"round": number, **{name: collected.get(name) for name in ("rows", "tied")}}
        if self.held_out:
            answers = self._answers(number)
            row["score"] = self._score(answers)
            row["win_rate"] = None if number == 0 else self._wins(answers, self._answers(0))
        self.table.append(row)
        self._write_record()

    def _answers(self, number: int) -> list[str]:
        """Greedy answers of a round's model to the held-out prompts; kept, so that they are written once."""
        path, model = self.folder / HELD_OUT / f"{number}.json", self.model(number)
        facts = {
            **facts_of(model),
            "prompts": prompts_digest(self.held_out),
            "max_new_tokens": self.settings.max_new_tokens,
        }
        try:
            known = json.loads(path.read_bytes())
            if all(known[name] == value for name, value in facts.items()):
                return known["answers"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _say(number, f"answers {len(self.held_out)} held-out prompts")
        writer = self._writer(model)
        decoding = Decoding(self.settings.max_new_tokens, stop=writer.stop)
        found = drawn(writer, self.held_out, decoding, batch_size=self.settings.batch_size)
        answers = [text for ((text, _, _),) in found]
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({**facts, "answers": answers}, indent=1, ensure_ascii=False) + "\n")
        return answers

    def _score(self, answers: Sequence[str]) -> float | None:
        if not isinstance(self.judge, Scorer):
            return None
        return statistics.fmean(self.judge.score(self.held_out, answers))

    def _wins(self, answers: Sequence[str], first: Sequence[str]) -> float:
        pairs = zip(self.held_out, answers, first, strict=True)
        contests = [Contest(item, (answer, other)) for item, answer, other in pairs]
        return statistics.fmean(verdict.outcome for verdict in self.judge.compare(contests))

    # ------------------------------------------------------------------------------------------ the record

    def _facts(self) -> dict[str, Any]:
        rounds = self.settings.model_dump(mode="json", exclude={"number"})
        rounds["prompts"] = prompts_digest(self.asked)
        rounds["held_out"] = prompts_digest(self.held_out)
        return redacted_values({"run": config.dump(self.run), "rounds": rounds})

    def _check_record(self) -> None:
        path = self.folder / RECORD
        if not path.exists():
            self._write_record()
            return
        try:
            known = json.loads(path.read_bytes())
            run, rounds = known["settings"]["run"], known["settings"]["rounds"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; name another output") from None
        now = self._facts()
        changed = [*config.changed_mathematics(run, now["run"]), *differences(rounds, now["rounds"], "rounds")]
        if changed:
            raise UserError(f"output: {self.folder} holds rounds of other settings ({changed[0]}); name another folder")

    def _write_record(self) -> None:
        text = json.dumps({"settings": self._facts(), "table": self.table}, indent=2, ensure_ascii=False)
        write_whole(self.folder / RECORD, text + "\n")


def _say(number: int, line: str) -> None:
    print(f"round {number}: {line}" if number else f"before the rounds: {line}", flush=True)


def shown(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table, in lines."""
    lines = ["round   rows  tied prompts  score  win rate over the first model"]
    for row in table:
        cells = [f"{row['round']:>5}", _cell(row["rows"], 7), _cell(row["tied"], 14)]
        cells += [_cell(row.get("score"), 7, ".3f"), _cell(row.get("win_rate"), 10, ".3f")]
        lines.append("".join(cells))
    return lines


def _cell(value: int | float | None, width: int, how: str = "d") -> str:
    return f"{'-' if value is None else format(value, how):>{width}}"
