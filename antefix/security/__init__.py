"""Who is who in a deployment, and who may do what: certificates, identities, the table of calls, grants.

Knows gRPC's and OpenSSL's sides of a connection, and nothing of what services do. docs/SECURITY.md tells the whole.
"""
