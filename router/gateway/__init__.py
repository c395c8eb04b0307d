"""HTTP in front of the router: OpenAI's and Anthropic's APIs over `router.front`."""
