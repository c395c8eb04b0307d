"""AntefixCache: which names blocks have, what `save` accepts, and what happens if the store fails."""

import dataclasses
import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from antefix.blocking import LoopThread
from antefix.errors import ConfigError, InvalidRequest
from antefix.secret import Keyring, create_secret_file
from antefix.security import certificates
from antefix.security.identity import Role
from antefix_console.deployment import Deployment, DeploymentConfig
from antefix_engines.engine_store import EngineStore, StoreSettings
from antefix_engines.transformers import AntefixCache, model_identity
from antefix_engines.transformers.small_models import BLOCK_SIZE, small_model
from tests.child_environment import child_environment
from tests.on_demand import transformers
from tests.slow_cases import slow_but

pytestmark = pytest.mark.slow

PROMPT = [(7 * i * i + 3 * i) % 300 for i in range(5 * BLOCK_SIZE + 3)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    return small_model("llama")


@pytest.fixture(scope="module")
def v4():
    return small_model("deepseek_v4")


@pytest.fixture
def store(tmp_path):
    with EngineStore.open(StoreSettings(directory=str(tmp_path / "data"), budget_bytes="1G")) as opened:
        yield opened


def cache_of(model, store, **settings):
    return AntefixCache(model, store, block_size=BLOCK_SIZE, **settings)


def cold(model, num_blocks, prompt=PROMPT):
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for i in range(num_blocks):
            ids = torch.tensor([prompt[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]])
            model(input_ids=ids, past_key_values=past, use_cache=True)
    return past


def next_logits(model, past, at, prompt=PROMPT):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt[at : at + 5]]), past_key_values=past, use_cache=True).logits


def num_cached(cache, prompt=PROMPT):
    return cache.restore(prompt).report.num_cached_tokens


def test_prefill_stores_and_the_next_prefill_computes_nothing(llama, store):
    cache = cache_of(llama, store)
    first, second = (cache.prefill(llama, PROMPT) for _ in range(2))
    assert (first.report.num_cached_tokens, second.report.num_cached_tokens) == (0, 5 * BLOCK_SIZE)
    assert first.get_seq_length() == second.get_seq_length() == 5 * BLOCK_SIZE
    assert store.counters.stored_records == 5
    expected = next_logits(llama, cold(llama, 5), 5 * BLOCK_SIZE)
    for past in (first, second):
        assert torch.equal(next_logits(llama, past, 5 * BLOCK_SIZE), expected)


