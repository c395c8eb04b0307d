"""`antefix top`: the content of the router's status page, as text."""
