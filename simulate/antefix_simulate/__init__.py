"""Replays traces of requests through the real window strategies, restore planner and eviction policy.

Only the machine (the time that tokens and bytes take) and the disk (which only counts bytes) are models. The code that
the services run makes every decision. docs/results/window_state.md has the results.
"""
