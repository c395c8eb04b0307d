"""The router turns a prompt into names of blocks, places the request on workers, relays the answer, and writes the
bill.
"""
