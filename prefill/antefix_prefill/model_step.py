"""A call of the model for one request: what breaks inside it is that request's failure, told in our words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from antefix.errors import AntefixError, StepFailed

log = logging.getLogger("antefix.prefill")


@contextlib.contextmanager
def model_step(position: int) -> Iterator[None]:
    """Around computing a prompt's tokens from `position` on.

    Where values are no numbers, torch may stumble before anybody has looked at them.
    Raises:  StepFailed: whatever is not ours broke; the log has what.
    """
    try:
        yield
    except AntefixError:
        raise
    except Exception as err:
        log.exception("the model failed for a prompt, behind its token %d", position)
        raise StepFailed("a step of the model failed; the worker's log has it") from err
