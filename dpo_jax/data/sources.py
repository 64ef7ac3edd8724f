"""What `data.train` and `data.eval` may name: files of rows, folders of such files, saved data sets, and the Hub.

A source is one of:

    FILE                                    rows (see readers.py)
    FOLDER, FOLDER:SPLIT,                   files of rows; the splits are those that `datasets` sees: by the `configs`
    FOLDER:CONFIGURATION:SPLIT              of README.md or the names of the files; of several one is to be named
    FOLDER, FOLDER:SPLIT                    what `datasets` saved; of several splits one is to be named
    NAME, NAME:SPLIT,                       a data set of the Hub; SPLIT is `train`, or what known.py says of the set,
    NAME:CONFIGURATION:SPLIT                unless given, and may be a slice: `train[:100]`

A data set of the Hub is downloaded and kept by `datasets`; or, as a stream, its Parquet files are read where they lie,
and of these the row groups alone that are wanted.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.data.arrow import DECODED, parquet_parts, parts_of
from dpo_jax.data.known import split_of
from dpo_jax.data.ranges import RangedFile
from dpo_jax.data.readers import SUFFIXES, Row, are_plain_lines, is_named_as_rows, reader_of, table_rows, value_of
from dpo_jax.data.report import clean
from dpo_jax.errors import UserError, nearest_file, one_line
from dpo_jax.processes.here import Here

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<configuration>[\w.+-]+)(?=:))?(?::(?P<split>[\w.\[\]:%+-]+))?"
)


@dataclass(frozen=True)
class SourceTable:
    """A file or data set that is ready to be read. All processes of a run ask for its digest together, which tells each
    of them what it need not read itself."""

    name: str
    digest: Callable[[Here], str]
    rows: Callable[[], Iterator[Row]]


def tables(sources: str | Sequence[str], *, stream: bool = False) -> list[SourceTable]:
    """What the sources name, opened in order; data sets of the Hub as a `stream`, if they are to be that.

    Raises:
      UserError: a source is neither a file, a folder nor a data set of the Hub, or cannot be a stream.
    """
    return [table for source in ([sources] if isinstance(sources, str) else sources) for table in _open(source, stream)]


def read_rows(source: str) -> Iterator[Row]:
    """All rows of a source, good and bad."""
    for table in tables(source):
        yield from (row._replace(value=value_of(row)) for row in table.rows())


def _open(source: str, stream: bool) -> list[SourceTable]:
    path = Path(source).expanduser()
    if path.is_file():
        return [_file(path, source)]
    if found := _local_folder(source):
        return _folder(*found, source)
    hub = _hub_parts(source)
    if hub is None:
        raise UserError(f"{clean(source)}: no such file or folder{_near(path)}")
    return _hub(source, hub["name"], hub["configuration"], hub["split"], stream)


def _local_folder(source: str) -> tuple[Path, str | None] | None:
    """The folder that a source names, and what stands behind it: `SPLIT`, `CONFIGURATION:SPLIT`, or nothing."""
    parts = source.split(":")
    for count in range(len(parts), max(len(parts) - 3, 0), -1):
        path = Path(":".join(parts[:count])).expanduser()
        if path.is_dir():
            return path, ":".join(parts[count:]) or None
    return None


def _hub_parts(source: str) -> re.Match[str] | None:
    found = _HUB.fullmatch(source)
    return None if not found or is_named_as_rows(source) or source.startswith((".", "~")) else found


def is_here(source: str) -> bool:
    """Whether a source is a file or a folder (with or without a split) of this machine."""
    return Path(source).expanduser().exists() or _local_folder(source) is not None


def hub_name(source: str) -> str | None:
    """The Hub's name of the data set that a source is, without its split; None of what lies on this machine."""
    hub = None if is_here(source) else _hub_parts(source)
    return hub["name"] if hub else None


def _near(path: Path) -> str:
    """A file beside the missing one whose name is like it."""
    try:
        close = nearest_file(path, sorted(path.parent.iterdir()))
    except OSError:
        return ""
    return f"; did you mean {clean(str(close))}?" if close else ""


def _file(path: Path, name: str) -> SourceTable:
    reader = reader_of(path, name)
    file = RangedFile(path, name, are_plain_lines(path, reader))
    return SourceTable(name, file.digest, lambda: file.rows() or reader(path, name))


def _folder(path: Path, split: str | None, source: str) -> list[SourceTable]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return [_saved(path, source, split)]
    splits = _splits(path, source)
    if not splits:
        raise UserError(f"{clean(source)}: the folder holds no {', '.join(SUFFIXES)} file; name the right folder")
    return [_file(file, str(file)) for file in splits[_split(path, split, splits, source)]]


def _split(path: Path, split: str | None, splits: Iterable[str], source: str) -> str:
    """The split that is meant: the one that is named, or the only one.

    Raises:
      UserError: there is no such split, or there are several and none is named.
    """
    known = list(map(str, splits))
    if split is None and len(known) == 1:
        return known[0]
    if split is None or split not in known:
        what = "holds several splits" if split is None else f"no split {clean(split)!r}"
        names = ", ".join(clean(f"{path}:{name}", 400) for name in known)
        raise UserError(f"{clean(source)}: {what}; give {'one of ' * (len(known) > 1)}{names}")
    return split


