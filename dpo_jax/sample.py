"""Ask a model: `python -m dpo_jax.sample FOLDER [--against FOLDER] [--prompt TEXT ... | --prompts FILE]`.

Without prompts it is a conversation on a terminal, and otherwise reads one prompt a line from its input. With
`--against` two models (one and its reference) read the same tokens, and each answer is shown with its log-probability
under both.
"""

import argparse
import contextlib
import io
import json
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from dpo_jax.config.run import COMMAND_LINE, Parser, command, quiet_libraries
from dpo_jax.errors import UserError

if TYPE_CHECKING:
    from dpo_jax.data.templates import Codec
    from dpo_jax.evaluation.generate import Answer, Decoding
    from dpo_jax.evaluation.winrate import Asked
    from dpo_jax.model.decoder import Model

HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."
JOINERS = "\u200c\u200d"
"""Invisible characters that hold letters and emoji together, and move nothing on a screen."""


class Speaker(NamedTuple):
    """A model that answers, under the name that it is shown with."""

    name: str
    model: "Model"


class Session(NamedTuple):
    """All that prompts are answered with; with two speakers, the second is what the first is compared with."""

    speakers: tuple[Speaker, ...]
    coder: "Codec"
    decoding: "Decoding"
    seed: int
    chat: bool
    """Whether a prompt that is a text becomes a message of a user, put through the chat template."""
    system: str | None


@command
def main(argv: Sequence[str]) -> None:
    """The command."""
    options = _options(argv)
    quiet_libraries()
    asked = _asked(options)
    if asked is None and options.json:
        raise UserError(f"{COMMAND_LINE}: --json writes no conversation; give --prompt, --prompts, or lines of input")
    session = _session(options)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _output(options.output) as output:
        if asked is None:
            _converse(session, output)
        else:
            _answer_all(session, asked, output, options.json)


# ---------------------------------------------------------------------------------------------- arguments


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("sample", "Ask a model, or a model and its reference side by side.")
    parser.add_argument("folder", help="model folder, or hub id")
    parser.add_argument(
        "--against", metavar="FOLDER", help="a second model with the same tokens, such as the reference"
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
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="to compute in; auto: float32 on a CPU, bfloat16 elsewhere",
    )
    parser.add_argument("--output", metavar="FILE", help="also write answers to a new JSON Lines file")
    parser.add_argument("--json", action="store_true", help="print JSON Lines instead of text")
    options = parser.parse_args(argv)
    _check(options)
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
    from dpo_jax.evaluation.winrate import Asked, read_prompts

    if options.prompt is not None:
        return [_checked(Asked(text, f"--prompt {number}")) for number, text in enumerate(options.prompt, 1)]
    if options.prompts is None:
        return None if sys.stdin.isatty() else _lines(sys.stdin.buffer.read(), "input")
    path = Path(options.prompts).expanduser()
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".parquet", ".arrow"):
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


def _session(options: argparse.Namespace) -> Session:
    from dpo_jax.data.templates import template_source
    from dpo_jax.evaluation import winrate
    from dpo_jax.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.folder)
    chat = not options.raw and template_source(tokenizer, None) is not None
    if options.system is not None and not chat:
        raise UserError(
            f"{COMMAND_LINE}: --system: the tokenizer of {options.folder} has no chat template; leave it out"
        )
    decoding = _decoding(options, tokenizer)
    folders = [options.folder] if options.against is None else [options.folder, options.against]
    if options.against is not None and load_tokenizer(options.against).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{options.against} has other tokens than {options.folder}; --against takes a model with the same"
        )
    models = [_load(folder, options.dtype) for folder in folders]
    speakers = tuple(map(Speaker, _names(folders), models))
    return Session(speakers, winrate.prompt_codec(tokenizer), decoding, options.seed, chat, options.system)


def _names(folders: Sequence[str]) -> list[str]:
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


def _load(folder: str, dtype: str) -> "Model":
    """The model of a folder, split over all devices of this machine."""
    import jax
    import jax.numpy as jnp

    from dpo_jax import sharding
    from dpo_jax.hf.checkpoint import load_hf
    from dpo_jax.hf.configs import read_spec
    from dpo_jax.hf.tensors import local_folder
    from dpo_jax.model.decoder import abstract_params
    from dpo_jax.run import compile_cache

    compile_cache.use(compile_cache.AUTO)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    spec = read_spec(local_folder(folder), scalar_head=False)
    one = jax.device_count() == 1
    places = None if one else sharding.param_shardings(abstract_params(spec), sharding.make_mesh(fsdp=1, tensor=-1))
    return load_hf(folder, dtype=jnp.dtype(dtype), shardings=places, spec=spec)


