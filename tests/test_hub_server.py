"""The Hub that other tests talk to answers the real client as the Hugging Face Hub does."""

from pathlib import Path

import pytest
from hub_server import HubServer, online
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(2**20 + 1)


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as hub:
        online(monkeypatch, hub)
        yield hub
        assert hub.unknown == []


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token="hf_test")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"a": 1}')
    (tmp_path / "model/model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "model"


@pytest.fixture
def repo(api, folder):
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=folder, commit_message="first")
    return "me/model"


def status(failure) -> int:
    return failure.value.response.status_code


def test_a_token_tells_who_one_is(api):
    assert api.whoami()["name"] == "me"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as failure:
        api.whoami(token="hf_wrong")
    assert status(failure) == 401


def test_a_repository_is_created_once_and_in_ones_own_namespace(hub, api):
    assert api.create_repo("model").repo_id == "me/model"
    assert api.create_repo("me/model", exist_ok=True).repo_id == "me/model"
    with pytest.raises(HfHubHTTPError) as failure:
        api.create_repo("me/model")
    assert status(failure) == 409
    with pytest.raises(HfHubHTTPError) as failure:
        api.create_repo("other/model")
    assert status(failure) == 403
    api.delete_repo("me/model")
    assert hub.repos == {}
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("me/model")
    api.delete_repo("me/model", missing_ok=True)


def test_a_folder_becomes_one_commit(hub, api, repo):
    assert [commit.message for commit in hub.repos[repo].commits] == ["initial commit", "first"]
    assert list(hub.uploads.values()) == [WEIGHTS]
    assert api.list_repo_files(repo) == [".gitattributes", "config.json", "model.safetensors"]
    info = api.model_info(repo)
    assert (info.sha, info.private) == (hub.repos[repo].branches["main"], False)
    weights = next(entry for entry in api.list_repo_tree(repo) if entry.path == "model.safetensors")
    assert (weights.size, weights.lfs.size) == (len(WEIGHTS), len(WEIGHTS))


def test_what_has_not_changed_is_not_committed_again(hub, api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert len(hub.repos[repo].commits) == 2


def test_a_file_downloads_by_branch_tag_and_commit(api, repo, tmp_path):
    first = api.model_info(repo).sha
    api.create_tag(repo, tag="v1")
    api.upload_file(repo_id=repo, path_in_repo="config.json", path_or_fileobj=b"{}")

    def download(revision, path="config.json"):
        return Path(api.hf_hub_download(repo, path, revision=revision, cache_dir=tmp_path / "cache"))

    assert download("main").read_text() == "{}"
    assert download("v1").read_text() == download(first).read_text() == '{"a": 1}'
    assert download("v1", "model.safetensors").read_bytes() == WEIGHTS
    snapshot = Path(api.snapshot_download(repo, revision="v1", cache_dir=tmp_path / "other cache"))
    assert sorted(path.name for path in snapshot.iterdir()) == [".gitattributes", "config.json", "model.safetensors"]
    assert snapshot.name == first
    with pytest.raises(EntryNotFoundError):
        download("main", "absent.json")
    with pytest.raises(RevisionNotFoundError):
        download("absent")


def test_branches_and_tags(api, repo):
    api.create_branch(repo, branch="dev/one")
    api.create_branch(repo, branch="dev/one", exist_ok=True)
    head = api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a", revision="dev/one").oid
    api.create_tag(repo, tag="v1", revision="dev/one")
    with pytest.raises(HfHubHTTPError) as failure:
        api.create_tag(repo, tag="v1")
    assert status(failure) == 409
    refs = api.list_repo_refs(repo)
    assert {branch.name: branch.target_commit == head for branch in refs.branches} == {"main": False, "dev/one": True}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", head)]
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="dev/one")
    assert not api.revision_exists(repo, "v1") and not api.revision_exists(repo, "dev/one")


