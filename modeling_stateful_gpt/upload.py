"""A checkpoint folder as a Hub repository: its model card, its licence, and the upload in one commit."""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from .card import eval_results, is_written_by_hand, make_card, make_state_card
from .checkpoint_files import WEIGHTS, code, no_link, plain, read_text, weights_and_index, with_imports
from .state_adapter import LORA_FILES, STATE_CONFIG, STATE_WEIGHTS

logger = logging.get_logger(__name__)


TOKENIZER = r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt"


TOKENIZER += (
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)


RESULTS = r"evaluation\.json|results\.json|\.eval_results/.*"


PICTURE = r"[^/]+\.(png|jpg|jpeg|svg)"


UPLOADED = rf"config\.json|generation_config\.json|LICENSE|training_curve\.png|{TOKENIZER}|{RESULTS}"
"""What a checkpoint consists of, but for its weights, its code and the pictures that its card shows. Not what is
pickled, and not `run.json` and `trainer_state.json`, which name files of the machine on which it was trained."""


def license_text() -> bytes:
    """The licence of the code: from the checkout, or from the installed package."""
    checkout = Path(__file__).parents[1]
    if (checkout / "hub_upload.py").exists():
        return (checkout / "LICENSE").read_bytes()
    listed = metadata.files("modeling-stateful-gpt") or []
    return Path(str(next(name for name in listed if name.name == "LICENSE").locate())).read_bytes()


def contents(
    folder: Path,
    repo_id: str,
    revision: str | None,
    tags: list[str] | None = None,
    api: HfApi | None = None,
    present: Sequence[str] = (),
) -> dict[str, Path | bytes]:
    """What an upload of `folder` brings into a repository with the files `present`: file names, and for each a file of
    the folder or its bytes.

    Raises:
        ValueError: a file of a checkpoint is a link, no plain file, or damaged.
    """
    card = read_text(folder / "README.md")
    by_hand = bool(card) and is_written_by_hand(card)
    shown = {name for name, _ in re.findall(rf"\(({PICTURE})\)", card)} if by_hand else set()
    is_state = (folder / STATE_CONFIG).exists()
    if is_state:
        wanted = with_imports(folder, ["modeling_stateful_gpt"]) | {STATE_CONFIG, STATE_WEIGHTS, *LORA_FILES}
    else:
        wanted = code(folder) | {file.name for file in weights_and_index(folder)}
    wanted |= shown
    files: dict[str, Path | bytes] = {}
    templates = no_link(folder / "additional_chat_templates")
    for file in sorted([*folder.glob("*"), *templates.glob("*")]):
        name = file.relative_to(folder).as_posix()
        if name in wanted or re.fullmatch(UPLOADED, name):
            files[name] = plain(file)
    files.setdefault("LICENSE", license_text())
    files |= eval_results(folder)
    if is_state and not by_hand:
        files["README.md"] = str(make_state_card(folder, repo_id, revision, tags, api)).encode()
    elif by_hand:
        files["README.md"] = folder / "README.md"
    else:
        files["README.md"] = str(make_card(folder, repo_id, revision, tags, api, present)).encode()
    return files


def check_tag(tag: str | None) -> None:
    """Raises a ValueError for what git takes for no tag."""
    if tag is not None and not re.fullmatch(r"\w+([./-]+\w+)*", tag):
        raise ValueError(f"{tag!r} is no name of a tag; use letters, digits, '.', '_' and '-'.")


def next_version(tags: list[str]) -> str:
    versions = [int(tag[1:]) for tag in tags if re.fullmatch(r"v\d+", tag)]
    return f"v{max(versions, default=0) + 1}"


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    tags: list[str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Publishes a checkpoint folder in one commit, and gives the commit a tag for the model card to name.

    If it fails, what it has done is undone. Someone else's commit in the meantime makes it fail.

    Args:
        repo_id: `name`, in the namespace of the token, or `namespace/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: the branch; created from `main` if it does not exist.
        create_pr: open a pull request in place of the commit and the tag.
        tag: the git tag; by default the first of `v1`, `v2`, … that is free.
        tags: further tags for the metadata of the model card.

    Raises:
        ValueError: a tag that exists, a pull request to a repository that does not, or a private upload to a public
            one.
        HfHubHTTPError: the Hub refuses.
        RuntimeError: a large file did not arrive.
    """
    check_tag(tag)
    folder, api = Path(folder), HfApi(token=token)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with ExitStack() as undo:
        if not api.repo_exists(repo_id):
            if create_pr:
                raise ValueError(f"There is no {repo_id} to open a pull request on; leave out create_pr.")
            api.create_repo(repo_id, private=private)
            undo.callback(attempt, f"delete {repo_id}", api.delete_repo, repo_id)
        elif private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public. Make it private in its settings, or use another name.")
        refs = api.list_repo_refs(repo_id)
        existing = [ref.name for ref in refs.tags]
        if tag in existing:
            raise ValueError(f"{repo_id} has a tag {tag!r} already; choose another.")
        if revision and not create_pr and revision not in [branch.name for branch in refs.branches]:
            api.create_branch(repo_id, branch=revision)
            undo.callback(attempt, f"delete the branch {revision}", api.delete_branch, repo_id, branch=revision)
        if not create_pr:
            tag = tag or next_version(existing)

        present = api.list_repo_files(repo_id, revision=None if create_pr else revision)
        files = contents(folder, repo_id, None if create_pr else tag, tags, api, present)
        if isinstance(files["README.md"], bytes) and card_on_hub_is_written_by_hand(api, repo_id, revision):
            del files["README.md"]
        # What the new version would otherwise be loaded with, or be judged by.
        outdated = "|".join(
            [WEIGHTS, RESULTS, *map(re.escape, LORA_FILES), *([TOKENIZER] if "tokenizer_config.json" in files else [])]
        )
        parent = api.model_info(repo_id, revision=revision).sha
        stale = [name for name in present if re.fullmatch(outdated, name) and name not in files]
        commit_message = commit_message or "Upload model"

        def undo_commit() -> None:
            head = api.list_repo_commits(repo_id, revision=revision)[0]
            # Whether it was made is not known where the Hub's answer was lost.
            if head.commit_id != parent and head.title == commit_message:
                restore(api, repo_id, revision, [*files, *stale], parent, head.commit_id)

        if not create_pr:
            undo.callback(attempt, f"take back the commit to {repo_id}", undo_commit)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        if not create_pr:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
        undo.pop_all()
    return commit


def attempt(what: str, function: Callable, *args, **kwargs) -> None:
    """Part of undoing: if it fails too, that is said, and the rest is undone all the same."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        logger.warning(f"The upload failed, and so did the attempt to {what} ({error}); please look after it.")


def restore(api: HfApi, repo_id: str, revision: str | None, names: list[str], parent: str, head: str) -> None:
    """Commits, on top of the commit `head`, the named files as they were in the commit `parent`."""
    before = api.list_repo_files(repo_id, revision=parent)
    api.create_commit(
        repo_id,
        [
            CommitOperationCopy(name, name, src_revision=parent) if name in before else CommitOperationDelete(name)
            for name in names
        ],
        commit_message="Undo an upload that failed",
        revision=revision,
        parent_commit=head,
    )


def card_on_hub_is_written_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return False
        return is_written_by_hand(Path(card).read_text())
