"""Errors a user can act on: what is wrong, where, and what to do."""

from functools import partial
from typing import Any

FIX = "\n  fix:"
"""Begins the last line of a `UserError`."""


class UserError(Exception):
    """Bad input or a bad environment, found before work starts; entry points print it without a traceback.

    `what` is wrong, `where` it was found, and the `fix` the user can apply.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """So that one raised in a process of a pool reaches the one that waits for it."""
        return partial(type(self), self.what, where=self.where, fix=self.fix), ()

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}{FIX}   {self.fix}"


def is_refusal(message: str) -> bool:
    """Whether a message, of another process perhaps, is a `UserError`'s: who tries again meets it again."""
    return FIX in message
