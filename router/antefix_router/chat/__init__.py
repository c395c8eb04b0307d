"""Turns conversations into tokens, and outputs into messages. The tokens of a longer conversation begin with the tokens
of the shorter one.
"""
