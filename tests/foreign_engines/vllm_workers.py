"""vLLM workers on this machine: a random model of two layers, an OpenAI API each, and KV events on Unix sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from tests.foreign_engines.vllm_environment import PYTHON

MODEL_NAME = "tiny"
# vLLM's attention on CPUs needs multiples of 32.
BLOCK_SIZE = 32
_START_S = 600
_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def missing():
    """Why vLLM cannot run here, or an empty string if it can."""
    return "" if PYTHON.is_file() else f"no vLLM in {PYTHON}: `make test-engines` installs it"


def make_model(directory):
    """A Llama of two layers without weights (vLLM draws them), whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end = vocabulary["<|end|>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "chat_template": _TEMPLATE,
        },
        "generation_config.json": {"eos_token_id": end},
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 320,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "eos_token_id": end,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


class VllmWorker:
    """One worker. Call `start`, then `wait` until it serves. Its log is in the directory."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.address = f"127.0.0.1:{self._port}"
        self.events = f"ipc://{directory}/worker{number}.events"
        self.replay = f"ipc://{directory}/worker{number}.replay"
        self.log = directory / f"worker{number}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        told = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self.events,
            "replay_endpoint": self.replay,
        }
        arguments = {
            "model": str(self._directory / "model"),
            "served-model-name": MODEL_NAME,
            "host": "127.0.0.1",
            "port": str(self._port),
            "load-format": "dummy",
            "dtype": "bfloat16",
            "max-model-len": "8192",
            "max-num-seqs": "8",
            "block-size": str(BLOCK_SIZE),
            "kv-events-config": json.dumps(told),
        }
        flags = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        environment = {
            **os.environ,
            "PYTHONPATH": "",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *flags),
                    *("--enforce-eager", "--enable-prompt-tokens-details"),
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The engine is a separate process, so the whole process group is ended.
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the worker serves.  Raises:  RuntimeError: the worker ended or took too long."""
        ends = time.monotonic() + _START_S
        while time.monotonic() < ends:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self, *, how: int = signal.SIGTERM) -> None:
        if self._process is None:
            return
        os.killpg(self._process.pid, how)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
        # An engine whose parent was killed may outlive it for a moment.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None
