"""Settings of the tier, as vLLM hands them over from `secondary_tiers` in its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from antefix.byte_size import parse_byte_size
from antefix.errors import ConfigError
from antefix_engines.engine_store import StoreSettings

_OF_STORE: Final = {each.name for each in dataclasses.fields(StoreSettings)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """store: the store's settings, given next to these (`antefix_engines.engine_store.StoreSettings`).

    weights_revision: identifies the weights; empty: the hub's commit, or a hash of the files.  arithmetic: a name for
    set-ups that compute alike; empty: vLLM's version, the device and the number of ranks.
    lookup_wait_s: time after which a lookup without an answer is a miss.  queue_bytes: limit on rows that wait to be
    stored.
    locality: LOCAL or REMOTE, for vLLM's filters and events; empty: LOCAL where `directory` is given.
    enable_kv_events: report stored rows as events, where vLLM's own `kv_events_config` is on.
    """

    store: StoreSettings
    weights_revision: str = ""
    arithmetic: str = ""
    namespace: str = "default"
    lookup_wait_s: float = 1.0
    load_threads: int = 4
    queue_bytes: int | str = "512M"
    locality: str = ""
    enable_kv_events: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.lookup_wait_s <= 600:
            raise ConfigError(f"lookup_wait_s must be above 0 and at most 600, is {self.lookup_wait_s}")
        if not 1 <= self.load_threads <= 64:
            raise ConfigError(f"load_threads must be from 1 to 64, is {self.load_threads}")
        if self.locality not in ("", "LOCAL", "REMOTE"):
            raise ConfigError(f"locality must be LOCAL or REMOTE, is {self.locality!r}")
        parse_byte_size(self.queue_bytes)

    @property
    def queue_bytes_max(self) -> int:
        return parse_byte_size(self.queue_bytes)

    @property
    def is_local(self) -> bool:
        return self.locality == "LOCAL" or (not self.locality and self.store.reads_files)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Raises:  ConfigError: an unknown name, or an invalid value."""
        own = {each.name for each in dataclasses.fields(cls)} - {"store"}
        if unknown := sorted(set(values) - own - _OF_STORE):
            known = ", ".join(sorted(own | _OF_STORE))
            raise ConfigError(f"unknown settings of the Antefix tier: {', '.join(unknown)}; known: {known}")
        store = StoreSettings.from_mapping({name: value for name, value in values.items() if name in _OF_STORE})
        return cls(store=store, **{name: value for name, value in values.items() if name in own})
