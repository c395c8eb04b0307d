"""`antefix load`: replays a trace against an endpoint and measures what its clients see.

Knows endpoints and traces; nothing of Antefix's services.
"""
