"""A router in front of other engines' workers: vLLM, SGLang and other servers with an OpenAI HTTP API."""
