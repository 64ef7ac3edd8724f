"""What a Python script gives TRL: the arguments of `DPOConfig(...)` and its relatives, read with `ast`."""

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_jax.config.bridge.script_data import CHANGES, LOADS, data_sets
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
OBJECTS = tuple(
    "args model ref_model train_dataset eval_dataset tokenizer processing_class data_collator callbacks "
    "peft_config".split()
)
"""Arguments of a trainer that are objects of the script, read where they are made."""


def notebook_text(file: str, text: str) -> str:
    """The code of a notebook's cells, without commands to the notebook itself.

    Raises:
      UserError: it is no notebook.
    """
    try:
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        lines = "\n".join("".join(cell) for cell in cells).splitlines()
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{short(file)}: is no notebook that can be read; save it again, or as NAME.py") from None
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


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
    for given in (*data_sets(tree, lambda node: _value(node, constants)), *_changes(tree)):
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
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        names = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return dict(zip(names, (_value(item, constants) for item in node.values), strict=True))
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


def _loads(tree: ast.AST) -> bool:
    return any(_name(node.func) in LOADS for node in ast.walk(tree) if isinstance(node, ast.Call))


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _changes(tree: ast.AST) -> Iterator[Given]:
    """What the script does to the rows of a data set before they are trained on, which a config cannot say."""
    sets: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (_loads(node.value) or sets & _names(node.value)):
            sets |= set(_targets(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            if _loads(node.func.value) or sets & _names(node.func.value):
                words = ", ".join(map(ast.unparse, [*node.args, *node.keywords]))
                yield Given(f"dataset.{node.func.attr}", Computed(f"{node.func.attr}({words})"), node.lineno)


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _settings(name: str, call: ast.Call, constants: Mapping[str, Any]) -> Iterator[Given]:
    """The keys of configs that one call stands for."""
    arguments = {word.arg: _value(word.value, constants) for word in call.keywords if word.arg}
    for word in call.keywords:
        if word.arg is None:  # DPOConfig(**these)
            these = _value(word.value, constants)
            arguments |= these if isinstance(these, dict) else {f"**{ast.unparse(word.value)}": these}
    lines = {word.arg: word.value.lineno for word in call.keywords if word.arg}
    positions = [_value(argument, constants) for argument in call.args]
    for key, value in _values(name, positions, arguments).items():
        yield from flattened(key, value, lines.get(key, call.lineno))


def _values(name: str, positions: list[Any], arguments: dict[str, Any]) -> Mapping[str, Any]:
    """What a call says, under the names that configs have."""
    first = positions[0] if positions else None
    if name in CONFIGS or name == "TrainingArguments":
        return arguments if first is None else {"output_dir": first, **arguments}
    if name == "LoraConfig" or (name == "get_peft_model" and "r" in arguments):
        found = {LORA.get(key, key): value for key, value in arguments.items() if key not in OBJECTS}
        return {"use_peft": True, **PEFT_DEFAULTS, **found}
    if name == "BitsAndBytesConfig":
        return arguments
    if name in TRAINERS:
        return _of_trainer(arguments)
    return _of_model(name, positions, arguments) if name.endswith(".from_pretrained") else {}


def _of_model(name: str, positions: list[Any], arguments: dict[str, Any]) -> Mapping[str, Any]:
    if name.startswith("PeftModel.") and len(positions) > 1:
        return {"use_peft": True, "adapter_name_or_path": positions[1]}
    first = arguments.pop("model_name", positions[0] if positions else None)
    if "Model" not in name or not isinstance(first, str):
        return {}
    renamed = {("model_revision" if key == "revision" else key): value for key, value in arguments.items()}
    return {"adapter_name_or_path" if name.startswith("AutoPeft") else "model_name_or_path": first, **renamed}


def _of_trainer(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is set at a trainer itself: the model by name, and, in old scripts, settings of the method."""
    found = {key: value for key, value in arguments.items() if key not in OBJECTS}
    if isinstance(arguments.get("model"), str):
        found["model_name_or_path"] = arguments["model"]
    if isinstance(arguments.get("ref_model"), str):
        found["ref_model"] = arguments["ref_model"]
    return found
