"""What a run computes with: read from its settings and folders in order, before and after there are weights."""

import dataclasses
import platform
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax

import dpo_jax
from dpo_jax.config import run as config
from dpo_jax.config.run import Run
from dpo_jax.data.arguments import dated
from dpo_jax.data.tokenizer import Tokenizer
from dpo_jax.errors import UserError, public
from dpo_jax.evaluation.judges.opening import check_judge
from dpo_jax.evaluation.judges.settings import RULE
from dpo_jax.evaluation.winrate import read_answered
from dpo_jax.hf.ending import Ending
from dpo_jax.hf.tensors import SIDE_FILES
from dpo_jax.hf.tokenizer import load_tokenizer
from dpo_jax.intervals import steps_between
from dpo_jax.model.spec import DecoderSpec
from dpo_jax.model.weights import Weights
from dpo_jax.objectives.terms import CALLED, data_of
from dpo_jax.page.keeping import Page
from dpo_jax.preference.loss import TrainingObjective
from dpo_jax.processes.here import here
from dpo_jax.reporting import loggers
from dpo_jax.reporting.journal import Background, Journal
from dpo_jax.reporting.metrics import held_out_of
from dpo_jax.run import models, output, result
from dpo_jax.run.attention_choice import attention_for
from dpo_jax.run.best import MetricWatch, watch_of
from dpo_jax.run.checkpoints import Saver
from dpo_jax.run.continuing import ACCEPTED, Past, own_objectives
from dpo_jax.run.data import Data, Packing, check_tokens, labels_line, length_line, number_of_steps, read_data
from dpo_jax.run.evaluator import EvaluationPrompts, Evaluator, read_prompts
from dpo_jax.run.first_step import FirstStep
from dpo_jax.run.fitting import fitted, room_of
from dpo_jax.run.judging import against_start
from dpo_jax.run.policy import Policy, adapter_notes, policy_of
from dpo_jax.run.recorder import Checks, Recorder, make_alarms
from dpo_jax.run.reference import Reference, ReferenceScorer, make_reference
from dpo_jax.run.sources import Sources, find_models
from dpo_jax.run.trainer import Trainer
from dpo_jax.run.written import Merging, Rounding
from dpo_jax.training.optimizer import check_warmup


class Start(NamedTuple):
    """What a run starts from, as the folders of its models say it: no weights are read."""

    sources: Sources
    tokenizer: Tokenizer
    ending: Ending | None
    policy: Policy

    @classmethod
    def of(cls, run: Run, sources: Sources, mesh: jax.sharding.Mesh) -> "Start":
        """Look at the folders, and say what is to be known of them.

        Raises:
          UserError: they are not as they must be.
        """
        tokenizer = load_tokenizer(sources.policy, run.data.template)
        sources = sources.resized(run.model, tokenizer)
        scores = run.objective.trains_reward_model
        ending = models.check_ending(sources, tokenizer, run.export, scalar_head=scores)
        policy = policy_of(run, sources, mesh)
        for line in [*models.notes(sources, ending, run.export), *adapter_notes(run, policy)]:
            print(line)
        return cls(sources, tokenizer, ending, policy)


def check_named(run: Run) -> None:
    """Refuse services that are not installed, and questions that are not as they must be, before anything costs time.

    Raises:
      UserError: names the first one.
    """
    loggers.check(run.log.loggers)
    if run.evaluation.answers is not None:
        read_answered(run.evaluation.answers, needs_good(run))


def needs_good(run: Run) -> list[str]:
    """The settings of a run that want to know what a good answer is."""
    best = run.checkpoint.best
    needs = [f"checkpoint.best={best}"] if best is not None and held_out_of(best)[1] == "pass_rate" else []
    return needs + [f"evaluation.judge={RULE}"] * (RULE in run.evaluation.judges)


def check_new(run: Run) -> None:
    """The same before a new run makes its folder; one that has begun may be finished, and need nothing any more."""
    if not (Path(run.output) / output.RUN_FILE).exists():
        check_named(run)


def steps_over(run: Run, data: Data) -> int:
    """Steps of a run over these data, which are said; raises as `number_of_steps` and `check_warmup`."""
    pairs = data.train.num_pairs
    steps = number_of_steps(pairs, run.batch.pairs, steps=run.steps, epochs=run.epochs)
    check_warmup(run.optimizer, steps)
    if (line := labels_line(data, run.objective.terms)) is not None:
        print(f"warning: {line}")
    print(length_line(pairs, run.batch.pairs, steps, CALLED[data_of(run.objective.terms)]))
    return steps


