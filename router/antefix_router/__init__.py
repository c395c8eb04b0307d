"""The router: names a prompt's blocks, places the request, relays the answer, accounts for it."""
