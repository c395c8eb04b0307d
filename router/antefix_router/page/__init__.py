"""What a router shows of its deployment to people: the page at /ui, and `antefix top`.

Counts and names only: no text of a prompt, no token ids, no keys.
"""
