"""Where the other trainers say their rows come from, as data.train, data.eval and data.columns."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_jax.config.bridge.conversion import Conversion
from dpo_jax.config.bridge.tables import COMPONENTS, FACTORY_SETS, PREPARED
from dpo_jax.config.bridge.trainers import AXOLOTL, FACTORY, TORCHTUNE
from dpo_jax.data.readers import is_named_as_rows
from dpo_jax.errors import short

Item = Mapping[str, Any]
Columns = dict[str, Any]

LOADERS = ("json", "jsonl", "csv", "parquet", "arrow", "text")
CHATTED = ("chatml.", "llama3.", "zephyr.", "bradley_terry.", "alpaca format", "instruct_dataset", "samsum", "grammar")
"""Kinds of rows whose texts become the turns of a chat there."""
FRAMED = ("alpaca_", "alpaca:", "gpteacher", "stack_exchange")
FRAME = "there the prompt stands in a frame of words ({}), as in `### Instruction:` or `Question:`; here it is plain"
ONE_MAPPING = "data.columns is one mapping for all files; the other data sets need {}: rename their columns"
PART = "a share of the rows is drawn there; here it is the first of them"
ROWS = "{} rows are held out there; here it is a share of the prompts: give data.eval_fraction, as in 0.05"
SAME = "evaluations are asked for and no held-out rows are named; give data.eval, or data.eval_fraction as 0.05"
OWN = "{} stands in LLaMA-Factory's own dataset_info.json there, and is taken as that says, as none is here"
NO_SPLITS = "a file has no splits, and no share of it is drawn: all rows of {} are trained on"
TRAINED = "{} is what is trained on"
HELD = "held-out rows are named, or nothing is measured there"


def data(c: Conversion) -> None:
    """data.train, data.eval, data.eval_fraction and data.columns."""
    {AXOLOTL.name: _axolotl, FACTORY.name: _factory, TORCHTUNE.name: _torchtune}.get(c.trainer.name, _trl)(c)
    _hold_out_nothing_trained_on(c)
    if "data.train" not in c.lines:
        c.asked.setdefault("data.train", "the data set is not named there in a way that can be read")


def is_file(name: str) -> bool:
    """Whether a data set is a file of rows, which has no splits: by its name, or because it is here."""
    return is_named_as_rows(name) or Path(name).suffix.lower() == ".csv" or Path(name).is_file()


def _hold_out_nothing_trained_on(c: Conversion) -> None:
    """Take out of data.eval what is data.train, or a part of it: as both splits of a file are the file."""
    line = c.lines.get("data.eval")
    if line is None or "data.train" not in c.lines:
        return
    gone = trained_on(line.value, c.lines["data.train"].value)
    if not gone:
        return
    why = TRAINED.format(short(", ".join(dict.fromkeys(gone)))) + ", and a file has no splits" * any(map(is_file, gone))
    sets = line.value if isinstance(line.value, Mapping) else {"": line.value}
    kept = {name: [one for one in _listed(of) if one not in gone] for name, of in sets.items()}
    left = {name: _plain(of) for name, of in kept.items() if of}
    if left:
        value = left if isinstance(line.value, Mapping) else left[""]
        c.lines["data.eval"] = dataclasses.replace(line, value=value, notes=(*line.notes, f"left out: {why}"))
    else:
        del c.lines["data.eval"]
        c.asked["data.eval_fraction"] = (
            f"{why}, so nothing is held out; give data.eval=FILE, or data.eval_fraction as 0.05"
        )
        for given in line.origins:
            if not c.used(given.key):
                c.left.setdefault(given.key, why)


def trained_on(held: object, trained: object) -> list[str]:
    """The sources of a value of data.eval whose rows are all in a source of data.train."""
    sets = held.values() if isinstance(held, Mapping) else [held]
    return [one for of in sets for one in _listed(of) if any(_is_within(one, other) for other in _listed(trained))]


def _listed(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [*filter(_is_text, value)] if isinstance(value, tuple) else []


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _plain(sources: list[str]) -> Any:
    return sources[0] if len(sources) == 1 else tuple(sources)


def _is_within(held: str, trained: str) -> bool:
    """Whether all rows of one source are rows of the other.

    >>> _is_within("./a.jsonl", "a.jsonl"), _is_within("org/d:train[90%:]", "org/d"), _is_within("org/d:test", "org/d")
    (True, True, False)
    """
    (name, part), (other, whole) = _rows_of(held), _rows_of(trained)
    return name == other and whole in (part, "")


def _rows_of(source: str) -> tuple[str, str]:
    """A source in one of the ways to write it, and the part of its rows that is taken: `[:90%]`."""
    if is_file(source):
        return os.path.normpath(source), ""
    base, bracket, part = os.path.normpath(source).partition("[")
    return (base if ":" in base else f"{base}:train"), bracket + part


def where(
    name: str, configuration: object = None, split: object = None, files: object = None, share: object = None
) -> tuple[str, ...]:
    """A data set as our settings name it: files, or NAME:CONFIGURATION:SPLIT."""
    if files:
        return tuple(map(str, files)) if isinstance(files, tuple) else (str(files),)
    if is_file(name):
        return (name,)
    split = str(split or "train")
    if isinstance(share, int | float) and 0 < share < 1 and "[" not in split:
        split += f"[:{round(share * 100):d}%]"
    parts = [name, *([str(configuration)] if configuration not in (None, "default") else []), split]
    return (":".join(parts if len(parts) > 2 or split != "train" else parts[:1]),)


def _put(c: Conversion, key: str, sources: list[str], *names: str, note: str | None = None) -> None:
    if sources := [*dict.fromkeys(sources)]:  # of a file each of its splits is the file
        c.put(key, _plain(sources), *names, note=note)


def _put_columns(c: Conversion, mappings: list[Columns], kinds: list[str], *names: str) -> None:
    """The mapping of the first data set that needs one; others are asked about. And how texts become a chat."""
    needed = [mapping for mapping in mappings if mapping]
    framed = next((kind for kind in kinds if kind.startswith(FRAMED)), None)
    if needed:
        c.put("data.columns", needed[0], *names, note=FRAME.format(framed) if framed else None)
        others = [mapping for mapping in mappings if mapping != needed[0]]
        if others:
            c.asked["data.columns"] = ONE_MAPPING.format(others[0] or "none")
    if any(kind.startswith(CHATTED) for kind in kinds):
        c.put("data.as_chat", True, *names)


def _fraction(c: Conversion) -> None:
    """A share that is held out, or a number of rows, of which the share is not known."""
    share = c.get("test_split_size")
    if not c.is_given("test_split_size") or not isinstance(share, int | float) or share == 0:
        c.leave("nothing is held out", "test_split_size")
    elif share < 1:
        c.put(
            "data.eval_fraction",
            float(share),
            "test_split_size",
            note="rows are drawn there; here prompts are, with all their answers",
        )
    else:
        c.asked["data.eval_fraction"] = ROWS.format(f"{share:g}")
        c.leave("counts rows; data.eval_fraction is a share", "test_split_size")


def _items(c: Conversion, prefix: str) -> Iterator[tuple[Item, list[str]]]:
    """The entries of a list of blocks, each with the names of its keys."""
    number = 0
    while any(name.startswith(f"{prefix}.{number}.") for name in c.known):
        inner = f"{prefix}.{number}."
        names = [name for name in c.known if name.startswith(inner)]
        yield {name.removeprefix(inner): c.get(name) for name in names}, names
        number += 1


def _measures(c: Conversion) -> bool:
    return str(c.get("eval_strategy", "no")).lower() not in ("no", "false")


# ------------------------------------------------------------------------------------------ TRL and its handbook


def _trl(c: Conversion) -> None:
    mixed = [*_items(c, "dataset_mixture.datasets"), *_items(c, "datasets")]
    mixer = [name for name in c.known if name.startswith("dataset_mixer.")]
    if c.is_given("train_dataset") or c.is_given("eval_dataset"):
        _of_script(c)
    elif mixed:
        _mixture(c, mixed)
    elif mixer:
        _mixer(c, mixer)
    elif c.get("dataset_name"):
        _one(c)
    _fraction(c)


def _of_script(c: Conversion) -> None:
    """What script_data.py has found."""
    for key, name in (("data.train", "train_dataset"), ("data.eval", "eval_dataset")):
        if c.get(name):
            c.put(key, c.get(name), name)
    if _measures(c) and "data.eval" not in c.lines:
        c.asked.setdefault("data.eval", SAME)


def _one(c: Conversion) -> None:
    name, files = str(c.get("dataset_name")), c.get("data_files")
    names = ("dataset_name", "dataset_config", "dataset_train_split", "data_files", "data_files.train")
    files = files or c.get("data_files.train") if name in LOADERS else None
    found = where(name, c.get("dataset_config"), c.get("dataset_train_split"), files)
    _put(c, "data.train", list(found), *names)
    if c.get("eval_dataset_name") and c.get("eval_dataset_name") not in LOADERS:
        parts = ("eval_dataset_name", "eval_dataset_config", "eval_dataset_split")
        _put(c, "data.eval", list(where(*(c.get(part) for part in parts))), *parts)
    elif _measures(c) and not c.is_given("test_split_size") and "eval_dataset_name" not in c:
        split = c.get("dataset_test_split", "test")
        note = (
            None if c.is_given("dataset_test_split") else f"{c.trainer.name} takes the split test where none is named"
        )
        if files:
            held = c.get("data_files.test")
            return _put(c, "data.eval", [*where("", files=held)] if held else [], "data_files.test")
        held = list(where(name, c.get("dataset_config"), split))
        if held == list(found):
            c.asked["data.eval_fraction"] = SAME
            return c.leave("a file has no splits", "dataset_test_split")
        _put(c, "data.eval", held, "dataset_test_split", note=note)
    c.leave(HELD, "dataset_test_split")


def _mixture(c: Conversion, mixed: list[tuple[Item, list[str]]]) -> None:
    sources: list[str] = []
    keys = [name for _, names in mixed for name in names]
    for item, _ in mixed:
        path = str(item.get("id") or item.get("path") or "")
        share = item.get("weight", item.get("fraction"))
        sources += where(path, item.get("config") or item.get("name"), item.get("split"), item.get("data_files"), share)
    made = [name for name in keys if name.rpartition(".")[2] in ("id", "path", "config", "name", "split", "data_files")]
    shares = [name for name in keys if name.rpartition(".")[2] in ("weight", "fraction")]
    part = any(isinstance(c.get(name), float) and c.get(name) < 1 for name in shares)
    _put(c, "data.train", sources, *made, *(shares if part else ()), note=PART if part else None)
    c.leave("1 takes all rows, as here", *shares)
    c.leave("not needed: columns that no layout reads are left alone", *(n for n in keys if ".columns" in n))
    c.leave("data.train takes no folder inside a data set; download it and name its files", *keys)
    c.leave("not needed: seed orders the data", "dataset_mixture.seed")


def _mixer(c: Conversion, mixer: list[str]) -> None:
    """The handbook's older form: data sets with shares, and splits of them all: train ones first, then test ones."""
    splits = c.words("dataset_splits") or ["train", "test"]
    configurations = c.words("dataset_configs")
    train, held = [], []
    for number, key in enumerate(mixer):
        name, share = key.removeprefix("dataset_mixer."), c.get(key)
        configuration = configurations[number] if number < len(configurations) else None
        for split in splits:
            if "train" in split:
                train += where(name, configuration, split, share=share)
            else:
                held += where(name, configuration, split)
    part = any(isinstance(c.get(key), float) and c.get(key) < 1 for key in mixer)
    whole = [name for name in (key.removeprefix("dataset_mixer.") for key in mixer) if is_file(name)]
    note = NO_SPLITS.format(short(", ".join(whole))) if whole else PART if part else None
    _put(c, "data.train", train, *mixer, "dataset_splits", "dataset_configs", note=note)
    if _measures(c):
        _put(c, "data.eval", held, *mixer, "dataset_splits")


