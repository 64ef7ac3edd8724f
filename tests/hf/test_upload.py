"""An export to an object store: whole or not there, and nothing of another's is touched. A stand-in serves it."""

import shutil

import pytest

from dpo_jax import convert
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.push import check_push, push
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.stores import Store
from tests.support.object_store import empty_store
from tests.support.worlds import write_model

pytest.importorskip("gcsfs", reason="extra gcs is not installed")
ADDRESS = "gs://models/tuned"


@pytest.fixture
def store():
    with empty_store() as store:
        yield store


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    write_model(root / "model", num_hidden_layers=2)
    save_hf(load_hf(root / "model"), root / "export", root / "model")
    return root / "export"


def there(store):
    return {name.removeprefix("tuned/"): store.objects["models", name].data for name in store.names("models")}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_the_folder_and_an_earlier_one_is_gone(store, export, tmp_path, capsys):
    check_push(ADDRESS)
    assert there(store) == {}
    assert push(export, f"{ADDRESS}/") == ADDRESS and there(store) == files(export)
    shorter = tmp_path / "shorter"
    shutil.copytree(export, shorter)
    gone = next(name for name in files(shorter) if "/" in name or name == "chat_template.jinja")
    (shorter / gone).unlink()
    sums = [line for line in (shorter / tensors.SUMS).read_text().splitlines(True) if not line.endswith(f"  {gone}\n")]
    (shorter / tensors.SUMS).write_text("".join(sums))
    store.put(("models", "tuned/notes.txt"), b"mine")
    assert convert.main(["push", str(shorter), ADDRESS]) == 0 and ADDRESS in capsys.readouterr().out
    assert there(store) == {**files(shorter), "notes.txt": b"mine"}


def test_a_part_is_never_taken_for_the_whole(store, export, monkeypatch):
    push(export, ADDRESS)
    put = Store.put

    def fails(self, path, name):
        if name == tensors.SINGLE:
            store.shut = 503
        put(self, path, name)

    monkeypatch.setattr(Store, "put", fails)
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", _at_once)
    with pytest.raises(UserError, match=r"^the store: gs://models/tuned: [^\n]*check the network[^\n]*$"):
        push(export, ADDRESS)
    assert tensors.SUMS not in there(store)


async def _at_once(_):
    pass


def test_other_things_are_left_alone(store, export):
    store.put(("models", "tuned/thesis.tex"), b"years")
    for ask in (lambda: check_push(ADDRESS), lambda: push(export, ADDRESS)):
        with pytest.raises(UserError, match="holds thesis.tex and no dpo_jax.json"):
            ask()
    assert there(store) == {"thesis.tex": b"years"}


def test_the_setting_takes_both(store):
    for good in ("me/model", ADDRESS, "s3://models/a/b"):
        assert ExportSettings(push=good).push == good
    for wrong in ("gs://models", "gs:///x", "az://models/x", "model"):
        with pytest.raises(ValueError, match="export.push: must be OWNER/NAME"):
            ExportSettings(push=wrong)
