"""Finding checkpoints: folders, huggingface_hub's cache, and one line for what fails. No test touches the network."""

import types

import pytest
from huggingface_hub import constants

from jaxembed.errors import UserError
from jaxembed.hf.hub import resolve

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one repository in it, no network."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("a/b").samefile(tmp_path / "a" / "b")
    assert resolve("~/a") == tmp_path / "a"


@pytest.mark.parametrize("spec", ["org/name", "org/name@main", f"org/name@{REVISION}"])
def test_cached_repositories_need_no_network(cache, spec):
    assert resolve(spec) == cache


def test_a_named_revision_that_is_cached_is_not_looked_up(cache, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, **settings):
        asked.append(settings["local_files_only"])
        return str(cache)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name@v1") == cache
    assert asked == [True]
    (cache / "model.safetensors").unlink()  # another program cached the config alone
    assert resolve("org/name@v1") == cache
    assert asked == [True, True, False]
    assert resolve("org/name") == cache
    assert asked == [True, True, False, False]


def test_only_weights_and_texts_are_fetched(cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **s: seen.update(s, name=name) or str(cache))
    resolve("org/name")
    assert (seen["name"], seen["revision"]) == ("org/name", None)
    fetched = huggingface_hub.utils.filter_repo_objects(
        [
            "model.safetensors",
            "a/b.json",
            "vocab.txt",
            "spiece.model",
            "pytorch_model.bin",
            "modeling.py",
            "onnx/m.json",
        ],
        allow_patterns=seen["allow_patterns"],
        ignore_patterns=seen["ignore_patterns"],
    )
    assert list(fetched) == ["model.safetensors", "a/b.json", "vocab.txt", "spiece.model"]


@pytest.mark.parametrize("spec", ["nothing", "/no/such/folder", "a/b/c", "org/name@", "org/na me", "../x/y"])
def test_neither_folder_nor_repository(spec):
    with pytest.raises(UserError, match="no such folder, and not of the form ORG/NAME"):
        resolve(spec)


def test_not_cached_and_offline(cache):
    with pytest.raises(
        UserError, match=r"hf:org/other: no such folder here: not in the hub's cache, and HF_HUB_OFFLINE"
    ):
        resolve("org/other")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        resolve("org/name@v7")


def test_what_the_hub_says_no_to(cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = types.SimpleNamespace(headers={}, request=None)
    for error, message in (
        (errors.RepositoryNotFoundError("no", response=response), "no such repository on the hub"),
        (errors.RevisionNotFoundError("no", response=response), "has no revision 'v9'"),
        (errors.GatedRepoError("no", response=response), "is gated"),
        (errors.LocalEntryNotFoundError("Connection refused\nmore"), "cannot be read: Connection refused$"),
        (errors.HFValidationError("bad name"), "cannot be read: bad name"),
    ):

        def refuse(name, error=error, **settings):
            raise errors.LocalEntryNotFoundError("not here") if settings["local_files_only"] else error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(UserError, match=message) as caught:
            resolve("org/name@v9")
        assert "\n" not in str(caught.value)