# ------------------------------------------------------------------------------------------------------ Axolotl


def _axolotl(c: Conversion) -> None:
    for prefix, key in (("datasets", "data.train"), ("test_datasets", "data.eval")):
        sources: list[str] = []
        mappings: list[Columns] = []
        used: list[str] = []
        kinds: list[str] = []
        for item, names in _items(c, prefix):
            kinds.append(f"{kind}:" if (kind := str(item.get("type"))) == "alpaca" else kind)
            path, files = str(item.get("path") or ""), item.get("data_files")
            sources += where(path, item.get("name"), item.get("split"), files if files else None)
            columns, keys = _prepared(c, item)
            mappings.append(columns)
            parts = ("path", "name", "split", "data_files", "ds_type", *keys)
            used += [name for name in names if name.split(".", 2)[2] in parts]
            c.leave_below("turns of role and content, or of from and value, are read as they are", *_turns(names))
        _put(c, key, sources, *used)
        if key == "data.train":
            _put_columns(c, mappings, kinds, *used)
        rest = [name for name in c.known if name.startswith(f"{prefix}.")]
        c.leave("data.layout and data.columns say what a row is; see the file's preview", *rest)
    _fraction(c)


def _turns(names: list[str]) -> list[str]:
    return [
        f"{'.'.join(name.split('.')[:2])}.{part}" for name in names for part in ("roles", "message_property_mappings")
    ]


