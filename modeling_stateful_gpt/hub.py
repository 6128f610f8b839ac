"""What all models of the package add to transformers' own."""

from transformers import PreTrainedConfig, PreTrainedModel


class HubModel(PreTrainedModel):
    """Checks its configuration, and says to clients what they would get wrong."""

    # Trainer, which writes a card of its own, puts them into it.
    model_tags = ["custom_code"]
    # vLLM and SGLang run every class of which this is true, and carry keys and values only: the state would be lost.
    _supports_attention_backend = False

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        # What a constructor has checked may have been overridden since.
        for check in ("validate_architecture", "validate_fields", "validate_text_config"):
            getattr(config, check, lambda: None)()
        super().__init__(config, *args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # Saving copies the code that the class names, and FSDP2 puts a subclass of torch's in its place.
        if cls.__module__.startswith("torch."):
            cls.__module__, cls.__name__ = cls.__bases__[-1].__module__, cls.__bases__[-1].__name__
