"""Ask a model: `python -m dpo_jax.sample FOLDER [--adapter FOLDER] [--against FOLDER] [--prompt TEXT ..]`.

Without prompts it is a conversation on a terminal, and otherwise reads one prompt a line from its input. With
`--against` two models (one and its reference) read the same tokens, and each answer is shown with its log-probability
under both.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dpo_jax.config.command import Parser, command, quiet_libraries
from dpo_jax.errors import COMMAND_LINE, UserError

if TYPE_CHECKING:
    from dpo_jax.data.tokenizer import Tokenizer
    from dpo_jax.evaluation.chat import Session
    from dpo_jax.evaluation.generate import Decoding
    from dpo_jax.evaluation.winrate import Asked
    from dpo_jax.hf.adapted import Adapted


@command
def main(argv: Sequence[str]) -> None:
    """The command."""
    options = _options(argv)
    quiet_libraries()
    asked = _asked(options)
    if asked is None and options.json:
        raise UserError(f"{COMMAND_LINE}: --json writes no conversation; give --prompt, --prompts, or lines of input")
    from dpo_jax.evaluation.chat import answer_all, converse

    session = _session(options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _output(options.output) as output:
        if asked is None:
            converse(session, output)
        else:
            answer_all(session, asked, output, options.json)


# ---------------------------------------------------------------------------------------------- arguments


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sample")
    parser.add_argument("folder", help="model folder, or hub id; or that of an adapter, which names its base")
    parser.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter of the model: a folder, or hub id")
    parser.add_argument(
        "--against",
        metavar="FOLDER",
        help="a second model with the same tokens, such as the reference; of each answer the log-probability (nats) is "
        "given under both",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given again")
    source.add_argument("--prompts", metavar="FILE", help='a prompt a line; in a .jsonl file, {"prompt": ...} a line')
    parser.add_argument("--system", metavar="TEXT", help="system message that a conversation begins with")
    parser.add_argument("--raw", action="store_true", help="texts to go on with; no chat template")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: generation_config.json, or greedy)")
    parser.add_argument("--top-p", type=float, help="draw from the most probable tokens of this probability together")
    parser.add_argument("--top-k", type=int, help="draw from this many most probable tokens; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn (default 0)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to compute in; auto: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--output", metavar="FILE", help="also write answers to a new JSON Lines file")
    parser.add_argument("--json", action="store_true", help="print JSON Lines instead of text")
    options = parser.parse_args(argv)
    _check(options)
    options.adapter_given = options.adapter
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    faults = (
        (options.raw and options.system is not None, "--system has no place in a --raw text; leave one of them out"),
        (options.greedy and options.temperature, "--greedy or --temperature, not both"),
        (not 0 <= options.seed < 2**32, f"--seed {options.seed}: must be from 0 to 2^32 - 1"),
        (options.max_new_tokens < 1, f"--max-new-tokens {options.max_new_tokens}: must be at least 1"),
    )
    for wrong, why in faults:
        if wrong:
            raise UserError(f"{COMMAND_LINE}: {why}")
    output = None if options.output is None else Path(options.output)
    if output is not None and output.exists():
        raise UserError(f"{COMMAND_LINE}: --output {output}: exists already, and is not overwritten; name a new file")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"{COMMAND_LINE}: --output {output}: there is no folder {output.parent}; make it first")


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        file = open(path, "x", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{COMMAND_LINE}: --output {path}: {error.strerror}; name a new file") from error
    with file:
        yield file


def _asked(options: argparse.Namespace) -> "list[Asked] | None":
    """The prompts that are given, or None where a person at a terminal is to be asked for them."""
    from dpo_jax.data.readers import is_named_as_rows
    from dpo_jax.evaluation.winrate import Asked, read_prompts

    if options.prompt is not None:
        return [_checked(Asked(text, f"--prompt {number}")) for number, text in enumerate(options.prompt, 1)]
    if options.prompts is None:
        return None if sys.stdin.isatty() else _lines(sys.stdin.buffer.read(), "input")
    path = Path(options.prompts).expanduser()
    if is_named_as_rows(path.name):
        return read_prompts(options.prompts)
    try:
        return _lines(path.read_bytes(), options.prompts)
    except OSError as error:
        raise UserError(f"{options.prompts}: {error.strerror}; give a file of prompts") from error


def _lines(data: bytes, name: str) -> "list[Asked]":
    """A prompt for each line that is not empty."""
    from dpo_jax.evaluation.winrate import Asked

    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}:{line}: is not UTF-8 text; save it as UTF-8") from error
    asked = [Asked(line.rstrip("\r"), f"{name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not asked:
        raise UserError(f"{name}: holds no prompt; write one a line")
    return [_checked(item) for item in asked]


def _checked(asked: "Asked") -> "Asked":
    from dpo_jax.data.messages import BadRow, texts_of
    from dpo_jax.data.records import text_notes

    try:
        text_notes(list(texts_of(asked.prompt)))
    except BadRow as error:
        raise UserError(f"{asked.where}: {error}; write another prompt") from error
    return asked


# ---------------------------------------------------------------------------------------------- loading


def _session(options: argparse.Namespace) -> "Session":
    from dpo_jax.data.templates import template_source
    from dpo_jax.evaluation import winrate
    from dpo_jax.evaluation.chat import Session, Speaker
    from dpo_jax.evaluation.models import open_model
    from dpo_jax.hf.adapted import adapted
    from dpo_jax.hf.tokenizer import load_tokenizer
    from dpo_jax.run import compile_cache

    compile_cache.use(compile_cache.AUTO)
    models = [adapted(options.folder, options.adapter)]
    if options.against is not None:
        models.append(adapted(options.against))
    for model in models:
        if model.line:
            print(model.line, file=sys.stderr)
    options.folder = models[0].base
    tokenizer = load_tokenizer(options.folder)
    chat = not options.raw and template_source(tokenizer, None) is not None
    if options.system is not None and not chat:
        raise UserError(
            f"{COMMAND_LINE}: --system: the tokenizer of {options.folder} has no chat template; leave it out"
        )
    decoding = _decoding(options, tokenizer)
    if load_tokenizer(models[-1].base).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{options.against} has other tokens than {options.folder}; --against takes a model with the same"
        )
    opened = [open_model(one.base, dtype=options.dtype, adapter=one.adapter) for one in models]
    speakers = tuple(map(Speaker, _names(models), opened))
    return Session(speakers, winrate.prompt_codec(tokenizer), decoding, options.seed, chat, options.system)


def _names(models: "Sequence[Adapted]") -> list[str]:
    short = [model.name for model in models]
    return short if len(set(short)) == len(short) else [str(model.adapter or model.base) for model in models]


def _decoding(options: argparse.Namespace, tokenizer: "Tokenizer") -> "Decoding":
    """What the command line says, and where it says nothing, generation_config.json, if that wants tokens drawn."""
    from dpo_jax.evaluation.models import decoding_of

    return decoding_of(
        options.folder,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        named=lambda name: f"{COMMAND_LINE}: --{name.replace('_', '-')}",
    )


if __name__ == "__main__":
    sys.exit(main())
