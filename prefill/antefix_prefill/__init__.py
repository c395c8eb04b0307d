"""The prefill service: restores the longest usable prefix of a prompt, computes the rest, stores what is new."""
