"""The command line and the tools that run whole deployments. This package imports every other package, and no package
imports it.
"""
