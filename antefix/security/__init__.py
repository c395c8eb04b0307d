"""Authentication and authorization in a deployment: certificates, identities, the table of calls, grants.

This package knows the part of gRPC and OpenSSL in a connection, and nothing about what services do. docs/SECURITY.md
describes security as a whole.
"""
