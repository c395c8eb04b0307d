"""Runs your transformers model with Antefix's store. `generate` computes only the part of a prompt that is not stored.

pip install '.[transformers]'
python examples/transformers_cache.py MODEL DIRECTORY 'a long prompt'
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from antefix_engines.transformers import AntefixCache

name, directory, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name).eval()
ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
with AntefixCache(model, directory) as cache:
    past = cache.prefill(model, ids)
    answer = model.generate(ids, past_key_values=past, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0, ids.shape[1] :]))
print(f"[{past.report.num_cached_tokens} of {past.report.num_tokens} prompt tokens restored]")
