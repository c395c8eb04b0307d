"""Decides which payloads are compressed. Holds the compression plans that clients registered (the code that compresses
is in antefix.store_files.codec).

auto: reading a compressed payload takes 1 / (ratio * disk) + 1 / codec seconds per byte, reading a raw one 1 / disk;
the faster way is chosen. The disk's speed is measured once; the codec's speed and the ratio on the first payloads of
each fingerprint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from antefix.host_limits import usable_cores
from antefix.record import Buffer, Record, RecordKind
from antefix.store_files import codec

log = logging.getLogger("antefix_kvstore.compression")

# So many payloads of a kind are coded and decoded before it is judged. The fastest of them counts, so that a pause of
# the machine does not.
NUM_SAMPLES: Final = 4
# The speed of an NVMe disk, used when there is no room to measure.
DISK_BYTES_PER_S: Final = 2e9


# Fingerprint and kind: all records that share both have the same payload layout.
Layout = tuple[bytes, RecordKind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Why the payloads of a layout are compressed or not. Speeds in payload bytes per second. codec: the speed of all
    cores together.
    """

    compress: bool
    ratio: float
    codec_bytes_per_s: float
    disk_bytes_per_s: float

    def __str__(self) -> str:
        """The end of a sentence in the log, which begins with the kind of records."""
        verdict = "compressed" if self.compress else "stored as they are"
        decoded, disk = self.codec_bytes_per_s / 1e9, self.disk_bytes_per_s / 1e9
        return (
            f"{verdict}: compression makes them {self.ratio:.2f} times smaller, they decode at {decoded:.2f} GB/s, and"
            f" the disk reads {disk:.2f} GB/s"
        )


def judge(*, ratio: float, codec_bytes_per_s: float, disk_bytes_per_s: float) -> Judgement:
    """Whether reading compressed payloads is faster than reading raw ones."""
    coded_s_per_byte = 1 / (ratio * disk_bytes_per_s) + 1 / codec_bytes_per_s
    return Judgement(
        compress=coded_s_per_byte < 1 / disk_bytes_per_s,
        ratio=ratio,
        codec_bytes_per_s=codec_bytes_per_s,
        disk_bytes_per_s=disk_bytes_per_s,
    )


class Compression:
    """mode: off, zstd (keep the compressed payload where it is smaller) or auto. Thread-safe."""

    def __init__(self, mode: str, measure_disk: Callable[[], float]) -> None:
        self.mode = mode
        self.judgements: dict[Layout, Judgement] = {}
        self._measure_disk = measure_disk
        self._disk_bytes_per_s = 0.0
        self._lock = threading.Lock()
        self._plans: dict[Layout, codec.PlanePlan] = {}
        self._samples: dict[Layout, list[tuple[float, float]]] = {}

    def register(self, fingerprint: bytes, kind: RecordKind, plan: codec.PlanePlan) -> None:
        with self._lock:
            self._plans[fingerprint, kind] = plan

    def registered(self) -> list[tuple[bytes, RecordKind, codec.PlanePlan]]:
        """Each registered fingerprint and kind, with the plan by which its payloads may be compressed."""
        return [(*layout, plan) for layout, plan in self._plans.items()]

    def registered_bytes(self, fingerprint: bytes, kind: RecordKind) -> int | None:
        """The size of a payload of this layout; None if the layout was not registered."""
        plan = self._plans.get((fingerprint, kind))
        return None if plan is None else plan.payload_bytes

    def wants(self, record: Record) -> bool:
        """Whether to try compressing a payload: its layout is known, and the mode allows it."""
        layout = (record.fingerprint, record.kind)
        if self.mode == "off" or layout not in self._plans:
            return False
        judgement = self.judgements.get(layout)
        return self.mode == "zstd" or judgement is None or judgement.compress

    def encode(self, record: Record) -> bytes | None:
        """The compressed payload; None if it is stored raw."""
        if not self.wants(record):
            return None
        layout = (record.fingerprint, record.kind)
        coded = codec.encode(record.payload, self._plans[layout])
        if self.mode == "auto" and layout not in self.judgements:
            self._sample(layout, record.payload, coded)
        return coded

    def _measured_disk(self) -> float:
        try:
            return self._measure_disk()
        except OSError as err:
            log.warning(
                "the disk's speed cannot be measured (%s); a speed of %g bytes/s is assumed", err, DISK_BYTES_PER_S
            )
            return DISK_BYTES_PER_S

    def _sample(self, layout: Layout, payload: Buffer, coded: bytes | None) -> None:
        nbytes = memoryview(payload).nbytes
        ratio, bytes_per_s = 1.0, float("inf")
        if coded is not None:
            out = memoryview(bytearray(nbytes))
            codec.decode(coded, out)
            start = time.perf_counter()
            codec.decode(coded, out)
            ratio, bytes_per_s = nbytes / len(coded), nbytes / (time.perf_counter() - start)
        with self._lock:
            samples = self._samples.setdefault(layout, [])
            samples.append((ratio, bytes_per_s))
            if len(samples) < NUM_SAMPLES or layout in self.judgements:
                return
            if not self._disk_bytes_per_s:
                self._disk_bytes_per_s = self._measured_disk()
            self.judgements[layout] = judge(
                ratio=sum(ratio for ratio, _ in samples) / len(samples),
                codec_bytes_per_s=max(speed for _, speed in samples) * usable_cores(),
                disk_bytes_per_s=self._disk_bytes_per_s,
            )
        log.info(
            "records of kind %s with fingerprint %s are %s",
            layout[1].name.lower(),
            layout[0].hex()[:16],
            self.judgements[layout],
        )