@dataclasses.dataclass(frozen=True)
class Job:
    """A run's settings with everything that they name, but for weights: models found and checked, data tokenised."""

    run: Run
    folder: Path
    sources: Sources
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    data: Data
    steps: int
    packing: Packing
    prompts: EvaluationPrompts | None
    ending: Ending | None
    policy: Policy
    attention: str
    """Backend that computes it."""

    @classmethod
    def read(cls, run: Run, folder: Path) -> "Job":
        """Find the models, read and check the data and what is asked in evaluations.

        Raises:
          UserError: any of it is not as it must be.
        """
        for judge in run.evaluation.judging.values():
            check_judge(judge)
        place = here()
        place.decide("what is named", lambda: check_named(run))
        named = run.model, run.reference, place.decide("record", lambda: output.recorded(folder))
        mesh = models.make_mesh(run.mesh, run.model)
        _check_processes()
        if place.count > 1:
            print(processes_line(mesh))
        terms, length, scores = run.objective.terms, run.data.max_length, run.objective.trains_reward_model
        settings = {"model": run.model, "reference": run.reference, "max_length": length, "scalar_head": scores}
        first = place.in_turn("models", lambda: find_models(*named, SIDE_FILES, adapter=run.adapter))
        models.check_models(first, mesh, **settings)  # before gigabytes are downloaded
        if run.adapter.path is None:
            policy_of(run, first, mesh)
        sources = place.in_turn("weights", lambda: find_models(*named, adapter=run.adapter))
        sources, tokenizer, ending, policy = Start.of(run, sources, mesh)
        cache = output.cache_folder(run.data, folder)
        date = place.decide("date", lambda: output.template_date(folder))
        together = place if place.shares("data.cache", cache) else None
        data = read_data(run.data, tokenizer, cache, print, date=date, seed=run.seed, place=together)
        output.write_json(folder / "data.json", data.report)  # also of rows that the objective refuses
        data = data.examples(terms, length)
        output.write_json(folder / "data.json", data.report)
        steps = steps_over(run, data)
        tokenizer = dated(tokenizer, date=data.date).tokenizer
        arguments, judge = run.data.chat_template_kwargs, against_start(run.evaluation, folder, mesh)
        prompts = read_prompts(run.evaluation, sources.policy, tokenizer, arguments, judge)
        check_tokens(data, models.spec_of(sources.policy, sources.rows, scalar_head=scores).vocab_size, tokenizer)
        packing = Packing.of(run.batch, length, terms, mesh)
        attention = attention_for(run.model, policy.spec, mesh, length)
        return cls(run, folder, sources, mesh, tokenizer, data, steps, packing, prompts, ending, policy, attention)

    @property
    def cache(self) -> Path:
        """Where tokenised data and reference log-probabilities are kept."""
        return output.cache_folder(self.run.data, self.folder)

    def load_policy(self) -> tuple[DecoderSpec, Weights]:
        """The policy's starting weights on the mesh, divided into trained and frozen."""
        return self.policy.spec, self.policy.load(self.mesh, self.run.seed)

    def objective(self, spec: DecoderSpec, weights: Weights) -> TrainingObjective:
        """What is minimised, on this model."""
        run = self.run
        how = {"statistics": run.log.token_statistics, "dropout": self.policy.dropout}
        model = run.model.model_copy(update={"attention": self.attention})
        return models.make_objective(model, run.objective.terms, spec, weights, self.mesh, **how)

    def journal(self, start: int | None, began: float) -> Journal:
        """The journal of a command that `began` then; what it has of steps after the checkpoint `start` is dropped."""
        after = -1 if start is None else start
        how = {
            "process": here().process,
            "began": began,
            "background": self.background(),
        }
        return Journal(self.folder, self.steps, self.run.log, after, **how)

    def background(self) -> Background:
        """What a journal is told of the run; nothing in it describes this machine."""
        run = self.run
        every = self.steps_of(run.evaluation.every)
        settings = public(config.flat(config.dump(run)))
        return Background(settings, every, Page(self.folder) if run.log.report else None)

    def steps_of(self, every: int | str | None) -> Fraction | None:
        """Steps of an interval that a setting gives; None: never."""
        return None if every is None else steps_between(every, self.data.train.num_pairs, self.run.batch.pairs)

    def reference(
        self, objective: TrainingObjective, weights: Weights, journal: Journal, *, resumes: bool
    ) -> Reference:
        """The reference, computed or kept live."""
        return make_reference(
            self.run.reference,
            self.sources,
            weights,
            objective,
            self.data,
            ReferenceScorer(self.mesh, self.packing, self.cache, journal),
            start=self.policy,
            resumes=resumes,
        )

    def trainer(self, objective: TrainingObjective, weights: Weights, reference: Reference) -> Trainer:
        """The step, and the batches that it takes."""
        run = self.run
        order = {"shuffle": run.data.shuffle, "seed": run.seed}
        batches = self.packing.steps(self.data.train, objective.spec, self.steps, **order, reference=reference.train)
        how = {"optimizer": run.optimizer, "lr_ratio": run.adapter.lr_ratio, "seed": run.seed}
        return fitted(
            lambda objective: Trainer(objective, weights, batches, reference, self.mesh, **how),
            objective,
            run.model.remat,
            min(here().everyone("room", room_of(self.mesh)), key=lambda room: room or 0),
        )

    def evaluator(self, objective: TrainingObjective, weights: Weights, reference: Reference) -> Evaluator:
        """What is measured on held-out data."""
        held_out = self.data.held_out
        rows = {
            name: self.packing.sweep(encoded, objective.spec, reference.held_out.get(name))
            for name, encoded in held_out.items()
        }
        every = self.steps_of(self.run.evaluation.every)
        live = reference.weights
        rounding = self.rounding(objective.spec, weights)
        return Evaluator(
            objective, self.mesh, held_out=rows, reference=live, prompts=self.prompts, every=every, rounding=rounding
        )

    def rounding(self, spec: DecoderSpec, weights: Weights) -> Rounding | Merging | None:
        """What writing what was trained rounds away; None of an adapter that is written alone."""
        if self.policy.adapter is not None:
            merges = "merged" in self.run.export_kinds
            return Merging.of(self.run.export, spec, self.sources.policy) if merges else None
        return Rounding.of(self.run.export, spec, self.sources.policy, weights.trained, self.run.seed)

    def watch(self, saver: Saver, journal: Journal) -> MetricWatch | None:
        """What says which step is the best, where the run looks for it."""
        return watch_of(self.run, self.folder, saver.past, saver.kept, journal.note)

    def recorder(
        self, trainer: Trainer, evaluator: Evaluator, journal: Journal, *, after: int, watch: MetricWatch | None = None
    ) -> Recorder:
        """What is written down of each step `after` so many."""
        run = self.run
        same = self.sources.reference_is_policy and self.policy.starts_at_reference(self.run.reference.adapter)
        first = FirstStep.of(trainer.objective, self.data.train, run.batch.pairs, self.cache, reference_is_policy=same)
        alarms = make_alarms(
            run.alarms,
            trainer,
            self.folder,
            known_loss=first.known_loss,
            optimizer=run.optimizer,
            every=run.log.every,
        )
        return Recorder(
            trainer,
            evaluator,
            self.data,
            journal,
            after=after,
            checks=Checks(first, alarms, run.log.max_nonfinite),
            watch=watch,
        )

    def record(self, past: Past) -> dict[str, Any]:
        """Write down what this run is, and return what it depends on beside its settings.

        Raises:
          UserError: it would not be the run that the folder holds.
        """
        facts = {**result.facts(self.sources, self.data, self.steps), **own_objectives(self.run)}
        here().same("what the run is made of differs", facts)
        said = past.check_facts(self.run, facts, self.data.train)
        changed = past.changed_by(self.run, said)
        for line in [*said, *(line for line in changed[len(past.changed) :] if ACCEPTED not in line)]:
            print(line)
        more = {result.STAMPS: result.stamps(self.sources), **({"changed": changed} if changed else {})}
        output.record_run(self.run, self.folder, facts, machine=machine_of(self.mesh), **more)
        return facts


def _check_processes() -> None:
    """Refuse processes that JAX knows of and the run does not: each would take itself for the only one."""
    if jax.process_count() != here().count:
        raise UserError(
            f"JAX was told of {jax.process_count()} processes before the run began; leave jax.distributed.initialize "
            "to dpo_jax.train, which calls it"
        )


def processes_line(mesh: jax.sharding.Mesh) -> str:
    """How many processes and hosts a run of several has, and its devices."""
    hosts = here().everyone("hosts", here().host)
    return (
        f"{len(hosts)} processes on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}, {mesh.size} devices "
        f"({jax.local_device_count()} of process 0)"
    )


def machine_of(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What a run runs on: versions, and devices with how they are laid out."""
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}" + (f" ({axes})" if axes else "")
    versions = {"dpo_jax": dpo_jax.__version__, "jax": jax.__version__, "Python": platform.python_version()}
    return versions | {"devices": devices, "processes": str(jax.process_count())}
