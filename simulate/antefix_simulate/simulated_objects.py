"""The object store of a simulated fleet: its contents, the requests to it, and their cost.

Units that were read again or are about to be evicted are uploaded; the oldest upload is deleted first. Checkpoints are
not uploaded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from antefix.errors import InvalidRequest

# Values from `antefix.objects`, which this package does not import: bytes of an upload and of a read, and the seconds
# between a process's list requests for new segments.
SEGMENT_BYTES: Final = 32 << 20
RANGE_BYTES: Final = 4 << 20
LIST_S: Final = 30.0
_MONTH_S: Final = 30 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectPrices:
    """Dollars: per 1,000 requests that write or list, per 1,000 that read, per GB and month, per GB that is read.

    The defaults are Amazon's of S3 Standard in us-east-1, read from machines of the same region. They are settings.
    """

    put: float = 0.005
    get: float = 0.0004
    month: float = 0.023
    read: float = 0.0

    def __post_init__(self) -> None:
        for name in ("put", "get", "month", "read"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequest(f"the object store's price {name!r} must not be negative")

    @classmethod
    def parse(cls, text: str) -> ObjectPrices:
        """Parse prices such as `put=0.005,get=0.0004`; prices that are not named keep their defaults. Raises:
        InvalidRequest: another form.
        """
        prices = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                if name not in cls.__dataclass_fields__:
                    raise ValueError
                prices[name] = float(value)
            except ValueError:
                raise InvalidRequest(
                    f"prices of an object store are put=, get=, month= and read=, in dollars, not {part!r}"
                ) from None
        return cls(**prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectBill:
    """The requests of a run to the object store, and their cost. num_*: requests. gb_months: storage used."""

    num_puts: int = 0
    num_lists: int = 0
    num_gets: int = 0
    gb_read: float = 0.0
    gb_months: float = 0.0
    request_dollars: float = 0.0
    storage_dollars: float = 0.0
    read_dollars: float = 0.0

    @property
    def dollars(self) -> float:
        return self.request_dollars + self.storage_dollars + self.read_dollars


class SimObjects:
    """num_processes: processes that list new segments. now_s: the simulated time, which must be set before each event
    at a later time.
    """

    def __init__(self, bytes_max: int, unit_bytes: int, *, num_processes: int = 0) -> None:
        self.bytes_uploaded = 0
        self.now_s = 0.0
        self._num_max = bytes_max // unit_bytes
        self._unit_bytes = unit_bytes
        self._num_processes = num_processes
        self._names: OrderedDict[int, None] = OrderedDict()
        self._num_gets = 0
        self._bytes_read = 0
        self._byte_s = 0.0
        self._since_s: float | None = None
        self._began_s = 0.0

    def __contains__(self, name: int) -> bool:
        return name in self._names

    def upload(self, name: int) -> None:
        if not self._num_max or name in self._names:
            return
        self._count_storage()
        while len(self._names) >= self._num_max:
            self._names.popitem(last=False)
        self._names[name] = None
        self.bytes_uploaded += self._unit_bytes

    def read(self, num_units: int) -> None:
        """Read a run of units that are next to each other in a segment."""
        nbytes = num_units * self._unit_bytes
        self._bytes_read += nbytes
        self._num_gets += math.ceil(nbytes / RANGE_BYTES)

    def bill(self, prices: ObjectPrices) -> ObjectBill:
        """The bill up to now. Objects in the store cost more as time passes, also after the end of the run."""
        self._count_storage()
        # A segment that is not full is uploaded as well; within seconds others fill it.
        num_puts = math.ceil(self.bytes_uploaded / SEGMENT_BYTES)
        num_lists = round((self.now_s - self._began_s) / LIST_S * self._num_processes) if self._num_max else 0
        gb_read, gb_months = self._bytes_read / 1e9, self._byte_s / 1e9 / _MONTH_S
        return ObjectBill(
            num_puts=num_puts,
            num_lists=num_lists,
            num_gets=self._num_gets,
            gb_read=gb_read,
            gb_months=gb_months,
            request_dollars=((num_puts + num_lists) * prices.put + self._num_gets * prices.get) / 1000,
            storage_dollars=gb_months * prices.month,
            read_dollars=gb_read * prices.read,
        )

    def _count_storage(self) -> None:
        if self._since_s is None:
            self._since_s = self._began_s = self.now_s
        self._byte_s += len(self._names) * self._unit_bytes * (self.now_s - self._since_s)
        self._since_s = self.now_s
