"""Turns conversations into tokens, and outputs into messages. A longer conversation begins with the tokens of the
shorter one.
"""
