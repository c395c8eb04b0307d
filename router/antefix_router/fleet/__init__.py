"""A router in front of workers that are not ours: vLLM, SGLang and whatever else has an OpenAI door."""
