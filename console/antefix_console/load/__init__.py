"""`antefix load`: a trace replayed against an endpoint, and what its clients see.

Knows endpoints and traces; nothing of Antefix's services.
"""
