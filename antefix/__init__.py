"""Antefix: a disaggregated prefix cache for models built like DeepSeek-V4.

Programs import from here: the services' clients and their blocking forms, `Sampling`, the store's protocol and clients,
and every error. docs/API.md lists all names. `antefix_kvstore.open` opens a store within this process, without a
service.

    from antefix import RouterClient, Sampling

Names are loaded when they are first used, so `import antefix` alone needs neither gRPC nor torch. The package
`antefix` also holds the code that the services share. The package `antefix` imports none of the services.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from antefix.version import __version__ as __version__

if TYPE_CHECKING:
    from antefix.block import Chain as Chain
    from antefix.block import Fingerprint as Fingerprint
    from antefix.block import TokenArray as TokenArray
    from antefix.block import chain_of as chain_of
    from antefix.block import tenant_key as tenant_key
    from antefix.blocking import BlockingDecodeClient as BlockingDecodeClient
    from antefix.blocking import BlockingPrefillClient as BlockingPrefillClient
    from antefix.blocking import BlockingRouterClient as BlockingRouterClient
    from antefix.blocking import BlockingStore as BlockingStore
    from antefix.blocking import BlockingWindowClient as BlockingWindowClient
    from antefix.clients import AnswerCounters as AnswerCounters
    from antefix.clients import DecodeClient as DecodeClient
    from antefix.clients import Decoded as Decoded
    from antefix.clients import DecodeStatus as DecodeStatus
    from antefix.clients import Generated as Generated
    from antefix.clients import PlanKindStatus as PlanKindStatus
    from antefix.clients import PlannedRestore as PlannedRestore
    from antefix.clients import PlannedWay as PlannedWay
    from antefix.clients import PrefillClient as PrefillClient
    from antefix.clients import Prefilled as Prefilled
    from antefix.clients import PrefillStatus as PrefillStatus
    from antefix.clients import RouterClient as RouterClient
    from antefix.clients import RouterCounters as RouterCounters
    from antefix.clients import RouterStatus as RouterStatus
    from antefix.clients import WindowClient as WindowClient
    from antefix.clients import WindowStatus as WindowStatus
    from antefix.clients import WorkerState as WorkerState
    from antefix.errors import AntefixError as AntefixError
    from antefix.errors import BlockCorrupt as BlockCorrupt
    from antefix.errors import BlockUnusable as BlockUnusable
    from antefix.errors import BudgetExceeded as BudgetExceeded
    from antefix.errors import ConfigError as ConfigError
    from antefix.errors import Conflict as Conflict
    from antefix.errors import DeadlineExceeded as DeadlineExceeded
    from antefix.errors import Draining as Draining
    from antefix.errors import FingerprintMismatch as FingerprintMismatch
    from antefix.errors import InternalError as InternalError
    from antefix.errors import InvalidRequest as InvalidRequest
    from antefix.errors import ModelError as ModelError
    from antefix.errors import NotFinite as NotFinite
    from antefix.errors import Overloaded as Overloaded
    from antefix.errors import PermissionDenied as PermissionDenied
    from antefix.errors import QuotaExceeded as QuotaExceeded
    from antefix.errors import RateLimited as RateLimited
    from antefix.errors import ResourceExhausted as ResourceExhausted
    from antefix.errors import StepFailed as StepFailed
    from antefix.errors import StoreFull as StoreFull
    from antefix.errors import TooManyRequests as TooManyRequests
    from antefix.errors import Unauthenticated as Unauthenticated
    from antefix.errors import Unavailable as Unavailable
    from antefix.generation_request import Breakpoint as Breakpoint
    from antefix.generation_request import Caller as Caller
    from antefix.generation_request import GenerationRequest as GenerationRequest
    from antefix.layout import BlockLayout as BlockLayout
    from antefix.layout import KVFormat as KVFormat
    from antefix.layout import KVGeometry as KVGeometry
    from antefix.miss_reason import MissReason as MissReason
    from antefix.record import BlockFate as BlockFate
    from antefix.record import LookupResult as LookupResult
    from antefix.record import PutResult as PutResult
    from antefix.record import Record as Record
    from antefix.record import RecordKind as RecordKind
    from antefix.restore_report import RestoreReport as RestoreReport
    from antefix.sampling import Sampling as Sampling
    from antefix.security.credentials import Credentials as Credentials
    from antefix.store.api import Store as Store
    from antefix.store.local_store import LocalStore as LocalStore
    from antefix.store.open_store import StoreAddress as StoreAddress
    from antefix.store.open_store import open_store as open_store
    from antefix.store.remote_store import RemoteStore as RemoteStore
    from antefix.usage import Usage as Usage
    from antefix.wire import TokenLogprob as TokenLogprob

# The public names at run time, with the module that defines each.
_NAMES = {
    "antefix.block": "Chain Fingerprint TokenArray chain_of tenant_key",
    "antefix.blocking": (
        "BlockingDecodeClient BlockingPrefillClient BlockingRouterClient BlockingStore BlockingWindowClient"
    ),
    "antefix.clients": (
        "AnswerCounters DecodeClient DecodeStatus Decoded Generated PlanKindStatus PlannedRestore PlannedWay "
        "PrefillClient PrefillStatus Prefilled RouterClient RouterCounters RouterStatus WindowClient "
        "WindowStatus WorkerState"
    ),
    "antefix.errors": (
        "AntefixError BlockCorrupt BlockUnusable BudgetExceeded ConfigError Conflict DeadlineExceeded Draining "
        "FingerprintMismatch InternalError InvalidRequest ModelError NotFinite Overloaded PermissionDenied "
        "QuotaExceeded RateLimited ResourceExhausted StepFailed StoreFull TooManyRequests Unauthenticated "
        "Unavailable"
    ),
    "antefix.generation_request": "Breakpoint Caller GenerationRequest",
    "antefix.layout": "BlockLayout KVFormat KVGeometry",
    "antefix.miss_reason": "MissReason",
    "antefix.record": "BlockFate LookupResult PutResult Record RecordKind",
    "antefix.restore_report": "RestoreReport",
    "antefix.sampling": "Sampling",
    "antefix.security.credentials": "Credentials",
    "antefix.store.api": "Store",
    "antefix.store.local_store": "LocalStore",
    "antefix.store.open_store": "StoreAddress open_store",
    "antefix.store.remote_store": "RemoteStore",
    "antefix.usage": "Usage",
    "antefix.wire": "TokenLogprob",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
