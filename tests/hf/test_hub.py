"""The hub, spoken to through its own client: a stand-in on this machine answers, and no network is needed."""

import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from dpo_jax import convert
from dpo_jax.errors import UserError
from dpo_jax.hf import hub, tensors
from dpo_jax.hf.push import check_push, push
from dpo_jax.hf.tensors import Tensors, local_folder
from tests.support.hub_stand_in import READ_ONLY, TOKEN, Repository, at_hub, contents, serving, use

# The hub's own client uploads with an argument that its HTTP library would rather have under another name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MODEL = "org/tiny"


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The stand-in, with an empty cache and nobody logged in."""
    with serving() as hub:
        use(monkeypatch, hub, tmp_path / "home")
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def source(tmp_path):
    """A model's folder as it lies at the hub."""
    return write_model(tmp_path / "source")


@pytest.fixture
def export(tmp_path):
    return write_export(tmp_path / "export")


def write_model(folder: Path, seed: int = 0) -> Path:
    (folder / "onnx").mkdir(parents=True)
    weights = {"w": np.random.default_rng(seed).standard_normal((4, 3), np.float32)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, folder / "onnx" / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "modeling.py").write_text("never run")
    return folder


def write_export(folder: Path, seed: int = 0, shards: int = 1, base: str = "tiny") -> Path:
    """What an export leaves, without a model behind it."""
    folder.mkdir()
    rng, digests = np.random.default_rng(seed), {}
    for i in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({f"w{i}": rng.standard_normal((4, 3), np.float32)}, folder / name)
        digests[name] = tensors.file_digest(folder / name)
    small = {
        "config.json": json.dumps({"seed": seed}).encode(),
        "README.md": f"---\nbase_model: {base}\n---\n# Tiny\n".encode(),
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        tensors.OURS: json.dumps({"seed": seed}).encode(),
    }
    digests |= {name: tensors.write_bytes(folder / name, content) for name, content in small.items()}
    sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    tensors.write_bytes(folder / tensors.SUMS, sums.encode())
    return folder


def line(act, *args, **how) -> str:
    """The one line of a refusal."""
    with pytest.raises(UserError) as caught:
        act(*args, **how)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ download


def test_a_hub_id_is_a_folder_with_weights_and_side_files_and_nothing_that_runs(far, source):
    commit = far.add(MODEL, source)
    folder = local_folder(MODEL)
    assert hub.commit_of(folder) == commit
    found = contents(folder)
    assert found == {name: contents(source)[name] for name in ("model.safetensors", "config.json", "tokenizer.json")}
    assert list(Tensors(folder).infos) == ["w"]  # links into the cache's own blobs are followed
    assert not any("pytorch_model" in asked or "modeling" in asked or "onnx" in asked for asked in far.asked)


def test_nothing_is_downloaded_twice(far, source):
    far.add(MODEL, source)
    local_folder(MODEL, tensors.SIDE_FILES)
    assert far.count("/resolve/") and not far.count("model.safetensors")
    first = local_folder(MODEL)
    before = list(far.asked)
    assert local_folder(MODEL) == first
    assert [asked for asked in far.asked[len(before) :] if "/api/" not in asked] == []


def test_a_commit_that_is_here_is_not_asked_for(far, source):
    commit = far.add(MODEL, source)
    first = local_folder(MODEL, revision=commit)
    far.asked.clear()
    assert local_folder(MODEL, revision=commit) == first and far.asked == []


def test_a_branch_a_tag_and_a_commit_are_revisions(far, source, tmp_path):
    first = far.add(MODEL, source)
    second = far.add(MODEL, write_model(tmp_path / "second", seed=1))
    far.repositories[MODEL].refs |= {"v1": first, "refs/pr/1": second}
    wanted = {None: second, "main": second, "v1": first, first: first, "refs/pr/1": second}
    assert {name: hub.commit_of(local_folder(MODEL, revision=name)) for name in wanted} == wanted
    assert contents(local_folder(MODEL, revision="v1"))["model.safetensors"] == contents(source)["model.safetensors"]


