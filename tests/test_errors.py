"""Errors that a user can act on, wherever they are raised."""

import pickle

from fvlm_core.errors import UserError


def test_an_error_of_a_pools_process_arrives_as_it_was() -> None:
    error = UserError("it is broken", where="here", fix="mend it")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (UserError, str(error))
