"""What workers hold in memory, told to routers: a numbered log, and the ways it travels. Steers placement only."""

from antefix.events.memory_log import KEY_BYTES, MemoryBatch, MemoryEvent, MemoryEventKind, MemoryLog

__all__ = ["KEY_BYTES", "MemoryBatch", "MemoryEvent", "MemoryEventKind", "MemoryLog"]