def test_a_prompt_that_is_all_blocks_leaves_one_for_generate(llama, store):
    cache = cache_of(llama, store)
    prompt = PROMPT[: 2 * BLOCK_SIZE]
    past = cache.prefill(llama, prompt)
    assert past.get_seq_length() == BLOCK_SIZE
    ids = torch.tensor([prompt])
    expected = llama.generate(ids, past_key_values=cold(llama, 1), max_new_tokens=6, do_sample=False)
    assert torch.equal(llama.generate(ids, past_key_values=past, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("prompt", [[5], PROMPT[: BLOCK_SIZE - 1]], ids=["one token", "less than a block"])
def test_short_prompts_restore_nothing_and_work(llama, store, prompt):
    past = cache_of(llama, store).prefill(llama, prompt)
    assert past.get_seq_length() == 0
    assert llama.generate(torch.tensor([prompt]), past_key_values=past, max_new_tokens=2).shape[1] == len(prompt) + 2


@pytest.mark.parametrize("name", ["llama", "mistral", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def test_generated_tokens_are_not_stored(name, store):
    """Tokens were generated one by one, so the last bits of their KV differ from those of a cold prompt."""
    model = small_model(name)
    cache = cache_of(model, store)
    past = cache.prefill(model, PROMPT)
    answer = model.generate(
        torch.tensor([PROMPT]), past_key_values=past, max_new_tokens=2 * BLOCK_SIZE, do_sample=False
    )
    report = cache.save(past, answer)
    assert report.num_stored == 0 and report.num_unknown_tokens == past.get_seq_length() - 5 * BLOCK_SIZE
    turn = [*answer[0].tolist(), 1, 2, 3]
    assert num_cached(cache, turn) == 5 * BLOCK_SIZE
    continued = cache.prefill(model, turn)
    assert num_cached(cache, turn) == 7 * BLOCK_SIZE == continued.get_seq_length()
    expected = next_logits(model, cold(model, 7, turn), 7 * BLOCK_SIZE, turn)
    assert torch.equal(next_logits(model, continued, 7 * BLOCK_SIZE, turn), expected)


@pytest.mark.parametrize("name", slow_but(["llama", "gemma3"], ["llama", "gemma3", "deepseek_v4"]))
def test_save_takes_what_was_computed_block_by_block(name, store):
    model = small_model(name)
    cache = cache_of(model, store)
    past = cache.empty_cache()
    for i in range(3):
        ids = torch.tensor([PROMPT[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]])
        with torch.no_grad():
            model(input_ids=ids, past_key_values=past, use_cache=True)
    report = cache.save(past, PROMPT[: 3 * BLOCK_SIZE])
    assert report.num_unknown_tokens == 0 and report.num_stored >= 3
    assert cache.save(past, PROMPT[: 3 * BLOCK_SIZE]).num_stored == 0
    assert num_cached(cache) == 3 * BLOCK_SIZE
    expected = next_logits(model, cold(model, 3), 3 * BLOCK_SIZE)
    assert torch.equal(next_logits(model, cache.restore(PROMPT), 3 * BLOCK_SIZE), expected)


def test_a_pass_over_two_blocks_is_not_stored(llama, store):
    cache = cache_of(llama, store)
    past = cache.empty_cache()
    with torch.no_grad():
        llama(input_ids=torch.tensor([PROMPT[: 2 * BLOCK_SIZE]]), past_key_values=past, use_cache=True)
    assert cache.save(past, PROMPT).num_unknown_tokens == 2 * BLOCK_SIZE and num_cached(cache) == 0


def test_a_cache_that_was_cropped_stores_what_is_left(llama, store):
    cache = cache_of(llama, store)
    past = cache.prefill(llama, PROMPT)
    past.crop(-BLOCK_SIZE - 1)
    assert past.num_exact_tokens == 3 * BLOCK_SIZE
    next_logits(llama, past, 0)
    assert cache.save(past, PROMPT[: 3 * BLOCK_SIZE]).num_unknown_tokens == past.get_seq_length() - 3 * BLOCK_SIZE


def test_save_refuses_what_it_cannot_vouch_for(llama, store):
    cache = cache_of(llama, store)
    with pytest.raises(InvalidRequest, match="the chunks of another cache are not known"):
        cache.save(cold(llama, 2), PROMPT)
    with pytest.raises(InvalidRequest, match="other tokens"):
        cache.save(cache.prefill(llama, PROMPT), [1, *PROMPT])
    with pytest.raises(InvalidRequest, match="block size"):
        cache.save(AntefixCache(llama, store, block_size=16).prefill(llama, PROMPT), PROMPT)


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 40, dtype=torch.long), torch.zeros(40), [[1, 2], [3, 4]]], ids=["batch", "floats", "lists"]
)
def test_a_batch_is_refused(llama, store, ids):
    with pytest.raises(InvalidRequest, match="one sequence"):
        cache_of(llama, store).restore(ids)


def test_beams_are_never_stored(llama, store):
    cache = cache_of(llama, store)
    past = cache.prefill(llama, PROMPT)
    past.batch_repeat_interleave(2)
    llama.generate(torch.tensor([PROMPT]), past_key_values=past, max_new_tokens=3, num_beams=2, do_sample=False)
    assert past.num_exact_tokens == 0


def change_weight(model):
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1


def change_config(model):
    model.config.rms_norm_eps *= 2


def change_buffer(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def change_adapters(model):
    model.model.layers[0].active_adapters = ["lora"]


def change_dtype(model):
    model.bfloat16()


def change_threads(_):
    torch.set_num_threads(2)


def change_attention(model):
    model.set_attn_implementation("eager")


CHANGES = [
    *(change_weight, change_config, change_buffer, change_adapters),
    *(change_dtype, change_threads, change_attention),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_model_or_set_up_hits_nothing(store, change):
    """The model object changes after the cache was made, so the cache must not remember its identity."""
    model = small_model("llama")
    cache = cache_of(model, store)
    cache.prefill(model, PROMPT)
    change(model)
    assert num_cached(cache) == 0
    past = cache.prefill(model, PROMPT)
    assert torch.equal(next_logits(model, past, 5 * BLOCK_SIZE), next_logits(model, cold(model, 5), 5 * BLOCK_SIZE))
    assert num_cached(cache) == 5 * BLOCK_SIZE


def test_weights_are_hashed_once(llama, store, monkeypatch):
    hashed = []
    digest = model_identity._tensor_digest
    monkeypatch.setattr(model_identity, "_tensor_digest", lambda named: hashed.append(named[0]) or digest(named))
    model_identity.forget(llama)
    cache = cache_of(llama, store)
    for _ in range(3):
        cache.restore(PROMPT)
    assert len(hashed) == len(set(hashed)) > 10


def test_prefill_refuses_another_model(llama, store):
    with pytest.raises(InvalidRequest, match="other weights"):
        cache_of(llama, store).prefill(small_model("llama", seed=8), PROMPT)


def test_a_twin_of_the_model_shares(llama, store):
    cache = cache_of(llama, store)
    cache.prefill(llama, PROMPT)
    assert cache.prefill(small_model("llama"), PROMPT).report.num_cached_tokens == 5 * BLOCK_SIZE


@pytest.mark.parametrize("setting", [{"namespace": "b"}, {"weights_revision": "v2"}, {"kv_format": "fp8"}], ids=str)
def test_settings_that_part_names(llama, store, setting):
    cache_of(llama, store).prefill(llama, PROMPT)
    assert num_cached(cache_of(llama, store, **setting)) == 0


def test_tenants_do_not_share(llama, tmp_path):
    for tenant, expected in (("a", 0), ("b", 0), ("a", 5 * BLOCK_SIZE)):
        settings = StoreSettings(directory=str(tmp_path / "data"), tenant=tenant, budget_bytes="1G")
        with cache_of(llama, settings) as cache:
            assert cache.prefill(llama, PROMPT).report.num_cached_tokens == expected


def test_a_model_in_training_is_refused(store):
    with pytest.raises(InvalidRequest, match=r"model.eval\(\)"):
        cache_of(small_model("llama").train(), store)


def test_images_are_refused(store):
    model = small_model("llama")
    model.config.image_token_id = 299
    with pytest.raises(InvalidRequest, match="token 299 stands for an image"):
        cache_of(model, store).restore([1, 299, 3])


def test_a_kind_of_layer_that_is_not_kept_is_named(store):
    config = transformers.Qwen3NextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with pytest.raises(InvalidRequest, match="layer 0 keeps a LinearAttentionLayer"):
        cache_of(model, store)


def test_an_encoder_is_refused(store):
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InvalidRequest, match="encoder"):
        cache_of(transformers.T5ForConditionalGeneration(config).eval(), store)


def test_a_model_that_is_trained_on_leaves_nothing_behind(store):
    model = small_model("llama")
    cache = cache_of(model, store)
    for _ in range(20):
        change_weight(model)
        cache.restore(PROMPT)
    assert len(cache._served) <= 8


def test_a_block_that_v4s_groups_do_not_fill_is_refused(v4, store):
    with pytest.raises(InvalidRequest, match="multiple of 4"):
        AntefixCache(v4, store, block_size=30)


def test_checkpoints_may_be_fewer(v4, store):
    """Only every third boundary and a prompt's last one have a checkpoint. All blocks are stored."""
    cache = cache_of(v4, store, checkpoint_every=3)
    cache.prefill(v4, PROMPT)
    reports = [cache.restore(PROMPT[: n * BLOCK_SIZE + 1]).report for n in range(6)]
    assert [report.num_cached_tokens // BLOCK_SIZE for report in reports] == [0, 0, 0, 3, 3, 5]
    assert reports[4].num_stored_tokens == 4 * BLOCK_SIZE and reports[4].why == "no checkpoint is stored after block 3"
    short = PROMPT[: 4 * BLOCK_SIZE + 1]
    past = cache.prefill(v4, short)
    assert torch.equal(next_logits(v4, past, 4 * BLOCK_SIZE), next_logits(v4, cold(v4, 4), 4 * BLOCK_SIZE))
    assert num_cached(cache, short) == 4 * BLOCK_SIZE


def test_a_window_of_three_blocks_needs_three_checkpoints(store):
    mistral = small_model("mistral")
    cache = cache_of(mistral, store, checkpoint_every=100)
    cache.prefill(mistral, PROMPT)
    assert num_cached(cache) == 5 * BLOCK_SIZE and num_cached(cache, PROMPT[: 4 * BLOCK_SIZE + 1]) == 0
    assert torch.equal(
        next_logits(mistral, cache.restore(PROMPT), 5 * BLOCK_SIZE),
        next_logits(mistral, cold(mistral, 5), 5 * BLOCK_SIZE),
    )


@pytest.mark.parametrize("name", ["llama", pytest.param("deepseek_v4", marks=pytest.mark.slow)])
def test_fp8_is_close_and_says_so(name, store):
    model = small_model(name)
    exact, small = cache_of(model, store), cache_of(model, store, kv_format="fp8")
    assert small.prefill(model, PROMPT).report.is_exact
    past = small.restore(PROMPT)
    assert not past.report.is_exact and "approximate" in past.report.why
    assert small.layout.block_bytes * 3 < exact.layout.block_bytes
    got, expected = next_logits(model, past, 5 * BLOCK_SIZE), next_logits(model, cold(model, 5), 5 * BLOCK_SIZE)
    assert not torch.equal(got, expected)
    # Measured: 0.02 to 0.2 of the logits' spread with these random weights.
    assert (got - expected).std() < 0.5 * expected.std()


def test_fp8_rounds_to_a_sixteenth_of_the_largest_of_a_group():
    from antefix_engines.transformers.kv_encoding import ENCODINGS

    rows = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 50)[:, None]
    rows[3] = 0
    fp8 = ENCODINGS["fp8"]
    back = fp8.decode(fp8.encode(rows), 100, torch.float32)
    assert fp8.encode(rows).shape[1] == fp8.record(100, torch.float32).nbytes == 102
    assert ((back - rows).abs() <= rows.abs() / 16 + rows.abs().amax(1, keepdim=True) * 2.0**-16).all()
    assert (back[3] == 0).all()


@pytest.mark.slow
def test_prompts_that_push_each_other_out_stay_right(v4, tmp_path):
    settings = StoreSettings(directory=str(tmp_path / "data"), budget_bytes="1M")
    with cache_of(v4, settings) as cache:
        prompts = [[(token + 11 * turn) % 300 for token in PROMPT] for turn in range(12)]
        for prompt in (*prompts, *prompts[::-3], prompts[3], prompts[3]):
            past = cache.prefill(v4, prompt)
            expected = next_logits(v4, cold(v4, 5, prompt), 5 * BLOCK_SIZE, prompt)
            assert torch.equal(next_logits(v4, past, 5 * BLOCK_SIZE, prompt), expected)
        assert cache.store._store.stats().evictions > 0


def test_a_store_that_dies_costs_nothing_but_time(llama, tmp_path):
    store = EngineStore.open(StoreSettings(directory=str(tmp_path / "data"), budget_bytes="1G"))
    cache = cache_of(llama, store)
    cache.prefill(llama, PROMPT)
    store.close()
    past = cache.prefill(llama, PROMPT)
    assert past.report.num_cached_tokens == 0 and store.counters.errors > 0
    assert torch.equal(next_logits(llama, past, 5 * BLOCK_SIZE), next_logits(llama, cold(llama, 5), 5 * BLOCK_SIZE))


CHILD = """
import sys, torch
from antefix_engines.transformers import AntefixCache
from antefix_engines.transformers.small_models import BLOCK_SIZE, small_model
torch.set_num_threads(1)
model = small_model("deepseek_v4")
prompt = [(7 * i * i + 3 * i) % 300 for i in range(5 * BLOCK_SIZE + 3)]
with AntefixCache(model, sys.argv[1], block_size=BLOCK_SIZE) as cache:
    past = cache.restore(prompt)
    cached = past.report.num_cached_tokens
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt[cached:cached + 5]]), past_key_values=past, use_cache=True).logits
import dataclasses
import hashlib
print(cached, hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.mark.services
def test_a_new_process_restores_the_same_bits(v4, tmp_path):
    with cache_of(v4, tmp_path / "data") as cache:
        cache.prefill(v4, PROMPT)
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "data")],
        env=child_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = next_logits(v4, cold(v4, 5), 5 * BLOCK_SIZE).numpy().tobytes()
    assert ran.stdout.split() == [str(5 * BLOCK_SIZE), hashlib.sha256(expected).hexdigest()]


@pytest.fixture
def service(tmp_path, request):
    """A kvstore service in a separate process, and the settings with which an engine reaches it."""
    data = tmp_path / "served"
    (data / "logs").mkdir(parents=True)
    secret = str(create_secret_file(data / "secret"))
    flags = ["--dir", str(data / "store"), "--budget-bytes", "1G"]
    reach = {"secret_file": secret}
    if request.param in ("secret", "files"):
        flags += ["--secret-file", secret]
    if request.param == "files":
        reach = {"directory": str(data)}
    if request.param == "tls":
        certificates.make_ca(tmp_path / "ca")
        for role in (Role.KVSTORE, Role.ENGINE):
            certificates.issue(tmp_path / "ca", tmp_path / role, role, "x", hosts=("127.0.0.1",))
        keyring = Keyring.from_file(secret)
        certificates.write_lasting_grant(tmp_path / "ca", tmp_path / Role.ENGINE, keyring, "default")
        flags += ["--credentials", str(tmp_path / Role.KVSTORE)]
        reach["credentials"] = str(tmp_path / Role.ENGINE)
    deployment = Deployment(DeploymentConfig(model=tmp_path, data_dir=data))
    loop = LoopThread()
    try:
        process = loop.run(deployment.start_role("kvstore", flags))
        yield StoreSettings(address=process.address, **reach)
    finally:
        loop.run(deployment.stop())
        loop.close()


@pytest.mark.services
@pytest.mark.parametrize("service", ["open", "secret", "files", "tls"], indirect=True)
def test_a_kvstore_service_serves_many_threads(llama, service):
    """The service is open, has a secret, is read through its files on the same host, or uses certificates."""
    prompts = [[(token + 11 * turn) % 300 for token in PROMPT] for turn in range(4)]
    expected = [next_logits(llama, cold(llama, 5, prompt), 5 * BLOCK_SIZE, prompt) for prompt in prompts]
    barrier = threading.Barrier(4)

    def work(turn):
        barrier.wait(60)
        prompt = prompts[turn]
        pasts = [cache.prefill(llama, prompt) for _ in range(2)]
        return [past.report.num_cached_tokens for past in pasts], [
            torch.equal(next_logits(llama, past, 5 * BLOCK_SIZE, prompt), expected[turn]) for past in pasts
        ]

    with cache_of(llama, service) as cache, ThreadPoolExecutor(4) as threads:
        for cached, equal in threads.map(work, range(4)):
            assert equal == [True, True] and cached == [0, 5 * BLOCK_SIZE], cache.store.counters
        assert cache.store.counters.errors == 0


@pytest.mark.services
@pytest.mark.parametrize("service", ["secret"], indirect=True)
def test_without_the_deployments_secret_nothing_is_restored(llama, service, tmp_path):
    with cache_of(llama, service) as cache:
        cache.prefill(llama, PROMPT)
    other = dataclasses.replace(service, secret_file=str(create_secret_file(tmp_path / "other")))
    with cache_of(llama, other) as cache:
        assert cache.prefill(llama, PROMPT).report.num_cached_tokens == 0
        assert "Unauthenticated" in cache.store.counters.by_kind or "PermissionDenied" in cache.store.counters.by_kind


def test_another_host_is_not_called_in_clear(tmp_path):
    with pytest.raises(ConfigError, match="TLS"):
        EngineStore.open(
            StoreSettings(address="192.0.2.1:7001", secret_file=str(create_secret_file(tmp_path / "secret")))
        )


@pytest.mark.services
def test_the_example_restores_at_its_second_run(llama, tmp_path):
    vocabulary = {"?": 0} | {chr(ord("a") + i): i + 1 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    llama.save_pretrained(tmp_path / "model")
    example = Path(__file__).parents[2] / "examples" / "transformers_cache.py"
    command = [sys.executable, str(example), str(tmp_path / "model"), str(tmp_path / "data"), "abcdefghij" * 30]
    first, second = (
        subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.splitlines()[-1] == "[0 of 300 prompt tokens restored]"
    assert second.splitlines()[-1] == "[256 of 300 prompt tokens restored]"
    assert first.splitlines()[:-1] == second.splitlines()[:-1]
