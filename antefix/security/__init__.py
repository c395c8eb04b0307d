"""Authentication and authorization in a deployment: certificates, identities, the table of calls, grants.

Knows gRPC's and OpenSSL's part of a connection, and nothing about what services do. docs/SECURITY.md describes it all.
"""
