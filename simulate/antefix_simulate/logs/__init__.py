"""Turns other programs' request logs into traces (`antefix trace import`). Text is hashed as it is read, never
stored."""
