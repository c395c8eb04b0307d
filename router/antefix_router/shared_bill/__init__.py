"""One bill for several routers: through Redis they share what they know about requests and limits."""
