"""What saving and publishing a model adds to what transformers does."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedModel

from .license import LICENSE

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class HubModel(PreTrainedModel):
    """Saves the licence beside the code, and pushes a complete repository."""

    # Trainer, which writes a card of its own, puts them into it.
    model_tags = ["custom_code"]
    # vLLM and SGLang run every class of which this is true, and carry keys and values only: the state would be lost.
    _supports_attention_backend = False

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        # What a constructor has checked may have been overridden since.
        config.validate()
        super().__init__(config, *args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Saving copies the code that the class names, and FSDP2 puts a subclass of torch's in its place.
        if cls.__module__.startswith("torch."):
            cls.__module__, cls.__name__ = cls.__bases__[-1].__module__, cls.__bases__[-1].__name__

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in transformers, with the licence of the code; `push_to_hub` does what the method of that name does."""
        folder = Path(save_directory)
        if self._hf_peft_config_loaded:  # Transformers' own adapters, which are saved alone.
            return super().save_pretrained(folder, is_main_process, state_dict, push_to_hub, **kwargs)
        names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags", "tag")
        publishing = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(folder, is_main_process, state_dict, **kwargs)
        if not is_main_process or not folder.is_dir():
            return None
        if not (folder / "LICENSE").exists():
            (folder / "LICENSE").write_text(LICENSE)
        if push_to_hub:
            repo_id = publishing.pop("repo_id", None) or folder.resolve().name
            self.publish(folder, repo_id, token=kwargs.get("token"), **publishing)
        return None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> "CommitInfo | str":
        """As in transformers, with what `upload` does besides: one commit, a complete model card, and a git `tag`.

        Args:
            repo_id: `name`, in your own namespace, or `namespace/name`.
            max_shard_size: of a file of weights.
            kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`, `tags` (of the
                model card) and `tag`; see `upload`. With transformers' own adapters in the model, only these are
                published, as transformers does it.
        """
        if self._hf_peft_config_loaded:
            return super().push_to_hub(repo_id, max_shard_size=max_shard_size, **kwargs)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return self.publish(folder, repo_id, **kwargs)

    def publish(self, folder: str | Path, repo_id: str, tags: list[str] | None = None, **kwargs) -> "CommitInfo":
        # Here, so that loading a model imports nothing that only publishing needs.
        from .upload import upload

        tags = [*(self.model_tags or []), *(tags or [])]
        return upload(folder, repo_id, tags=tags, name_or_path=self.name_or_path, **kwargs)
