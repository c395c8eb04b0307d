"""What a router shows people about its deployment: the page at /ui, and `antefix top`.

The page shows counts and names only: no text of a prompt, no token ids, no keys.
"""