def test_without_a_network_the_cache_is_enough(far, source, monkeypatch):
    commit = far.add(MODEL, source)
    folder = local_folder(MODEL)
    far.asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert local_folder(MODEL) == local_folder(MODEL, revision=commit) == folder
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert local_folder(MODEL) == folder and far.asked == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_what_is_not_whole_in_the_cache_is_refused_offline(far, source, monkeypatch):
    commit = far.add(MODEL, source)
    local_folder(MODEL, tensors.SIDE_FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, revision in ((MODEL, None), (MODEL, commit), (MODEL, "v1"), ("org/other", None)):
        assert f"HF_HUB_OFFLINE is set, and '{name}'" in line(local_folder, name, revision=revision)


def test_a_hub_that_is_out_of_reach_is_named_with_what_to_check(far, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    said = line(local_folder, MODEL)
    assert "ConnectError" in said and "check the name, the network and HF_ENDPOINT" in said


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_to_be_asked_later(far, source, status):
    far.add(MODEL, source)
    far.faults["/api/models/"] = status
    assert f"the hub answered {status} for 'org/tiny'; try again later" in line(local_folder, MODEL)


def test_a_model_or_revision_that_is_not_there_is_named(far, source):
    far.add(MODEL, source)
    assert "the hub shows no 'org/missing'; check the name" in line(local_folder, "org/missing")
    assert "the hub has no 'org/tiny' at revision 'v9'" in line(local_folder, MODEL, revision="v9")
    assert "the hub has no 'org/tiny' at revision" in line(local_folder, MODEL, revision="a" * 40)
    for wrong in ("../main", "-x", "", "a b", "a/../b", "/a", "x\n"):
        assert "is not the name of a branch, a tag or a commit" in line(local_folder, MODEL, revision=wrong)


def test_a_private_model_opens_with_a_token_and_tells_others_to_log_in(far, source, monkeypatch):
    commit = far.add("ada/secret", source, private=True)
    assert "the hub shows no 'ada/secret'" in line(local_folder, "ada/secret")
    assert "set HF_TOKEN or run `hf auth login`" in line(local_folder, "ada/secret")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert hub.commit_of(local_folder("ada/secret")) == commit


def test_a_gated_model_says_where_to_ask(far, source, monkeypatch):
    far.add(MODEL, source, gated=True)
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        assert "'org/tiny' is gated" in line(local_folder, MODEL)


def test_a_token_that_is_wrong_is_not_printed(far, source, monkeypatch):
    far.add(MODEL, source)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    said = line(local_folder, MODEL)
    assert "does not know the token" in said and "hf_xxx" not in said


def test_a_folder_has_no_revision(source):
    assert "which has no revision 'v1'; leave the revision out" in line(local_folder, source, revision="v1")


def test_a_repository_of_pickles_is_refused_as_a_folder_of_them_is(far, source):
    (source / "model.safetensors").unlink()
    far.add(MODEL, source)
    assert "only pytorch_model.bin, a format that can run code" in line(local_folder, MODEL)
    (source / "pytorch_model.bin").unlink()
    far.add(MODEL, source)
    assert "has neither model.safetensors nor" in line(local_folder, MODEL)
    assert not far.count(".bin")


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "{}/evil.json", "..\\evil.json"])
def test_a_name_that_leads_out_of_the_folder_is_refused(far, source, tmp_path, name):
    far.add(MODEL, source)
    far.repositories[MODEL].commit({**far.files(MODEL), name.format(tmp_path): b"{}"})
    assert "evil.json" in line(local_folder, MODEL)
    assert not list(tmp_path.rglob("*evil.json"))


@pytest.mark.parametrize("name", ["../evil.safetensors", "{}/evil.safetensors"])
def test_weights_elsewhere_are_never_asked_for(far, source, tmp_path, name):
    far.add(MODEL, source)
    far.repositories[MODEL].commit({**far.files(MODEL), name.format(tmp_path): b"evil"})
    assert "model.safetensors" in contents(local_folder(MODEL))
    assert not far.count("evil") and not list(tmp_path.rglob("*evil*"))


# ------------------------------------------------------------------------------------------------ push


