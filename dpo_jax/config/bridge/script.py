"""What a Python script gives TRL: the arguments of `DPOConfig(...)` and its relatives, read with `ast`."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.config.bridge.source import Computed, Config, Given, flattened
from dpo_jax.errors import UserError, short

CONFIGS = {
    "DPOConfig": "dpo",
    "KTOConfig": "kto",
    "ORPOConfig": "orpo",
    "CPOConfig": "cpo",
    "RewardConfig": "reward",
    "SFTConfig": "sft",
}
"""Classes of TRL whose arguments are settings, and the method that each stands for."""
OTHERS = "GRPOConfig PPOConfig RLOOConfig OnlineDPOConfig NashMDConfig XPOConfig GKDConfig PRMConfig BCOConfig".split()
TRAINERS = {name.replace("Config", "Trainer"): method for name, method in CONFIGS.items()}
LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "layers_to_transform": "lora_layers_to_transform",
}
"""Arguments of PEFT's LoraConfig that go by other names in configs."""
PEFT_DEFAULTS = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
OBJECTS = "args model train_dataset eval_dataset tokenizer processing_class data_collator callbacks peft_config"
"""Arguments of a trainer that are objects of the script, read where they are made."""


def script_config(file: str, text: str) -> Config:
    """The settings of a script that calls TRL.

    Raises:
      UserError: it is not Python, or calls none of TRL's configs with arguments of its own.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{short(file)}: is not Python that can be read ({error}); correct it first") from None
    calls = [(_name(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    config = Config(file, {}, method=_method(file, [name for name, _ in calls]))
    constants = _constants(tree)
    for name, call in calls:
        for given in _settings(name, call, constants):
            config.given.setdefault(given.key, given)
    if not any(name in (*CONFIGS, "TrainingArguments") and call.keywords for name, call in calls):
        raise UserError(
            f"{short(file)}: has no call such as DPOConfig(learning_rate=...) with arguments; where it takes them from "
            "a command line, give a file NAME.sh with that line"
        )
    return config


def _name(node: ast.AST) -> str:
    """The last part of what is called: `trl.DPOConfig` is DPOConfig; `A.from_pretrained` has its class before it."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.from_pretrained" if node.attr == "from_pretrained" else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _method(file: str, names: list[str]) -> str | None:
    found = [CONFIGS.get(name) or TRAINERS.get(name) for name in names]
    if method := next(filter(None, found), None):
        return method
    if other := next((name for name in names if name in OTHERS), None):
        raise UserError(f"{short(file)}: calls {other}, which is not here; dpo, kto, orpo, cpo, reward and sft are")
    return None


def _constants(tree: ast.AST) -> dict[str, Any]:
    """Names that are assigned once, to something known."""
    found: dict[str, Any] = {}
    several: set[str] = set()
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                several |= {target.id} & set(found)
                found[target.id] = _value(value, found)
    return {name: value for name, value in found.items() if name not in several and not isinstance(value, Computed)}


def _value(node: ast.AST, constants: Mapping[str, Any]) -> Any:
    """A literal, a name of one, an f-string or a product of such; `Computed` of anything else."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.Attribute) and _name(node.value) == "torch":
        return node.attr
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item, constants) for item in node.elts]
        return Computed(ast.unparse(node)) if any(isinstance(item, Computed) for item in items) else tuple(items)
    if isinstance(node, ast.JoinedStr):
        parts = [
            _value(part.value if isinstance(part, ast.FormattedValue) else part, constants) for part in node.values
        ]
        if not any(isinstance(part, Computed) for part in parts):
            return "".join(map(str, parts))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Computed(ast.unparse(node))


def _settings(name: str, call: ast.Call, constants: Mapping[str, Any]) -> Iterator[Given]:
    """The keys of configs that one call stands for."""
    arguments = {word.arg: _value(word.value, constants) for word in call.keywords if word.arg}
    first = _value(call.args[0], constants) if call.args else None
    line = call.lineno

    def given(values: Mapping[str, Any]) -> Iterator[Given]:
        for key, value in values.items():
            yield from flattened(key, value, lines.get(key, line))

    lines = {word.arg: word.value.lineno for word in call.keywords if word.arg}
    if name in CONFIGS or name == "TrainingArguments":
        yield from given(arguments if first is None else {"output_dir": first, **arguments})
    elif name == "LoraConfig":
        yield from given(
            {"use_peft": True, **PEFT_DEFAULTS, **{LORA.get(key, key): arguments[key] for key in arguments}}
        )
    elif name == "get_peft_model" and "r" in arguments:
        found = {LORA.get(key, key): value for key, value in arguments.items() if key not in OBJECTS}
        yield from given({"use_peft": True, **PEFT_DEFAULTS, **found})
    elif name == "BitsAndBytesConfig":
        yield from given(arguments)
    elif name in TRAINERS:
        yield from given(_of_trainer(arguments))
    elif name == "load_dataset" and isinstance(first, str):
        yield from given(_of_data(call, first, arguments, constants))
    elif name.endswith("Model.from_pretrained") and isinstance(first := arguments.pop("model_name", first), str):
        known = {"revision": "model_revision", "torch_dtype": "torch_dtype", "dtype": "dtype"}
        yield from given({"model_name_or_path": first} | {known.get(key, key): arguments[key] for key in arguments})


def _of_trainer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is set at a trainer itself: the model by name, and, in old scripts, settings of the method."""
    found = {key: value for key, value in arguments.items() if key not in (*OBJECTS.split(), "ref_model")}
    if isinstance(arguments.get("model"), str):
        found["model_name_or_path"] = arguments["model"]
    if isinstance(arguments.get("ref_model"), str):
        found["ref_model"] = arguments["ref_model"]
    return found


def _of_data(call: ast.Call, first: str, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    second = _value(call.args[1], constants) if len(call.args) > 1 else arguments.get("name")
    found = {"dataset_name": first, "dataset_config": second, "dataset_train_split": arguments.get("split")}
    rest = {f"load_dataset.{key}": value for key, value in arguments.items() if key not in ("name", "split")}
    found |= {"data_files": rest.pop("load_dataset.data_files")} if "load_dataset.data_files" in rest else {}
    split = str(arguments.get("split") or "")
    if split.startswith(("test", "valid", "eval", "dev")):
        return {"eval_dataset_name": first, "eval_dataset_config": second, "eval_dataset_split": split}
    return {key: value for key, value in found.items() if value is not None} | rest
