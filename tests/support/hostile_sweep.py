"""Hundreds of hostile folders, and `train` on each of them in a process of its own, measured.

    python -m tests.support.hostile_sweep FOLDER [PART OF A NAME]

Each case is a sound folder spoiled in one way: the kinds of `hostile_folders.py`, and neighbours of theirs by key,
value, file and place. Processes are forked from one that has imported everything and computed nothing, so that a case
takes the time that it needs itself; one that turns out to be harmless ends when its weights are loaded. A line of JSON
is printed for each, and a table at the end.
"""

import collections
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.hostile_folders import HOSTILE
from tests.support.tiny_folders import write_folder
from tests.support.tiny_rows import CHATML, byte_tokenizer, write, yes_or_no

SECONDS, MEMORY_MB = 30, 2048
"""What a case may take; seconds are those of a CPU, as other processes may have the machine."""
FOR_EVER = 20 * SECONDS
"""Seconds by the clock after which a case is taken to hang."""
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
TWICE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
BOMBS = {
    "loops": FOREVER,
    "prints": FOREVER.replace("{% endfor %}", "xxxxxxxx{% endfor %}", 1),
    "doubles": DOUBLING + "{{ n.s }}",
    "calls twice": TWICE,
    "pads": "{{ '%0999999999d' % 5 }}",
    "pads more": "{{ '%099999999999d' % 5 }}",
    "centers": "{{ 'a'|center(10**10) }}",
    "repeats": "{{ 'a' * 10**10 }}",
    "a power": "{{ 9**(9**9) }}",
    "a list": "{% set x = [[0] * 10**9] * 9 %}{{ x|length }}{% for i in x %}{{ i }}{% endfor %}",
    "long": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "joins": "{{ (['aaaaaaaaaa'] * 10**9)|join }}",
    "replaces": "{{ ('a' * 10**6).replace('a', 'a' * 10**5) }}",
    "json": "{{ ([[1] * 10**6] * 1000)|tojson }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a million ifs": "{% if 1 %}" * 50_000,
    "wrong": "{% for",
    "raises": "{{ raise_exception('a\nb') }}",
    "deep": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
}
ODD = {"text": "x", "list": [], "table": {}, "negative": -1, "huge": 10**400, "float": 1e30, "true": True, "null": None}
SIZES = (
    "num_hidden_layers vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
    "num_labels rms_norm_eps max_position_embeddings rope_parameters layer_types architectures"
).split()
NAMES = (
    "model_max_length chat_template bos_token eos_token pad_token added_tokens_decoder tokenizer_class padding_side "
    "additional_special_tokens extra_special_tokens add_bos_token clean_up_tokenization_spaces"
).split()
GENERATION = "eos_token_id bos_token_id pad_token_id do_sample temperature top_p top_k".split()
FILES = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja README.md "
    "model.safetensors.index.json model-00001-of-00002.safetensors"
).split()


class Case(NamedTuple):
    """How the folder is spoiled, and whether it may be loaded all the same."""

    spoil: Callable[[Path], object]
    harmless: bool = False


# ---------------------------------------------------------------------------------------------- the cases


def _change(file: str, **changes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        table = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**table, **changes}))

    return spoil


def _put(file: str, data: str | bytes, size: int = 0) -> Callable[[Path], None]:
    """The file with this content; `size` makes it that long with a hole."""

    def spoil(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)
        if size:
            os.truncate(folder / file, size)

    return spoil


