"""Replays traces of requests through the real window strategies, restore planner and eviction policy.

Only the machine (the time that tokens and bytes take) and the disk (which only counts bytes) are models. All decisions
are made by the code that the services run. docs/results/window_state.md has the results.
"""
