"""The decode service: takes handoffs, generates with continuous batching, stores the KV of what it generated."""
