"""Chooses the worker for each request: the known workers, what each holds and has to do, and the policy that
chooses.
"""