@pytest.fixture
def writer(far, monkeypatch):
    """The stand-in, to one who may write for `ada` and `lab`."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return far


def test_a_push_leaves_the_folder_at_the_hub_privately(writer, export):
    check_push("ada/tuned")
    assert "ada/tuned" not in writer.repositories  # a check makes nothing
    url = push(export, "ada/tuned", message="first")
    repository = writer.repositories["ada/tuned"]
    assert repository.private and url == f"{writer.url}/ada/tuned/commit/{repository.refs['main']}"
    assert at_hub(writer, "ada/tuned") == contents(export)
    assert repository.log == ["initial commit", "first"]


def test_the_command_pushes_a_folder(writer, export, capsys):
    """The very command that a run names when its own push failed."""
    assert convert.main(["push", str(export), "ada/tuned", "--public", "--revision", "run-1"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{writer.url}/ada/tuned/commit/")
    assert at_hub(writer, "ada/tuned", "run-1") == contents(export) and not writer.repositories["ada/tuned"].private
    assert convert.main(["push", str(export), "bob/tuned"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {export} was not pushed to 'bob/tuned': ")


def test_what_was_pushed_comes_back_byte_for_byte(writer, export):
    push(export, "ada/tuned")
    back = contents(local_folder("ada/tuned"))
    assert back == {name: content for name, content in contents(export).items() if name != tensors.SUMS}


def test_the_token_of_a_login_will_do(far, export, tmp_path):
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    push(export, "lab/tuned", private=False)
    assert not far.repositories["lab/tuned"].private


def test_pushing_again_replaces_the_export_and_its_leftovers(writer, export, tmp_path):
    push(write_export(tmp_path / "old", seed=1, shards=3), "ada/tuned")
    writer.repositories["ada/tuned"].commit({**writer.files("ada/tuned"), "plots/loss.png": b"mine"})
    push(export, "ada/tuned")
    assert at_hub(writer, "ada/tuned") == {**contents(export), "plots/loss.png": b"mine"}
    puts, commits = writer.count("PUT"), len(writer.repositories["ada/tuned"].commits)
    push(export, "ada/tuned")
    assert writer.count("PUT") == puts and len(writer.repositories["ada/tuned"].commits) <= commits + 1


def test_a_branch_is_made_and_main_stays(writer, export, tmp_path):
    push(export, "ada/tuned")
    other = write_export(tmp_path / "other", seed=1)
    for _ in range(2):
        push(other, "ada/tuned", revision="run-2")
    assert at_hub(writer, "ada/tuned", "run-2") == contents(other) and at_hub(writer, "ada/tuned") == contents(export)
    for wrong in ("a" * 40, "../x", ""):
        assert "is not the name of a branch" in line(push, export, "ada/tuned", revision=wrong)


def test_a_repository_with_something_else_is_left_alone(writer, export, source):
    commit = writer.add("ada/thesis", source)
    for act in (lambda: check_push("ada/thesis", private=False), lambda: push(export, "ada/thesis", private=False)):
        assert "so it is no export of dpo_jax and is left alone; push to another name" in line(act)
    assert writer.repositories["ada/thesis"].refs["main"] == commit


def test_a_private_export_never_goes_to_a_public_repository(writer, export):
    writer.repositories["ada/open"], writer.repositories["ada/shut"] = Repository(False), Repository(True)
    for name in ("ada/open", "ada/shut"):
        writer.repositories[name].commit({})
    assert "the repository is public; make it private" in line(push, export, "ada/open")
    assert "the repository is private; make it public" in line(push, export, "ada/shut", private=False)
    assert not writer.count("preupload")


def test_a_commit_of_someone_else_meanwhile_is_not_overwritten(writer, export, tmp_path, monkeypatch):
    push(export, "ada/tuned")

    def meanwhile(self, *args, **how):
        writer.repositories["ada/tuned"].commit({**writer.files("ada/tuned"), "mine.txt": b"new"})
        return commit(self, *args, **how)

    commit = huggingface_hub.HfApi.create_commit
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", meanwhile)
    other = write_export(tmp_path / "other", seed=1)
    assert "was changed by someone else meanwhile; try again" in line(push, other, "ada/tuned")
    assert at_hub(writer, "ada/tuned") == {**contents(export), "mine.txt": b"new"}


@pytest.mark.parametrize("change", ["changed", "added", "missing", "unlisted", "no record", "link"])
def test_only_a_whole_export_is_pushed(writer, export, tmp_path, change):
    name = "config.json"
    match change:
        case "changed":
            (export / name).write_text("{ }")
        case "added":
            name = "notes.txt"
            (export / name).write_text("")
        case "missing":
            (export / name).unlink()
        case "unlisted":
            name = tensors.SUMS
            (export / name).unlink()
        case "no record":
            name, sums = tensors.OURS, (export / tensors.SUMS).read_text().splitlines(keepends=True)
            (export / name).unlink()
            (export / tensors.SUMS).write_text("".join(line for line in sums if name not in line))
        case "link":
            shutil.move(export / name, tmp_path / "elsewhere")
            (export / name).symlink_to(tmp_path / "elsewhere")
    assert name in line(push, export, "ada/tuned")
    assert "ada/tuned" not in writer.repositories or at_hub(writer, "ada/tuned") == {}


def test_a_push_that_the_hub_did_not_take_whole_is_noticed(writer, export, monkeypatch):
    """A .gitignore at the hub makes its client leave files out without a word."""
    push(export, "ada/tuned")
    files = {name: content for name, content in writer.files("ada/tuned").items() if name != "config.json"}
    writer.repositories["ada/tuned"].commit({**files, ".gitignore": b"config.json\n"})
    assert "config.json is not at the hub as it is here" in line(push, export, "ada/tuned")
    writer.repositories["ada/tuned"].commit({**files, "config.json": b"{}"})
    honest = Repository.commit
    monkeypatch.setattr(Repository, "commit", lambda self, files, *rest: honest(self, {**files, name: b"bad"}, *rest))
    for name in ("model.safetensors", "README.md"):
        assert f"{name} is not at the hub as it is here" in line(push, export, "ada/tuned")


WHO = {
    "nobody": ("", "ada/tuned", "there is no token of the hub; set HF_TOKEN or run `hf auth login`"),
    "a wrong token": ("hf_" + "x" * 30, "ada/tuned", "does not know the token"),
    "a reader": (READ_ONLY, "ada/tuned", "the token of 'ada' may only read"),
    "someone else": (TOKEN, "bob/tuned", "the token is of 'ada', who may not write for 'bob'; push to ada/..."),
    "a reader of an organisation": (TOKEN, "museum/tuned", "who may not write for 'museum'"),
    "no owner": (TOKEN, "tuned", "a repository is named OWNER/NAME"),
    "a path": (TOKEN, "a/b/c", "a repository is named OWNER/NAME"),
}


@pytest.mark.parametrize("who", WHO)
def test_who_may_not_push_is_told_why_before_and_after(far, export, monkeypatch, who):
    token, name, part = WHO[who]
    monkeypatch.setenv("HF_TOKEN", token)
    before = line(check_push, name)
    after = line(push, export, name)
    assert part in before and part in after and not far.repositories and "hf_xxx" not in before + after


def test_pushing_needs_the_network(writer, export, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set; unset it" in line(check_push, "ada/tuned")
        assert "HF_HUB_OFFLINE is set; unset it" in line(push, export, "ada/tuned")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "ConnectError" in line(push, export, "ada/tuned")


@pytest.mark.parametrize(
    ("request_", "status", "part"),
    [
        ("repos/create", 403, "the hub forbids this token"),
        ("preupload", 403, "the hub forbids this token"),
        ("/commit/", 500, "the hub answered 500"),
        ("/commit/", 400, "as the test wants it"),
        ("POST /ada/tuned.git", 401, "does not know the token"),
    ],
)
def test_what_the_hub_refuses_is_said_and_the_folder_stays(writer, export, request_, status, part):
    before = contents(export)
    writer.faults[request_] = status
    said = line(push, export, "ada/tuned")
    assert said.startswith(f"{export} was not pushed to 'ada/tuned': ") and part in said
    assert contents(export) == before
    writer.faults.clear()
    push(export, "ada/tuned")
    assert at_hub(writer, "ada/tuned") == before


def test_a_card_that_the_hub_rejects_is_said_before_anything_is_uploaded(writer, tmp_path):
    export = write_export(tmp_path / "export", base="my model")
    assert '"my model" is not valid' in line(push, export, "ada/tuned")
    assert not writer.count("PUT")
