"""Errors that a user can act on: what is wrong, where, and how to fix it."""

from functools import partial
from typing import Any

FIX = "\n  fix:"
"""Prefix of the last line of a `UserError`'s message."""


class UserError(Exception):
    """Bad input or a bad environment, found before work starts; entry points print it without a traceback.

    `what` says what is wrong, `where` where it was found, and `fix` what the user can do about it.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the error picklable, so that it can cross from a pool's worker process to its parent."""
        return partial(type(self), self.what, where=self.where, fix=self.fix), ()

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}{FIX}   {self.fix}"


class FolderTakenError(UserError):
    """The output folder belongs to another job, which must find it unchanged."""


def is_user_error(message: str) -> bool:
    """Whether a message, possibly from another process, is that of a `UserError`: a retry would fail in the same way."""
    return FIX in message
