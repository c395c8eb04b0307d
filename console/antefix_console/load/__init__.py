"""`antefix load`: replays a trace against an endpoint and measures what its clients see.

The package knows endpoints and traces, but nothing of Antefix's services.
"""
