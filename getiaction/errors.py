"""Tell a user's mistake from a bug: the entry points print the first as one message, the second with a traceback."""


class InputError(ValueError):
    """Report a mistake in the input. The message names the key, the value, the rule and the fix."""


class TrainingError(RuntimeError):
    """Report a run that cannot go on (a loss that is not finite, no memory left), with advice."""
