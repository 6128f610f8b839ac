"""What a user can mend: said in one line, with what to do."""


class RunError(ValueError):
    """The run cannot be started, or cannot go on, as asked; the message says what to do."""
