"""Finding services that come, go and move: by DNS names with several addresses, or by leases in Redis."""

from antefix.discovery.dns_name import DnsName
from antefix.discovery.following import Following
from antefix.discovery.found import Found, Source
from antefix.discovery.redis_leases import LeaseReader, ServiceLease

__all__ = ["DnsName", "Following", "Found", "LeaseReader", "ServiceLease", "Source"]