def _decoding(options: argparse.Namespace, tokenizer: Any) -> "Decoding":
    """What the command line says, and where it says nothing, generation_config.json, if that wants tokens drawn."""
    from dpo_jax.evaluation.generate import Decoding, check
    from dpo_jax.evaluation.winrate import stop_tokens
    from dpo_jax.hf.tensors import SIDE_FILES, local_folder
    from dpo_jax.hf.tokenizer import generation_settings

    folder = generation_settings(local_folder(options.folder, SIDE_FILES), tokenizer)
    usual = folder.temperature if folder.do_sample and not options.greedy else 0.0
    temperature = usual if options.temperature is None else options.temperature
    ignored = [name for name, value in (("--top-p", options.top_p), ("--top-k", options.top_k)) if value is not None]
    if temperature == 0 and ignored:
        raise UserError(f"{COMMAND_LINE}: {ignored[0]}: greedy decoding draws nothing; give --temperature too")
    own = (folder.top_p, folder.top_k) if folder.do_sample and temperature else (1.0, 0)
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        temperature=temperature,
        top_p=own[0] if options.top_p is None else options.top_p,
        top_k=own[1] if options.top_k is None else options.top_k,
        stop=stop_tokens(options.folder, tokenizer),
    )
    check(decoding)
    return decoding


# ---------------------------------------------------------------------------------------------- given prompts


def _answer_all(session: Session, asked: "Sequence[Asked]", output: TextIO | None, as_json: bool) -> None:
    began = time.perf_counter()
    prompts = [_prompt_of(session, item.prompt, item.where) for item in asked]
    rows = _rows(session, prompts, [item.where for item in asked])
    spent = time.perf_counter() - began
    for answers in rows:
        _write(answers, output)
        if as_json:
            print("\n".join(map(_line, answers)))
        else:
            _show_prompt(answers[0]["prompt"])
            _show(answers)
    count = sum(row["tokens"] for answers in rows for row in answers)
    print(f"{count} tokens in {spent:.1f} s ({count / spent:.1f} tokens/s, compiling included)", file=sys.stderr)


def _prompt_of(session: Session, prompt: Any, where: str) -> Any:
    """The prompt as the model is asked it: a conversation, or a text."""
    if isinstance(prompt, str):
        if not session.chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    elif not session.chat:
        raise UserError(f"{where}: messages need a chat template; leave out --raw, or give texts")
    begun = prompt[0]["role"] in ("system", "developer")
    return prompt if session.system is None or begun else [{"role": "system", "content": session.system}, *prompt]