def _prepared(c: Conversion, item: Item) -> tuple[Columns, list[str]]:
    """The columns of one of Axolotl's prompt strategies, and the keys of the entry that say so."""
    if fields := {name: value for name, value in item.items() if name.startswith("type.field_")}:
        ours = {"prompt": "prompt", "instruction": "prompt", "output": "completion"}
        named = {name.removeprefix("type.field_"): value for name, value in fields.items()}
        found = {ours.get(name, name): value for name, value in named.items() if ours.get(name, name) != value}
        return found, [*fields]
    kind = str(item.get("type") or "")
    given = {name: str(value) for name, value in item.items() if name.startswith("field_")}
    method, last = "dpo" if c.method == "cpo" else c.method, kind.rpartition(".")[2]
    columns = dict(PREPARED.get((method, kind), PREPARED.get((method, last), PREPARED.get(("", last), {}))))
    if kind.startswith(("chat_template", "sharegpt")) and "field_messages" in given or kind == "sharegpt":
        messages = given.get("field_messages", "conversations")
        columns["messages" if c.method == "sft" else "prompt"] = messages
    columns |= {
        name: given[f"field_{name}"] for name in ("chosen", "rejected", "system", "tools") if f"field_{name}" in given
    }
    return {name: value for name, value in columns.items() if name != value}, ["type", *given]


