"""An export to an object store: whole or not there, and nothing of another's is touched. Stand-ins serve it."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable

import pytest

from dpo_jax import convert
from dpo_jax.errors import UserError
from dpo_jax.hf import tensors
from dpo_jax.hf.checkpoint import load_hf, save_hf
from dpo_jax.hf.push import check_push, push
from dpo_jax.hf.settings import ExportSettings
from dpo_jax.stores import Store
from tests.support.object_store import empty_store
from tests.support.s3 import empty_bucket
from tests.support.worlds import write_model

pytest.importorskip("gcsfs", reason="extra gcs is not installed")
pytest.importorskip("s3fs", reason="extra s3 is not installed")
ADDRESS = "gs://models/tuned"


@dataclasses.dataclass
class Bucket:
    """A bucket of a stand-in: its address, and its objects behind the tool's back."""

    address: str
    objects: Callable[[], dict[str, bytes]]
    put: Callable[[str, bytes], object]


@pytest.fixture
def store():
    with empty_store() as store:
        yield store


def google(stack):
    store = stack.enter_context(empty_store())
    return Bucket(
        "gs://models",
        lambda: {name: store.objects["models", name].data for name in store.names("models")},
        lambda name, data: store.put(("models", name), data),
    )


def amazon(stack):
    client = stack.enter_context(empty_bucket("models"))

    def objects():
        names = [about["Key"] for about in client.list_objects_v2(Bucket="models").get("Contents", [])]
        return {name: client.get_object(Bucket="models", Key=name)["Body"].read() for name in names}

    return Bucket("s3://models", objects, lambda name, data: client.put_object(Bucket="models", Key=name, Body=data))


@pytest.fixture(params=[google, amazon], ids=["gs", "s3"])
def bucket(request):
    with contextlib.ExitStack() as stack:
        yield request.param(stack)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    write_model(root / "model", num_hidden_layers=2)
    save_hf(load_hf(root / "model"), root / "export", root / "model")
    return root / "export"


def there(bucket):
    return {name.removeprefix("tuned/"): data for name, data in bucket.objects().items()}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_the_folder_and_an_earlier_one_is_gone(bucket, export, tmp_path, capsys):
    address = f"{bucket.address}/tuned"
    check_push(address)
    assert there(bucket) == {}
    assert push(export, f"{address}/") == address and there(bucket) == files(export)
    shorter = tmp_path / "shorter"
    shutil.copytree(export, shorter)
    gone = next(name for name in files(shorter) if "/" in name or name == "chat_template.jinja")
    (shorter / gone).unlink()
    sums = [line for line in (shorter / tensors.SUMS).read_text().splitlines(True) if not line.endswith(f"  {gone}\n")]
    (shorter / tensors.SUMS).write_text("".join(sums))
    bucket.put("tuned/notes.txt", b"mine")
    assert convert.main(["push", str(shorter), address]) == 0 and address in capsys.readouterr().out
    assert there(bucket) == {**files(shorter), "notes.txt": b"mine"}


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
    assert f"tuned/{tensors.SUMS}" not in store.names("models")


async def _at_once(_):
    pass


def test_other_things_are_left_alone(bucket, export):
    address = f"{bucket.address}/tuned"
    bucket.put("tuned/thesis.tex", b"years")
    for ask in (lambda: check_push(address), lambda: push(export, address)):
        with pytest.raises(UserError, match="holds thesis.tex and no dpo_jax.json"):
            ask()
    assert there(bucket) == {"thesis.tex": b"years"}


def test_a_bucket_that_is_not_there_is_named(export):
    with empty_bucket("models"):
        for ask in (lambda: check_push("s3://modles/tuned"), lambda: push(export, "s3://modles/tuned")):
            with pytest.raises(UserError, match=r"s3://modles/tuned: there is no such bucket; make it, or correct"):
                ask()


def test_the_setting_takes_both():
    for good in ("me/model", ADDRESS, "s3://models/a/b"):
        assert ExportSettings(push=good).push == good
    for wrong in ("gs://models", "gs:///x", "az://models/x", "model"):
        with pytest.raises(ValueError, match="export.push: must be OWNER/NAME"):
            ExportSettings(push=wrong)
