"""`python -m dpo_jax.train CONFIG [key=value ...]`: from a folder and preferences to a folder, as it happens."""

import sys
import time
from collections.abc import Sequence

from dpo_jax.config import run as config


@config.command
def main(argv: Sequence[str]) -> int:
    """Read the settings, then train; nothing heavy is imported before they are known to be right."""
    run = config.load(argv)
    config.quiet_libraries()
    return train(run)


def train(run: config.Run) -> int:
    """The whole job. Running it again goes on where it stopped; exit code 0 when done, 75 or 130 when stopped early."""
    began = time.perf_counter()
    from dpo_jax.hf.tokenizer import load_tokenizer
    from dpo_jax.run import compile_cache, models
    from dpo_jax.run import folder as stages
    from dpo_jax.run import sources as exchange
    from dpo_jax.run import trainer as loop
    from dpo_jax.training.checkpoints import Checkpoints

    with stages.opened(run) as folder:
        if stages.is_finished(folder):
            return stages.show_result(run, folder, "this run is finished already")
        exchange.check_export(run)
        compile_cache.use(run.model.compile_cache)
        sources = exchange.find_models(run, stages.recorded(folder))
        mesh = models.make_mesh(run)
        tokenizer = load_tokenizer(sources.policy, run.data.template)
        data = stages.load_data(run, tokenizer, folder, print)
        steps = stages.number_of_steps(run, data)
        exam = loop.read_exam(run, sources, tokenizer)
        models.check_models(run, sources)
        kind = run.optimizer.param_dtype
        policy = models.load_model(sources.policy, mesh, kind, scalar_head=run.objective.trains_reward_model)
        problem = models.make_problem(run, policy, mesh)
        with Checkpoints(folder / "checkpoints", run.checkpoint) as checkpoints:
            start = checkpoints.latest()
            with stages.make_journal(run, folder, steps, start, began=began) as journal:
                resumes = start is not None
                reference = stages.make_reference(run, sources, policy, problem, data, mesh, journal, resumes=resumes)
                batches = stages.training_batches(run, data, steps, mesh, policy, reference)
                trainer = loop.Trainer(run, policy, problem, batches, reference, mesh)
                evaluator = loop.Evaluator(run, problem, data, reference, tokenizer, mesh, exam)
                stages.record_run(run, folder, stages.facts(sources, data, steps))
                state = loop.start_or_resume(trainer, policy, checkpoints, start, evaluator, folder, journal)
                del policy
                state, stopped = loop.loop(run, trainer, state, evaluator, checkpoints, data, folder, journal)
                if stopped:
                    return stages.say_stopped(stopped, state, journal)
                stages.export(run, sources, problem.spec, state, folder, journal)
        return stages.show_result(run, folder, "done")


if __name__ == "__main__":
    sys.exit(main())
