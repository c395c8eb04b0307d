"""Why a prompt hits or misses, block by block: from a store's directory alone, without any service.

block_evidence  what the index and the store's log know of each block of a prompt
answer          what a worker would do with that: all plans with their predicted times, and why the rest misses
text            the same for people
"""
