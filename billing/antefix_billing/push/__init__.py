"""Sends usage to a billing system: reads ledgers, sends each entry at least once with a stable id, and records what was
sent.
"""