# ------------------------------------------------------------------------------------------------ LLaMA-Factory


def _factory(c: Conversion) -> None:
    known = _entries(c)
    mappings: list[Columns] = []
    kinds: list[str] = []
    for name, key in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        entries = c.words(name)
        sources = []
        for entry in entries:
            source, columns = _entry(c, entry, known, key)
            kinds.append(_kind(known.get(entry, FACTORY_SETS.get(entry))))
            sources += source
            mappings += [columns] if key == "data.train" else []
        own = [entry for entry in entries if entry not in known and entry in FACTORY_SETS]
        _put(c, key, sources, name, "dataset_dir", note=OWN.format(short(", ".join(own))) if own else None)
        if key == "data.train" and len(entries) > 1 and c.is_given("max_samples"):
            first = c.get("max_samples")
            c.put("data.first", first, "max_samples", note="of each data set there; here of all of them together")
    _put_columns(c, mappings, kinds, "dataset")
    _fraction(c)


def _entries(c: Conversion) -> Mapping[str, Any]:
    """What dataset_info.json says, where it is found: in dataset_dir, beside the config or below this folder."""
    folder = str(c.get("dataset_dir", "data"))
    for base in (Path(), Path(c.config.file).parent):
        try:
            found = json.loads((base / folder / "dataset_info.json").read_text("utf-8"))
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            continue
    return {}


def _kind(entry: object) -> str:
    return "alpaca format" if isinstance(entry, Mapping) and entry.get("formatting") != "sharegpt" else "other"


