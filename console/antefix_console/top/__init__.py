"""`antefix top`: what the router's page shows, as text."""
