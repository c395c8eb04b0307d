"""The command line and the tools that run whole deployments. Imports any room, and no room imports it."""
