"""HTTP in front of the router: OpenAI's and Anthropic's APIs over `antefix_router.front`."""
