"""Typed clients, one file per service: value types in, value types out, our exceptions, a deadline on every call."""

from antefix.block import TokenArray as Tokens
from antefix.clients.decode import DecodeClient, Decoded
from antefix.clients.prefill import PrefillClient, Prefilled
from antefix.clients.router import Generated, RouterClient
from antefix.clients.usage import Usage, usage_from_wire, usage_to_wire
from antefix.clients.window import WindowClient

__all__ = [
    "DecodeClient",
    "Decoded",
    "Generated",
    "PrefillClient",
    "Prefilled",
    "RouterClient",
    "Tokens",
    "Usage",
    "WindowClient",
    "usage_from_wire",
    "usage_to_wire",
]
