"""Conversations to tokens and outputs back to messages, stable from turn to turn."""