def _rows(session: Session, prompts: Sequence[Any], places: Sequence[str]) -> list[list[dict[str, Any]]]:
    """For each prompt a row for each speaker's answer; if there are two speakers, with both log-probabilities."""
    from dpo_jax.evaluation.generate import generate
    from dpo_jax.evaluation.winrate import prompt_tokens

    ids = [prompt_tokens(prompt, session.coder, where) for prompt, where in zip(prompts, places, strict=True)]
    columns = []
    for speaker in session.speakers:
        spec, params = speaker.model.spec, speaker.model.params
        given = generate(spec, params, ids, session.decoding, seed=session.seed)
        rows = [_row(session, speaker.name, prompt, one) for prompt, one in zip(prompts, given, strict=True)]
        columns.append([{**row, **score} for row, score in zip(rows, _scores(session, ids, given), strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def _row(session: Session, name: str, prompt: Any, given: "Answer") -> dict[str, Any]:
    from dpo_jax.evaluation.winrate import text_of

    text = text_of(session.coder.tokenizer, given.tokens)
    return {"prompt": prompt, "model": name, "answer": text, "finished": given.finished, "tokens": len(given.written)}


def _scores(session: Session, ids: "Sequence[list[int]]", answers: "Sequence[Answer]") -> list[dict[str, float]]:
    """Of each answer with its end: log-probability under the first model, under the second, and the difference."""
    from dpo_jax.evaluation.likelihood import answer_logprobs

    if len(session.speakers) == 1:
        return [{} for _ in answers]
    written = [answer.written for answer in answers]
    policy, reference = (answer_logprobs(s.model.spec, s.model.params, ids, written) for s in session.speakers)
    pairs = zip(policy, reference, strict=True)
    return [{"logp": p, "reference_logp": r, "log_ratio": p - r} for p, r in pairs]


def _line(row: dict[str, Any]) -> str:
    """A row as JSON: readable where every character can be shown, and otherwise in ASCII."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(row)


def _write(rows: Sequence[dict[str, Any]], output: TextIO | None) -> None:
    if output is not None:
        output.write("".join(f"{_line(row)}\n" for row in rows))
        output.flush()


# ---------------------------------------------------------------------------------------------- showing


def visible(text: str) -> str:
    """A model's text as a terminal may show it: in its lines, with whatever could steer the terminal written out."""
    lines = (line.expandtabs(4) for line in text.split("\n"))
    return "\n".join("".join(c if _harmless(c) else repr(c)[1:-1] for c in line) for line in lines)


def _harmless(char: str) -> bool:
    return char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _show_prompt(prompt: Any) -> None:
    last = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
    print("\n".join(f"> {line}" for line in visible(last).split("\n")))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """Answers to a prompt: side by side on a terminal, and one after the other elsewhere."""
    if len(rows) > 1 and sys.stdout.isatty():
        _columns(rows)
    else:
        for row in rows:
            heading = f"[{visible(row['model'])}: {_numbers(row)}]\n" if len(rows) > 1 else ""
            print(heading + visible(row["answer"]) + _cut(row))
    print()


def _columns(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, pad_edge=False)
    for row in rows:
        table.add_column(Text(visible(row["model"])), ratio=1, overflow="fold")
    table.add_row(*(Text(visible(row["answer"]) + _cut(row)) for row in rows))
    table.add_section()
    table.add_row(*(Text(_numbers(row), "dim") for row in rows))
    Console(highlight=False, markup=False, emoji=False).print(table)


def _numbers(row: dict[str, Any]) -> str:
    logp, reference, ratio = row["logp"], row["reference_logp"], row["log_ratio"]
    return f"logp {logp:.2f}, reference {reference:.2f}, log-ratio {ratio:+.2f}, {row['tokens']} tokens"


def _cut(row: dict[str, Any]) -> str:
    return "" if row["finished"] else f" [cut off after {row['tokens']} tokens]"


# ---------------------------------------------------------------------------------------------- conversation


def _converse(session: Session, output: TextIO | None) -> None:
    """A line from the person, an answer, and so on. With two speakers, both go on from what the first one said."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its editing keys)
    print(HELP if session.chat else "Type a text to go on with; every line stands alone. /quit (or Ctrl-D) leaves.")
    history: list[dict[str, Any]] = []
    turn = 0
    while (line := _input()) is not None:
        if line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            history = []
            print("the conversation is forgotten")
        elif line.strip():
            try:
                prompt: Any = _prompt_of(
                    session, [*history, {"role": "user", "content": line}] if session.chat else line, ""
                )
                rows = _turn(session._replace(seed=(session.seed + turn) % 2**32), prompt)
            except UserError as error:
                print(f"error: {visible(str(error))}")
                continue
            _write(rows, output)
            turn += 1
            if session.chat:
                history += [{"role": "user", "content": line}, {"role": "assistant", "content": rows[0]["answer"]}]


def _input() -> str | None:
    try:
        return input("> ").encode("utf-8", "replace").decode().replace("\0", "")
    except EOFError:
        print()
        return None


def _turn(session: Session, prompt: Any) -> list[dict[str, Any]]:
    if len(session.speakers) == 1:
        return [_spoken(session, prompt)]
    (rows,) = _rows(session, [prompt], [""])
    _show(rows)
    return rows


def _spoken(session: Session, prompt: Any) -> dict[str, Any]:
    """One answer, shown while it is written."""
    from dpo_jax.evaluation.generate import Answer, stream
    from dpo_jax.evaluation.winrate import prompt_tokens

    ids = prompt_tokens(prompt, session.coder)
    ((name, model),) = session.speakers
    row, shown, note = _row(session, name, prompt, Answer([], None)), 0, ""
    try:
        for answer in stream(model.spec, model.params, ids, session.decoding, seed=session.seed):
            row = _row(session, name, prompt, answer)
            # a character that is only half there is decoded as this; wait for its other half
            ready = len(row["answer"].rstrip("\ufffd"))
            print(visible(row["answer"][shown:ready]), end="", flush=True)
            shown = max(shown, ready)
    except KeyboardInterrupt:
        note = " [stopped]"
    print(visible(row["answer"][shown:]) + (note or _cut(row)) + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
