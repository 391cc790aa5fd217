"""The typed errors of the package: each says what, the value got, what was expected, where, and the next step."""


class PartialFCError(Exception):
    """Base of every error that the package raises on purpose; the command line shows it as one line.

    Attributes:
        rank: the rank that alone raises it; None where every rank does.
    """

    rank: int | None = None


class ConfigError(PartialFCError, ValueError):
    """A configuration key, type or value that can't be used; or arguments of a class that contradict each other."""


class DataError(PartialFCError):
    """A data set file that isn't what it should be; the message names the file and, where known, the offset."""


class LabelError(PartialFCError, ValueError):
    """A label outside ``[0, num_classes)``. Raised on every rank; the message names the rank, the row and the label."""


class NonFiniteError(PartialFCError, ArithmeticError):
    """A NaN or infinity in the embeddings or the loss. Raised on every rank; nothing was trained on it."""


class CheckpointError(PartialFCError):
    """A saved model or a commit that can't be read, can't be written, or doesn't fit what it is loaded into."""


class MisfitError(CheckpointError):
    """A commit of something else than what it is loaded into; the message has a line for each difference."""