def _entry(c: Conversion, name: str, known: Mapping[str, Any], key: str) -> tuple[list[str], Columns]:
    entry = known.get(name, FACTORY_SETS.get(name))
    folder = str(c.get("dataset_dir", "data"))
    if not isinstance(entry, Mapping):
        c.asked[key] = (
            f"{short(name)} is an entry of dataset_info.json in {short(folder)}, which is not here; give its file"
        )
        return [f"{folder}/{name}.json"], {}
    found = entry.get("hf_hub_url")
    source = (
        where(str(found), entry.get("subset"), entry.get("split"))
        if found
        else (f"{folder}/{entry.get('file_name', name + '.json')}",)
    )
    return list(source), _factory_columns(c, entry)


def _factory_columns(c: Conversion, entry: Mapping[str, Any]) -> Columns:
    """The columns of an entry: where it names some, those that it does not name are not read."""
    given = entry.get("columns")
    named = dict(given) if isinstance(given, Mapping) else {}
    if entry.get("formatting") == "sharegpt":
        to = "conversations" if entry.get("ranking") else "completion" if "kto_tag" in named else "messages"
        names = {"messages": to, "kto_tag": "label", "chosen": "chosen", "rejected": "rejected", "system": "system"}
        named.setdefault("messages", "conversations")
    else:
        named = named or {"prompt": "instruction", "query": "input", "response": "output"}
        names = {
            "response": "completion",
            "kto_tag": "label",
            "chosen": "chosen",
            "rejected": "rejected",
            "system": "system",
        }
        prompt = [named[part] for part in ("prompt", "query") if part in named]
        named["prompts"] = prompt[0] if len(prompt) == 1 else tuple(prompt)
        names["prompts"] = "prompt"
        if entry.get("ranking"):
            names.pop("response")
    found = {ours: named[theirs] for theirs, ours in names.items() if named.get(theirs)}
    return {ours: value for ours, value in found.items() if ours != value}


# ---------------------------------------------------------------------------------------------------- torchtune


def _torchtune(c: Conversion) -> None:
    found: dict[str, list[str]] = {}
    mappings: list[Columns] = []
    kinds: list[str] = []
    for prefix, key in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        several = [item for item, _ in _items(c, prefix)]
        alone = {name.removeprefix(f"{prefix}."): c.get(name) for name in c.known if name.startswith(f"{prefix}.")}
        for item in several or [alone]:
            if item:
                sources, columns = _component(c, item, key)
                found.setdefault(key, []).extend(sources)
                mappings += [columns] if key == "data.train" else []
                kinds.append(str(item.get("_component_", "")).rpartition(".")[2])
        names = [name for name in c.known if name.startswith(f"{prefix}.")]
        made = [
            name for name in names if name.split(".")[-1] in ("_component_", "source", "split", "data_files", "name")
        ]
        if key == "data.train" or c.get("eval_steps"):
            _put(c, key, found.get(key, []), *made)
        c.leave("nothing is measured there: run_val_every_n_steps is empty", *(made if key == "data.eval" else ()))
    columns = [name for name in c.known if name.startswith("dataset.") and ("column" in name or "conversation" in name)]
    _put_columns(c, mappings, kinds, "dataset._component_", *columns)
    c.leave("the names are the usual ones", *columns)


def _component(c: Conversion, item: Item, key: str) -> tuple[list[str], Columns]:
    name = str(item.get("_component_", "")).rpartition(".")[2]
    source, columns, ask = COMPONENTS.get(name, (None, {}, f"torchtune's {short(name)} is not known here"))
    given = {part.removeprefix("column_map."): value for part, value in item.items() if part.startswith("column_map.")}
    renamed = {"input": "prompt", "output": "completion"}
    columns = {**columns, **{renamed.get(part, part): value for part, value in given.items()}}
    if item.get("conversation_column"):
        columns["messages"] = item["conversation_column"]
    source = str(item.get("source") or source or "")
    files = item.get("data_files") if source in LOADERS else None
    if ask or not source:
        c.asked[key] = ask or "the data set's source is not named"
    if not source:
        return [], {}
    found = where(source, item.get("name"), item.get("split"), files)
    return list(found), {ours: value for ours, value in columns.items() if ours != value}
