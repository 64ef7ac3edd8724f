"""What several keys of a config say together: the batch, the length, the schedule, what is measured and kept."""

import re
from fractions import Fraction

from dpo_jax.config.bridge.adapters import adapter
from dpo_jax.config.bridge.conversion import NUMBERS, Conversion, Left, meaning_of
from dpo_jax.config.bridge.datasets import data
from dpo_jax.config.bridge.objectives import objective
from dpo_jax.config.bridge.source import Config
from dpo_jax.config.bridge.trainers import AXOLOTL, FACTORY, TORCHTUNE, OtherTrainer
from dpo_jax.config.bridge.values import VALUES
from dpo_jax.config.elsewhere import FOREIGN, answer_to
from dpo_jax.config.run import FIELDS
from dpo_jax.errors import nearest
from dpo_jax.hf.settings import REPOSITORY

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "get_cosine_schedule_with_warmup": "cosine",
}
"""Schedules that are the same here."""
NEAREST = (
    ("cosine", "cosine"),
    ("constant", "constant"),
    ("stable", "constant"),
    ("cycle", "cosine"),
    ("rex", "cosine"),
)
"""Ours that is most like one of theirs, by a part of its name; else linear."""
OPTIMIZERS = (("adafactor", "adafactor"), ("lion", "lion"), ("adamw", "adamw"))
EXACT = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adafactor", "lion", "adamw_apex_fused", "AdamW")
WEIGHTS = "the weights that are trained have that dtype too there; here they are float32 (optimizer.param_dtype)"
LENGTHS = {
    AXOLOTL.name: "rows that are longer are dropped there; here they lose what data.truncation says",
    FACTORY.name: "a longer row loses of its prompt and its answers in proportion there; here see data.truncation",
    TORCHTUNE.name: "a longer row loses its end there; here see data.truncation",
}


def precision(c: Conversion) -> None:
    """model.compute_dtype, and what is said of the weights' own dtype."""
    dtype = str(c.get("torch_dtype") or c.get("dtype") or "auto").removeprefix("torch.")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    half = "torch_dtype" if "torch_dtype" in c else "dtype"
    if c.flag("fp16") and not c.flag("bf16"):
        c.put("model.compute_dtype", "float16", "fp16")
    elif c.flag("bf16") or c.flag("pure_bf16"):
        c.put("model.compute_dtype", "bfloat16", "bf16", "pure_bf16")
    elif dtype in ("bfloat16", "float16") or (c.trainer is TORCHTUNE and dtype == "float32"):
        c.put("model.compute_dtype", dtype, half, note=None if dtype == "float32" else WEIGHTS)
    elif c.is_given("bf16") and str(c.get("bf16")).lower() == "false" and not c.flag("fp16"):
        c.put("model.compute_dtype", "float32", "bf16", "fp16")
    c.leave(WEIGHTS if dtype == "bfloat16" else "not needed: weights are trained in float32", "torch_dtype", "dtype")
    c.leave("not needed: model.compute_dtype says it", "bf16", "fp16", "pure_bf16")


