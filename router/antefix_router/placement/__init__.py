"""Chooses the worker for each request: the workers that are known, their blocks and load, and the policy that
chooses.
"""
