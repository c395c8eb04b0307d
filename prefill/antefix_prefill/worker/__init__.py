"""The parts that prefill and decode workers share: a model with its block pool, restoring prefixes, computing, writing
back.
"""
