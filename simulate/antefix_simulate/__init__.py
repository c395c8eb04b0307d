"""Replays traces of requests through the real window strategies, restore planner and eviction policy.

Only the machine (how long tokens and bytes take) and the disk (that bytes are kept) are models; every decision is made
by the code that the services run. docs/results/window_state.md has the results.
"""
