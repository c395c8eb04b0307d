"""Other programs' logs of requests, as traces: `antefix trace import`. Text is hashed on the way in and never kept."""
