"""Why a prompt hits or misses, block by block: from a store's directory alone, without any service.

block_evidence  what the index and the store's log tell about each block of a prompt
answer          what a worker would do: all plans with their predicted times, and why the rest misses
text            the answer as text
"""