def test_a_pull_request_leaves_the_branch_alone(hub, api, repo, folder, tmp_path):
    (folder / "config.json").write_text("proposed")
    (folder / "more.safetensors").write_bytes(b"more")
    proposed = HfApi(endpoint=hub.url, token="hf_other").upload_folder(repo_id=repo, folder_path=folder, create_pr=True)
    assert proposed.pr_revision == "refs/pr/1"
    assert hub.repos[repo].pull_requests == {"refs/pr/1": proposed.oid}
    assert hub.repos[repo].commit("main").message == "first"
    path = api.hf_hub_download(repo, "config.json", revision="refs/pr/1", cache_dir=tmp_path / "cache")
    assert Path(path).read_text() == "proposed"
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]


def test_only_the_owner_writes(hub, api, repo):
    other = HfApi(endpoint=hub.url, token="hf_other")
    with pytest.raises(HfHubHTTPError) as failure:
        other.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a")
    assert status(failure) == 403


def test_files_are_deleted_and_copied(hub, api, repo):
    api.create_commit(
        repo,
        [
            CommitOperationAdd("data/a", b"a"),
            CommitOperationAdd("data/b/c", b"c"),
            CommitOperationCopy("model.safetensors", "copy.safetensors"),
            CommitOperationDelete("config.json"),
        ],
        commit_message="second",
    )
    files = hub.repos[repo].commit("main").files
    assert set(files) == {".gitattributes", "model.safetensors", "copy.safetensors", "data/a", "data/b/c"}
    assert files["copy.safetensors"] == WEIGHTS
    assert {entry.path for entry in api.list_repo_tree(repo, "data")} == {"data/a", "data/b"}
    assert {entry.path for entry in api.list_repo_tree(repo, "data", recursive=True)} == {
        "data/a",
        "data/b",
        "data/b/c",
    }
    assert {entry.path for entry in api.get_paths_info(repo, ["data", "data/a", "absent"])} == {"data", "data/a"}
    api.delete_folder("data", repo)
    assert not api.file_exists(repo, "data/a")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("data/a", repo)


def test_a_commit_can_require_its_parent(api, repo):
    parent = api.model_info(repo).sha
    api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as failure:
        api.upload_file(repo_id=repo, path_in_repo="b", path_or_fileobj=b"b", parent_commit=parent)
    assert status(failure) == 412


def test_the_metadata_of_a_model_card_is_checked(hub, api, repo):
    def card(text):
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=text.encode())

    card("---\ntags:\n- stateful\n---\n# Model\n")
    assert api.model_info(repo).tags == ["stateful"]
    with pytest.warns(UserWarning, match="missing yaml metadata"):
        card("# Model\n")
    for wrong in ["---\n- a\n- b\n---\n", "---\na: [\n---\n"]:
        with pytest.raises(ValueError, match="Invalid metadata"):
            card(wrong)


def test_a_private_repository_is_there_for_its_owner_only(hub, api):
    api.create_repo("me/secret", private=True)
    assert hub.repos["me/secret"].private and api.model_info("me/secret").private
    for token in [False, "hf_other"]:
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("me/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download("me/secret", ".gitattributes", token=token)


@pytest.mark.parametrize("step", ["/preupload/", "/upload/", "/commit/"])
def test_a_failed_upload_leaves_the_branch_as_it_was(step, hub, api, repo, folder):
    before = hub.repos[repo].branches["main"]
    (folder / "config.json").write_text("new")
    (folder / "new.safetensors").write_bytes(b"new")
    hub.fail_on = lambda method, path: step in path
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        api.upload_folder(repo_id=repo, folder_path=folder)
    assert hub.repos[repo].branches == {"main": before} and len(hub.repos[repo].commits) == 2
    hub.fail_on = lambda method, path: True
    with pytest.raises(LocalEntryNotFoundError):
        api.hf_hub_download(repo, "config.json")


def test_an_unknown_request_is_recorded(hub, api):
    with pytest.raises(HfHubHTTPError, match="GET /api/models/me/model/discussions"):
        list(api.get_repo_discussions("me/model"))
    assert hub.unknown.pop().startswith("GET /api/models/me/model/discussions")
