"""Settings of the HTTP gateway."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from antefix.config import grace_setting, require, setting
from antefix_router.front import BillingConfig
from antefix_router.gateway.trusted_proxies import TrustedProxies

_ORIGIN: Final = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z.-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(BillingConfig):
    """Settings of the HTTP gateway. If no HTTP address is set, the router has no HTTP gateway."""

    http_address: str = setting("", "host:port of the HTTP API; port 0 takes a free one; empty: none")
    http_body_bytes_max: int = setting(32 << 20, "larger request bodies are refused", unit="bytes")
    http_body_timeout_s: float = setting(60.0, "longest a request's body may take to arrive", unit="s")
    http_head_timeout_s: float = setting(10.0, "longest a request's head may take to arrive", unit="s")
    http_unread_timeout_s: float = setting(120.0, "longest time that a client may leave its answer unread", unit="s")
    http_connections_max: int = setting(
        0, "most connections at once; a new one replaces an idle one; 0: three quarters of the limit of open files"
    )
    http_connections_per_address: int = setting(
        0, "most connections of one address, except trusted proxies; 0: half of http_connections_max"
    )
    http_requests_max: int = setting(512, "most HTTP requests at once; further ones are refused with a retry hint")
    http_timeout_s: float = setting(600.0, "longest a request may take", unit="s")
    http_keep_alive_s: float = setting(
        4.0, "time between a stream's messages that only say that the stream is alive", unit="s"
    )
    http_usage_details: bool = setting(
        False, "report in every answer's usage what the cache did, even if the client did not ask"
    )
    http_trusted_proxies: tuple[str, ...] = setting(
        (), "proxies that are trusted to name the client: addresses, networks (10.0.0.0/8) or unix; empty: none"
    )
    http_client_header: str = setting(
        "", "header in which a trusted proxy names the client, such as x-forwarded-for or forwarded"
    )
    http_cors_origins: tuple[str, ...] = setting(
        (), "origins of web pages whose scripts may call the API, as https://host[:port], or * for all; empty: none"
    )
    http_max_tokens: int = setting(4096, "most output tokens of a request that names no limit", unit="tokens")
    model_names: tuple[str, ...] = setting((), "further names that clients may use for the model")
    model_aliases: str = setting(
        "", "TOML file of further model names that clients may use, with modes (deploy/model_aliases.toml)"
    )
    unknown_models: str = setting(
        "serve", "what to do with a request for another model: serve (with this model) or refuse"
    )
    prefix_rules: str = setting(
        "", "TOML file of rules for lines that are moved behind the stable prefix (deploy/prefix_rules.toml), or off"
    )
    chat_format: str = setting(
        "auto",
        "format in which conversations are written for the model: auto, plain, deepseek-v4, deepseek-v4-0731 or"
        " template",
    )

    grace_s: float = grace_setting()

    def __post_init__(self) -> None:
        BillingConfig.__post_init__(self)
        require(self.http_body_bytes_max > 0, f"http_body_bytes_max must be positive, is {self.http_body_bytes_max}")
        require(self.http_body_timeout_s > 0, f"http_body_timeout_s must be positive, is {self.http_body_timeout_s}")
        require(self.http_head_timeout_s > 0, f"http_head_timeout_s must be positive, is {self.http_head_timeout_s}")
        require(
            self.http_unread_timeout_s > 0, f"http_unread_timeout_s must be positive, is {self.http_unread_timeout_s}"
        )
        for name in ("http_connections_max", "http_connections_per_address"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")
        require(self.http_requests_max > 0, f"http_requests_max must be positive, is {self.http_requests_max}")
        require(self.http_timeout_s > 0, f"http_timeout_s must be positive, is {self.http_timeout_s}")
        require(self.http_keep_alive_s > 0, f"http_keep_alive_s must be positive, is {self.http_keep_alive_s}")
        TrustedProxies(self.http_trusted_proxies, self.http_client_header)
        for origin in self.http_cors_origins:
            require(
                origin == "*" or _ORIGIN.fullmatch(origin) is not None,
                f"http_cors_origins must be like https://host[:port], without a path, or *; is {origin!r}",
            )
        require(self.http_max_tokens > 0, f"http_max_tokens must be positive, is {self.http_max_tokens}")
        require(self.unknown_models in ("serve", "refuse"), "unknown_models must be serve or refuse")
        require(self.grace_s >= 0, f"grace_s must not be negative, is {self.grace_s}")
        formats = ("auto", "plain", "deepseek-v4", "deepseek-v4-0731", "template")
        require(self.chat_format in formats, f"chat_format must be one of {', '.join(formats)}")
