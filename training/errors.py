"""What a user can mend: said in one line, with what to do."""

import contextlib
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError


class RunError(ValueError):
    """The run cannot be started, or cannot go on, as asked; the message says what to do."""


class Diverged(RunError):
    """A number of the training is not finite."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(
            f"The {what} of step {step} is not finite, and training cannot go on from there. Lower --learning_rate, or "
            f"set --max_grad_norm and --warmup_steps, and use another --output_dir. The checkpoints of before are kept."
        )


@contextlib.contextmanager
def trying(options: str | None = None) -> Iterator[None]:
    """Says which options are at fault, where what is made of them refuses them in whatever way.

    Raises:
        RunError: any error.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        # What a check of a configuration found is the cause of the error that names the check.
        found = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        why = str(found.args[0] if isinstance(found, KeyError) else found) or type(found).__name__
        raise RunError(f"{options}: {why}" if options else why) from error