def _splits(path: Path, source: str) -> dict[str, list[Path]]:
    """Files of rows by split (of configurations beside the default one: `CONFIGURATION:SPLIT`), as `datasets` has them.

    Raises:
      UserError: README.md cannot be read, or names files that are not in the folder.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme, configs = path / "README.md", MetadataConfigs()
    try:
        if readme.is_file():
            about: Any = DatasetCard.load(readme, ignore_metadata_errors=True).data
            configs = MetadataConfigs.from_dataset_card_data(about)
        default = configs.get_default_config_name() if configs else "default"
        found = {
            part if name == default else f"{name}:{part}": files
            for name, given in (configs or {"default": {}}).items()
            for part, files in _split_files(path / str(given.get("data_dir") or ""), given.get("data_files")).items()
        }
    # datasets and its YAML raise whatever they like; to the user all of it means that the folder cannot be read.
    except Exception as error:
        raise UserError(
            f"{clean(source)}: splits cannot be told ({clean(one_line(error))}); correct {clean(str(readme), 400)}, or "
            "name a file"
        ) from error
    kept = {name: [file for file in files if is_named_as_rows(file.name)] for name, files in found.items()}
    kept = {name: files for name, files in kept.items() if files}
    alone = sorted(file for file in path.iterdir() if is_named_as_rows(file.name) and file.is_file())
    return kept or ({"train": alone} if alone else {})


def _split_files(folder: Path, patterns: Any) -> dict[str, list[Path]]:
    """All files of each split of a configuration, in order; `patterns` as in a README.md, or None: by their names."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns, sanitize_patterns

    base = folder.absolute()
    try:
        known = get_data_patterns(base.as_posix()) if patterns is None else sanitize_patterns(patterns)
    except EmptyDatasetError:
        return {}
    for pattern in (pattern for some in known.values() for pattern in some):
        if "://" in pattern or ".." in Path(pattern).parts or Path(pattern).is_absolute():
            raise ValueError(f"{pattern} is not inside the folder")
    found = DataFilesDict.from_patterns(known, base_path=base.as_posix())
    return {str(name): sorted(folder / Path(file).relative_to(base) for file in files) for name, files in found.items()}


def _saved(path: Path, source: str, split: str | None) -> SourceTable:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    # datasets raises whatever its readers raise; to the user all of it means that the folder cannot be read.
    except Exception as error:
        raise UserError(f"{clean(source)}: not a folder that datasets can read: {clean(str(error))}") from error
    if isinstance(found, datasets.Dataset):
        return _dataset(found, source)
    return _dataset(found[_split(path, split, map(str, found), source)], source)


def _hub(source: str, name: str, configuration: str | None, split: str | None, stream: bool) -> list[SourceTable]:
    import datasets

    usual, folder = split_of(name, configuration)
    part = split or usual
    which = (name, None if folder else configuration)
    inside: dict[str, Any] = {"data_dir": folder} if folder else {}
    try:
        if stream:
            files = datasets.load_dataset_builder(*which, **inside).config.data_files or {}
            return _streamed(source, {str(key): list(map(str, some)) for key, some in files.items()}, part)
        return [_dataset(datasets.load_dataset(*which, split=part, **inside), source)]
    except UserError:
        raise
    # Network, Hub and parser each have errors of their own; the user needs the source and the cause.
    except Exception as error:
        cause = clean((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{clean(source)}: no such file, and not a data set that the Hub gives: {cause}{_near(Path(source))}"
        ) from error


def _streamed(source: str, files: Mapping[str, list[str]], split: str) -> list[SourceTable]:
    """The files of a split, by their addresses, each of which has its commit.

    Raises:
      UserError: there is no such split, or one of its files is not Parquet.
    """
    if split not in files:
        whole = " a slice cannot be a stream: take data.first, or" if "[" in split else ""
        raise UserError(
            f"{clean(source)}: no split {clean(split)!r} for data.stream;{whole} give one of {clean(', '.join(files))}"
        )
    if other := next((file for file in files[split] if not file.endswith(".parquet")), None):
        what = clean(other.rpartition("/")[2])
        raise UserError(f"{clean(source)}: {what} is not Parquet, and cannot be a stream; set data.stream=false")

    def table(address: str) -> SourceTable:
        name = f"{source}/{address.partition('@')[2].partition('/')[2]}"
        return SourceTable(name, lambda _: address, lambda: table_rows(parquet_parts(address, name), name))

    return [table(address) for address in files[split]]


def _dataset(found: Any, name: str) -> SourceTable:
    fingerprint = found._fingerprint
    pieces = found.with_format("arrow")
    return SourceTable(name, lambda _: fingerprint, lambda: table_rows(parts_of(pieces.iter(DECODED)), name))
