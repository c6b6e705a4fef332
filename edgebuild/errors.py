"""One class and one exit code per cause. A message says what, where, and what to do about it."""


class EdgebuildError(Exception):
    """Base of every error raised on purpose; the CLI prints it in one line and exits with `exit_code`."""

    exit_code = 2

    def __init__(self, what: str, remedy: str = ""):
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what} ({self.remedy})" if self.remedy else self.what


class BudgetBroken(EdgebuildError):
    """The best artifact that could be built breaks a budget."""

    exit_code = 1


class UsageError(EdgebuildError):
    """Bad usage: an option, a path or a name that does not exist."""


class SpecError(EdgebuildError):
    """A target, profile or plan file that cannot be read."""


class TaskError(EdgebuildError):
    """The user's task, model, weights or data cannot be used."""


class TransformError(EdgebuildError):
    """A transform broke an invariant of the model: shapes, finite outputs, tied channels, claimed size."""


class BackendError(EdgebuildError):
    """Lowering failed, or the backend cannot take this model."""


class DeviceError(EdgebuildError):
    """An artifact could not be run on a device: it crashed, hung or answered nonsense."""

    exit_code = 1


class Infeasible(EdgebuildError):
    """No plan meets every budget."""

    exit_code = 3


class MissingEnvironment(EdgebuildError):
    """Something the job needs is not installed."""

    exit_code = 4


def first_line(error: Exception) -> str:
    """What an error of a library says, at its shortest: the first line that says anything, else the error's kind."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
