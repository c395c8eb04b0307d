"""The router's HTTP interface: OpenAI's and Anthropic's APIs on top of `antefix_router.front`."""