def _link(file: str, to: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(to.replace("SELF", file).replace("OUT", str(folder.parent / "secret")))
        (folder.parent / "secret").write_text("{}")
        (folder / "second").symlink_to("third")
        (folder / "third").symlink_to("second")

    return spoil


def _odd_file(file: str, kind: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.unlink()
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "directory":
                path.mkdir()
            case "socket":
                here = os.getcwd()
                os.chdir(folder)  # a socket's path is short
                socket.socket(socket.AF_UNIX).bind(file)
                os.chdir(here)

    return spoil


def _backend(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the `tokenizer.json`."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return spoil


def _regex(pattern: str) -> Callable[[dict], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda table: table.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})


def _growing(table: dict) -> None:
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    table["normalizer"] = {"type": "Sequence", "normalizers": [one] * 40}


def _fixed(length: int) -> Callable[[dict], object]:
    fixed = {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    return lambda table: table.update(padding={**fixed, "pad_type_id": 0, "pad_token": "<pad>"})


def _templates() -> dict[str, Case]:
    found = {}
    for name, bomb in BOMBS.items():
        found[f"template: {name}"] = Case(_put("chat_template.jinja", bomb), name == "a list")
        found[f"template in tokenizer_config: {name}"] = Case(_template_in_config(bomb), name == "a list")
    for name in (
        "loops",
        "prints",
        "doubles",
        "calls twice",
        "pads",
        "centers",
        "repeats",
        "long",
        "joins",
        "replaces",
    ):
        late = f"{{% if 'Say 7' in messages[0].content %}}{BOMBS[name]}{{% endif %}}{CHATML}"
        found[f"template, at one row: {name}"] = Case(_put("chat_template.jinja", late))
        found[f"template, where nothing is asked: {name}"] = Case(
            _put("chat_template.jinja", f"{{% if not add_generation_prompt %}}{BOMBS[name]}{{% endif %}}{CHATML}")
        )
    return found


def _template_in_config(bomb: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        shutil.rmtree(folder / "additional_chat_templates")
        _change("tokenizer_config.json", chat_template=bomb)(folder)

    return spoil


def _tokenizers() -> dict[str, Case]:
    patterns = (
        "(a+)+$",
        "(a|a)*$",
        "(\\w+\\s?)*$",
        "(.*a){25}$",
        "((a*)*)*b",
        "(?<=a{1,999999})b",
        "(a{1,9999}){1,9999}",
        "[",
    )
    changes: dict[str, Callable[[dict], object]] = {f"regex {one}": _regex(one) for one in patterns}
    changes |= {"grows": _growing} | {f"padded to {n}": _fixed(n) for n in (10**6, 10**9, 10**12, -1)}
    for key in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "padding"):
        for name in ("text", "list", "negative"):
            changes[f"{key} is {name}"] = lambda table, key=key, name=name: table.update({key: ODD[name]})
    for key in ("vocab", "merges", "type", "unk_token"):
        for name in ("text", "table", "negative"):
            changes[f"model.{key} is {name}"] = lambda table, key=key, name=name: table["model"].update(
                {key: ODD[name]}
            )
    changes["an id of 2^40"] = lambda table: table["model"]["vocab"].update({"<far>": 2**40})
    changes["an id of 2^24"] = lambda table: table["model"]["vocab"].update({"<far>": 2**24})
    changes["an id of 2^31"] = lambda table: table["model"]["vocab"].update({"<far>": 2**31})
    changes["no end token"] = lambda table: table["model"]["vocab"].pop("<eos>")
    harmless = ("regex (a|a)", "regex (.*a)", "regex (?<=", "regex ((a", "regex (a+", "regex (\\w", "regex (a{")
    harmless += ("padded", "an id", "no end", "normalizer", "pre_tok", "post_", "decoder", "added", "model.")
    found = {f"tokenizer: {name}": Case(_backend(one), name.startswith(harmless)) for name, one in changes.items()}
    texts = {
        "brackets": "[" * 10**6,
        "zeros": "\0" * 100,
        "half": '{"version": "1.0", "model": {"type"',
        "html": "<html>",
    }
    texts |= {"many lists": '{"a": [' + "[]," * 10**6 + "[]]}", "a number": "7", "nothing": "", "nul": "null"}
    found |= {f"tokenizer: {name}": Case(_put("tokenizer.json", text)) for name, text in texts.items()}
    return found


def cases() -> dict[str, Case]:
    """All of them, by name; the same at each call."""
    found = {name: Case(one.spoil) for name, one in HOSTILE.items()}
    return found | _keys() | _files() | _templates() | _tokenizers()


def _keys() -> dict[str, Case]:
    found = {}
    for key in SIZES:
        for name, value in {**ODD, "a billion": 10**9, "zero": 0, "inf": float("inf")}.items():
            loose = key in ("max_position_embeddings", "rope_parameters", "layer_types", "architectures", "num_labels")
            loose = loose or name in ("null", "true") or (key == "rms_norm_eps" and name in ("a billion", "float"))
            found[f"config: {key} is {name}"] = Case(_change("config.json", **{key: value}), loose)
    for key in NAMES:
        for name, value in ODD.items():
            found[f"tokenizer_config: {key} is {name}"] = Case(_change("tokenizer_config.json", **{key: value}), True)
    for key in GENERATION:
        for name in ("text", "table", "negative", "huge", "float"):
            found[f"generation_config: {key} is {name}"] = Case(
                _change("generation_config.json", **{key: ODD[name]}), True
            )
    return found


def _files() -> dict[str, Case]:
    found = {}
    targets = {"itself": "SELF", "a ring": "second", "out": "OUT", "nowhere": "nothing", "zeros": "/dev/zero"}
    for file in FILES:
        for name, to in targets.items():
            found[f"link: {file} to {name}"] = Case(_link(file, to))
        for kind in ("pipe", "directory", "socket"):
            found[f"{kind}: {file}"] = Case(_odd_file(file, kind), kind == "directory" and file in FILES[1:6])
    for file in FILES:
        harmless = file in ("README.md", "chat_template.jinja")
        found[f"200 MB: {file}"] = Case(_put(file, b"", 200 << 20), file == "README.md")
        found[f"64 MB of lists: {file}"] = Case(_put(file, b"[" + b"[]," * (21 << 20) + b"[]]"), harmless)
        found[f"not UTF-8: {file}"] = Case(_put(file, b"\xff\xfe{}"), file == "README.md")
    return found


# ---------------------------------------------------------------------------------------------- the runs


def _world(root: Path) -> tuple[Path, Path]:
    """A sound folder, and rows to train on."""
    root.mkdir(parents=True, exist_ok=True)
    folder = write_folder(root / "sound", num_hidden_layers=2, vocab_size=300, shards=2)
    byte_tokenizer().save_pretrained(folder)
    return folder, write(root / "rows.jsonl", *yes_or_no(12))


def _arguments(folder: Path, rows: Path, output: Path) -> list[str]:
    given = {"model.path": folder, "data.train": rows, "output": output, "steps": 1, "batch.pairs": 2}
    given |= {"batch.micro_tokens": 512, "data.workers": 1, "log.tensorboard": "false"}
    return [f"{key}={value}" for key, value in given.items()]


def run(root: Path, name: str, case: Case, sound: Path, rows: Path) -> dict[str, object]:
    """`train` on a spoiled folder: its exit code, CPU seconds, megabytes, and what it said on stderr."""
    place = root / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place / "m")
    case.spoil(place / "m")
    began, said = time.monotonic(), place / "stderr"
    child = os.fork()
    if child == 0:
        _train(_arguments(place / "m", rows, place / "out"), said)
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > FOR_EVER:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return {
        "name": name,
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "megabytes": usage.ru_maxrss >> 10,
        "stderr": said.read_text("utf-8", "replace") if said.exists() else "",
        "harmless": case.harmless,
    }


def _train(argv: list[str], said: Path) -> None:
    """In the forked process, which never returns."""
    from dpo_jax import train
    from dpo_jax.run.prepare import Job

    Job.objective = lambda *_: os._exit(0)  # everything of the folder has been read
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 99
    try:
        code = train.main(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def fault(found: dict[str, object]) -> str | None:
    """What is wrong with how a case ended; None where it is as it must be."""
    said, code = str(found["stderr"]), found["code"]
    if "Traceback" in said:
        return "traceback"
    if code not in ((0, 2) if found["harmless"] else (2,)):
        return f"exit code {code}"
    if code == 2 and (said.count("\n") != 1 or not said.startswith("error: ")):
        return "not one line"
    if float(str(found["seconds"])) > SECONDS:
        return f"more than {SECONDS} s"
    return "too much memory" if int(str(found["megabytes"])) > MEMORY_MB else None


def main(argv: list[str]) -> int:
    """Run the cases whose names have a part."""
    import warnings

    warnings.simplefilter("ignore")  # jax warns of forks; nothing of it has been started here
    from transformers import AutoTokenizer  # noqa: F401

    import dpo_jax.run.recorder  # noqa: F401
    from dpo_jax.run import checkpoints, prepare, result  # noqa: F401

    root, part = Path(argv[0]), argv[1] if len(argv) > 1 else ""
    sound, rows = _world(root)
    counts: collections.Counter[str] = collections.Counter()
    for name, case in cases().items():
        if part in name:
            found = run(root, name, case, sound, rows)
            wrong = fault(found)
            counts[wrong or ("refused in one line" if found["code"] == 2 else "harmless, loaded")] += 1
            print(json.dumps({**found, "fault": wrong}), flush=True)
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
