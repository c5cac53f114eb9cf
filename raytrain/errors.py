"""Every error that a user can cause, and the exit status of the command."""

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""


class RaytrainError(Exception):
    """An error whose text is written for the person who started the command."""

    exit_status = 1


class RecipeError(RaytrainError):
    """The recipe, an argument or the place to run is wrong: nothing was started."""

    exit_status = 2


class TrainingError(RaytrainError):
    """The run stopped, and starting it again as it is would stop it again."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or what was read is not what was written."""
