"""A router that serves workers of other inference engines: vLLM, SGLang and other servers with an OpenAI HTTP API."""
