"""One bill of several routers: what they tell one another of requests and limits through Redis."""