def batch(c: Conversion) -> None:
    """batch.pairs, of all devices together."""
    each, times = c.get("per_device_train_batch_size", 1), c.get("gradient_accumulation_steps", 1)
    if c.trainer is AXOLOTL and c.is_given("batch_size") and not c.is_given("gradient_accumulation_steps"):
        times = max(int(c.get("batch_size") // max(each, 1)), 1)
    shared = [max(int(c.get(name, 1)), 1) for name in ("tensor_parallel_size", "context_parallel_size")]
    devices = c.devices or c.config.devices
    if devices is None and "single_device" in c.config.file:
        devices = 1
    if devices is None:
        c.asked["--devices"] = "the number of devices is not in the file and taken as 1; give --devices N"
    unknown = {"per_device_train_batch_size", "gradient_accumulation_steps"} & {*map(c.name_of, c.asked_keys())}
    parts = [each, times, max((devices or 1) // (shared[0] * shared[1]), 1)]
    if all(isinstance(part, int) for part in parts) and not unknown:
        said = f"{each} on each device x {times} accumulated x {parts[2]} device{'s' * (parts[2] != 1)}"
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "batch_size")
        c.put("batch.pairs", parts[0] * parts[1] * parts[2], *names, note=said)
    else:
        c.asked["batch.pairs"] = (
            f"{', '.join(sorted(unknown)) or 'the batch'} is computed there, so a step's pairs are not known"
        )


def length(c: Conversion) -> None:
    """steps, or epochs."""
    steps, epochs = c.get("max_steps"), c.get("num_train_epochs", 1)
    limit = c.get("max_steps_per_epoch")
    if isinstance(steps, int) and steps > 0:
        c.put("steps", steps, "max_steps")
        c.leave("max_steps decides", "num_train_epochs")
    elif isinstance(limit, int) and isinstance(epochs, int) and limit > 0:
        c.put(
            "steps",
            limit * epochs,
            "max_steps_per_epoch",
            "num_train_epochs",
            note="fewer there if the data end before",
        )
    else:
        c.put("epochs", float(epochs), "num_train_epochs")
        c.leave("epochs say how long the run is", "max_steps")


def schedule(c: Conversion) -> None:
    """The optimizer, its schedule and its warm-up."""
    _optimizer(c)
    name = str(c.get("lr_scheduler_type", "linear")).rpartition(".")[2].lower()
    ours = SCHEDULES.get(name) or next((to for part, to in NEAREST if part in name), "linear")
    note = None if name in SCHEDULES else f"{name} is not there; {ours} is the nearest, and falls to 0 if it falls"
    c.put("optimizer.schedule", ours, "lr_scheduler_type", note=note)
    steps, share = c.get("warmup_steps"), c.get("warmup_ratio")
    if name == "constant":
        c.put("optimizer.warmup_steps", 0, "lr_scheduler_type", note="constant has no warm-up there")
        c.leave("constant has no warm-up there", "warmup_steps", "warmup_ratio")
    elif isinstance(steps, float) and 0 < steps < 1:
        c.put("optimizer.warmup_fraction", steps, "warmup_steps")
    elif isinstance(steps, int | float) and (steps > 0 or not share):
        most = c.lines["steps"].value - 1 if "steps" in c.lines else int(steps)
        note = f"{steps:g} there, which the run has not" if most < steps else None
        c.put("optimizer.warmup_steps", min(int(steps), most), "warmup_steps", note=note)
    elif share is not None:
        most = "warmup_ratio" in c.standard
        c.put(
            "optimizer.warmup_fraction", float(share), "warmup_ratio", note="at most 100 steps there" if most else None
        )
    c.leave("the other warm-up decides", "warmup_steps", "warmup_ratio")
    if c.get("learning_rate") is not None:
        c.put("optimizer.learning_rate", c.get("learning_rate"), "learning_rate")
    else:
        c.asked.setdefault("optimizer.learning_rate", "the file gives no learning rate, and there is none by default")


def _optimizer(c: Conversion) -> None:
    name = str(c.get("optim", "adamw")).rpartition(".")[2]
    ours = next((to for part, to in OPTIMIZERS if part in name.lower()), "adamw")
    note = f"{name} keeps its state in fewer bits, or in parts; the same steps otherwise" if name not in EXACT else None
    if not any(part in name.lower() for part, _ in OPTIMIZERS):
        note = f"{name} is not there; a rate for adamw is another one"
    c.put("optimizer.name", ours, "optim", note=note)
    for key, setting in (("weight_decay", "optimizer.weight_decay"), ("max_grad_norm", "optimizer.clip_norm")):
        if key in c:
            c.put(setting, c.get(key) or (None if key == "max_grad_norm" else 0.0), key)
    unused = {"adamw": (), "lion": ("adam_epsilon",), "adafactor": ("adam_epsilon", "adam_beta1", "adam_beta2")}[ours]
    c.leave(f"{ours} does not use it", *unused)


def limit(c: Conversion) -> None:
    """data.max_length and data.truncation."""
    most = c.get("max_length")
    if isinstance(most, int) and most > 1:
        c.put("data.max_length", most, "max_length", note=LENGTHS.get(c.trainer.name))
    elif c.trainer is TORCHTUNE:
        c.asked["data.max_length"] = "rows have no limit there (tokenizer.max_seq_len is empty); taken as 1024"
    mode = c.get("truncation_mode")
    if mode in ("keep_start", "keep_end"):
        c.put("data.truncation", mode, "truncation_mode")


def reference(c: Conversion) -> None:
    """The reference section."""
    if c.flag("sync_ref_model"):
        c.put(
            "reference.update_every", int(c.get("ref_model_sync_steps", 512)), "ref_model_sync_steps", "sync_ref_model"
        )
        c.put("reference.update_rate", float(c.get("ref_model_mixup_alpha", 0.6)), "ref_model_mixup_alpha")
    c.leave("the reference stays where it is", "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
    free = c.method in ("orpo", "cpo", "reward", "sft") or c.flag("reference_free")
    same = c.get("ref_model") == c.get("model_name_or_path")
    if c.is_given("ref_model") and not free and not same:
        c.put("reference.path", str(c.get("ref_model")), "ref_model")
    c.leave(
        "not needed: the starting weights are the reference" if same else "no reference is compared with", "ref_model"
    )
    if free:
        c.leave("no reference is compared with", "precompute_ref_log_probs")


def evaluation(c: Conversion) -> None:
    """When held-out data are measured, and what is made of it."""
    how = str(c.get("eval_strategy", "no")).lower()
    held = any(key in c.lines or key in c.told for key in ("data.eval", "data.eval_fraction"))
    every = c.get("eval_steps")
    per_epoch = c.get("evals_per_epoch") or 0
    if not held:
        what = "nothing is held out: data.eval or data.eval_fraction would be needed"
        c.leave(what, "eval_steps", "eval_strategy", "evals_per_epoch", *BEST)
        return
    if per_epoch > 0:
        c.put("evaluation.every", _epochs(1 / Fraction(str(per_epoch))), "evals_per_epoch")
    elif how == "epoch":
        c.put("evaluation.every", "1 epoch", "eval_strategy")
    elif isinstance(every, float) and 0 < every < 1:
        _share_of_run(c, "evaluation.every", every, "eval_steps")
    elif isinstance(every, int) and every > 0:
        c.put("evaluation.every", every, "eval_steps")
    elif how == "steps" and c.trainer is not AXOLOTL:
        c.put("evaluation.every", VALUES["log.every"](c.get("logging_steps", 10)), "logging_steps", "eval_strategy")
    c.leave("evaluation.every says it", "eval_strategy", "eval_steps", "evals_per_epoch")
    _best(c)


def _epochs(share: Fraction) -> str:
    return "1 epoch" if share == 1 else f"{max(float(share), 1e-6):.6f}".rstrip("0").rstrip(".") + " epochs"


def _share_of_run(c: Conversion, ours: str, every: float, *names: str) -> None:
    if "steps" in c.lines:
        c.put(ours, max(round(every * c.lines["steps"].value), 1), *names)
    else:
        passes = Fraction(str(every)) * Fraction(str(c.lines["epochs"].value))
        c.put(ours, _epochs(passes), *names, note="a share of the run there")


BEST = ("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience")


def _best(c: Conversion) -> None:
    patience = c.get("early_stopping_patience")
    wanted = c.flag("load_best_model_at_end") or c.get("save_strategy") == "best" or bool(patience)
    if wanted and "evaluation.every" in c.lines:
        metric = str(c.get("metric_for_best_model", "loss"))
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        c.put("checkpoint.best", metric, "metric_for_best_model", "load_best_model_at_end")
        if isinstance(patience, int) and patience > 0:
            c.put("evaluation.patience", patience, "early_stopping_patience")
    c.leave("the last checkpoint is exported, unless checkpoint.best says otherwise", *BEST)


def checkpoints(c: Conversion) -> None:
    """checkpoint.every, in steps or passes over the data."""
    every = c.get("save_steps")
    how = str(c.get("save_strategy", "steps")).lower()
    if isinstance(every, float) and 0 < every < 1 and how in ("steps", "best"):
        _share_of_run(c, "checkpoint.every", every, "save_steps", "save_strategy")
    elif isinstance(every, int) and every > 0 and how in ("steps", "best"):
        c.put("checkpoint.every", every, "save_steps", "save_strategy")
    elif (per_epoch := c.get("saves_per_epoch") or 0) > 0:
        c.put("checkpoint.every", _epochs(1 / Fraction(str(per_epoch))), "saves_per_epoch")
    elif how == "epoch":
        c.put("checkpoint.every", "1 epoch", "save_strategy")
    what = "checkpoint.every says it (100 steps unless given), and the last step is always saved"
    c.leave(what, "save_steps", "save_strategy", "saves_per_epoch")


def hub(c: Conversion) -> None:
    """export.push: only with the name of an owner."""
    name = str(c.get("hub_model_id") or "")
    wanted = c.flag("push_to_hub") or (c.trainer is AXOLOTL and bool(name))
    if wanted and REPOSITORY.fullmatch(name):
        c.put("export.push", name, "hub_model_id", "push_to_hub")
        if str(c.get("hub_private_repo", True)).lower() == "false":
            c.put("export.private", False, "hub_private_repo")
    elif wanted:
        c.asked["export.push"] = f"the owner of {name or 'the repository'}, as in OWNER/NAME; nothing is pushed without"
    c.leave(
        "nothing is pushed unless export.push=OWNER/NAME is given", "hub_model_id", "push_to_hub", "hub_private_repo"
    )


def names_of_services(c: Conversion) -> None:
    """Axolotl and LLaMA-Factory name a service by its project or a flag."""
    if c.trainer is AXOLOTL and c.get("wandb_project") and c.get("report_to") is None:
        c.put("log.loggers", ("wandb",), "wandb_project")
        c.put("log.project", str(c.get("wandb_project")), "wandb_project")
    if "torchtune" in c.trainer.name and c.is_given("metric_logger._component_"):
        if "WandB" in str(c.get("metric_logger._component_")):
            c.put("log.loggers", ("wandb",), "metric_logger._component_")
        c.leave_below("metrics.jsonl and TensorBoard's files are always written (log section)", "metric_logger")


def templates(c: Conversion) -> None:
    """Arguments of the chat template, and the number of tokens that a prompt may have."""
    found = {}
    if c.is_given("enable_thinking") and str(c.get("enable_thinking")).lower() == "false":
        found["enable_thinking"] = False
    inner = [name for name in c.known if name.startswith("chat_template_kwargs.")]
    found |= {name.partition(".")[2]: c.get(name) for name in inner}
    if found:
        c.put("data.chat_template_kwargs", found, "enable_thinking", *inner)
    c.leave("true is what templates take it for", "enable_thinking")
    for name in ("chat_template", "chat_template_path"):
        value = str(c.get(name, "tokenizer_default"))
        if "{%" in value or "{{" in value:
            c.asked["data.template"] = "the file has a chat template of its own; save it as a file and give that here"
        elif c.trainer is AXOLOTL and not value.startswith("tokenizer_default"):
            c.asked["data.template"] = (
                f"a file of the chat template {value}, if the model's own is another, or it has none"
            )


def torchtune_only(c: Conversion) -> None:
    """Blocks of torchtune that say what a folder says, and interpolations of its own names."""
    if c.trainer is not TORCHTUNE:
        return
    kept = "the folder of model.path says what the model and its tokenizer are"
    c.leave_below(kept, "tokenizer", "checkpointer", "ref_checkpointer")
    adapted = [name for name in c.known if name.startswith("model.") and ("lora" in name or name == "model.use_dora")]
    c.leave("an adapter is trained where adapter.rank is given", *adapted)
    c.leave_below(kept, "model")
    c.leave("objective.name says it", "loss._component_")
    c.leave_below("the loss does not use it", "loss")
    c.leave_below("the optimizer does not use it here", "optimizer", "lr_scheduler")
    if c.is_given("adapter_name_or_path"):
        c.leave("adapter.path takes the folder of a PEFT adapter", "adapter_name_or_path")


ORDER = (
    *(
        templates,
        precision,
        batch,
        length,
        schedule,
        limit,
        data,
        objective,
        adapter,
        reference,
        evaluation,
        checkpoints,
    ),
    *(hub, names_of_services, torchtune_only),
)
"""The rules, in an order in which each finds what it needs of the others."""


def converted(
    config: Config,
    trainer: OtherTrainer,
    method: str,
    *,
    devices: int | None = None,
    told: frozenset[str] = frozenset(),
) -> Conversion:
    """What becomes of every key of a config; `told` are settings of ours that will replace those of the file.

    Raises:
      UserError: a loss that is not here.
    """
    c = Conversion(_interpolated(config), trainer, method, devices, told)
    for rule in ORDER:
        rule(c)
    for name, given in c.unsettled():
        _by_name(c, name, given.key)
    c.put("model.path", str(c.get("model_name_or_path")), "model_name_or_path")
    if "model_name_or_path" not in c:
        c.lines.pop("model.path")
        c.asked.setdefault("model.path", "which model is trained is not said")
    c.put("output", str(c.get("output_dir", "trained")), "output_dir")
    _tidy(c)
    return c


def _interpolated(config: Config) -> Config:
    """`${key}` in texts replaced by that key's value, as torchtune has it."""

    def value(match: re.Match[str]) -> str:
        found = config.value(match[1])
        return match[0] if found is None else str(found)

    for key, given in config.given.items():
        if isinstance(given.value, str) and "${" in given.value:
            replaced = re.sub(r"\$\{([\w.]+)\}", value, given.value)
            config.given[key] = type(given)(key, replaced, given.line)
    return config


def _by_name(c: Conversion, name: str, key: str) -> None:
    """What is known of a key that no rule has looked at: a setting that means the same, or why there is none."""
    answer = meaning_of(name) or meaning_of(key)
    if answer is None:
        near = nearest(name[:80], {*FOREIGN, *c.trainer.names, *c.trainer.default(c.method), *NUMBERS}, 0.8)
        meant = f"; did you mean {near}?" if near else ""
        c.asked[key] = f"is not known here, and left out{meant}"
        c.left[key] = f"is not known here{meant}"
    elif answer not in FIELDS or ("." in name and answer_to(name) is None):
        c.left[key] = answer  # what a whole block is called says nothing of the keys in it
    elif answer in c.lines:
        c.left[key] = f"{answer} is said by {', '.join(one.key for one in c.lines[answer].origins) or 'another key'}"
    else:
        value = VALUES.get(answer, lambda value: value)(c.get(name))
        if isinstance(value, Left):
            c.left[key] = value.why
        else:
            c.put(answer, value, name)


ALWAYS = ("optimizer.learning_rate", "objective.beta", "batch.pairs", "objective.name")
"""Written even where it is the trainer's default and ours: what decides most."""


def _tidy(c: Conversion) -> None:
    """Take out lines that come of defaults alone and say what is the default here as well."""
    for key, line in list(c.lines.items()):
        default: object = FIELDS[key].default if key in FIELDS else None
        if not line.origins and key not in ALWAYS and not key.startswith("objective") and line.value == default:
            del c.lines[key]
