"""Workers without channels: these tests call nobody, and a channel needs an event loop."""

import pytest

from antefix_router.placement import workers


@pytest.fixture(autouse=True, scope="module")
def no_channels():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "PrefillClient", lambda address: None)
        patch.setattr(workers, "DecodeClient", lambda address: None)
        yield
