"""Turns other programs' request logs into traces (`antefix trace import`). The text of requests is hashed as it is
read, never stored.
"""
