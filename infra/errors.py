"""Errors about machines and money that a user can fix, in the form of `fvlm_core.errors.UserError`: what is wrong, where, and the fix."""


class InfraError(RuntimeError):
    """What is wrong, where it was found, and the fix that the user can apply."""

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix:   {self.fix}"


class RefusedError(InfraError):
    """Bad input, found before anything was rented or started."""
