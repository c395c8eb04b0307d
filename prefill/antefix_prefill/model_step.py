"""A call of the model for one request: an error inside it fails that request only, with an error of our own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from antefix.errors import AntefixError, StepFailed

log = logging.getLogger("antefix.prefill")


@contextlib.contextmanager
def model_step(position: int) -> Iterator[None]:
    """Wraps the computation of a prompt's tokens from `position` on.

    NaN or infinity can make torch raise an error before our own checks see them.
    Raises:  StepFailed: an error that is not ours occurred; the log has its details.
    """
    try:
        yield
    except AntefixError:
        raise
    except Exception as err:
        log.exception("the model failed for a prompt, after the prompt's token %d", position)
        raise StepFailed("a step of the model failed; the worker's log has its cause") from err
