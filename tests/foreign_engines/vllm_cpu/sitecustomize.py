"""A shim for tests only: lets vLLM 0.32 run DeepSeek-V4 with the offloading connector on a CPU without AMX.

Python runs this file when its folder is on PYTHONPATH. It changes vLLM's modules as they are imported:

    triton.backends       a dummy backend "cpu": Triton's interpreter runs the kernels that prepare metadata
    platforms.cpu         AMX is claimed while the configuration is checked: without it V4 has no prefix cache
                          (the kernels themselves run on AVX-512)
    cpu_mla               its table of tile schedulers lacks two keys (also in 0.33)
    _custom_ops           V4's kernels are there for AVX512-BF16 alone: elsewhere those of `plain_kernels.py` run
    kv_offload.cpu.spec   refuses platforms other than GPUs; here blocks are copied by `Tensor.copy_`
    dummy_loader          random weights of which no two rows are alike, so that log probabilities tell prompts apart
"""

import collections
import importlib.abc
import importlib.machinery
import os
import sys
import time
import types

os.environ.update(
    TORCHDYNAMO_DISABLE="1",
    TRITON_INTERPRET="1",
    CUDA_VISIBLE_DEVICES="",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def _triton_backends(module):
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    module.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)


def _platform(module):
    import torch

    check = module.CpuPlatform.check_and_update_config.__func__

    def with_amx(cls, vllm_config):
        real = torch.cpu._is_amx_tile_supported
        torch.cpu._is_amx_tile_supported = lambda: True
        try:
            return check(cls, vllm_config)
        finally:
            torch.cpu._is_amx_tile_supported = real

    module.CpuPlatform.check_and_update_config = classmethod(with_amx)


def _tile_schedulers(module):
    builder = module.DeepseekV4CPUSparseSWAMetadataBuilder
    builder.build_tile_scheduler = lambda self, number: collections.defaultdict(lambda: None)


def _offloading(module):
    import torch
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    class CopyWorker(OffloadingWorker):
        """Copies immediately, in the thread that submits the job."""

        def __init__(self, spec, caches):
            region = SharedOffloadRegion(
                engine_id=spec.config.engine_id,
                num_chunks=spec.num_chunks,
                rank=spec.config.parallel.rank,
                kv_bytes_per_chunk=spec.kv_bytes_per_chunk,
                cpu_page_size=spec.cpu_page_size_per_worker,
            )
            self.engine = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in caches.tensors]
            self.host = [region.create_next_worker_view(each.page_size_bytes) for each in caches.tensors]
            self.refs, self.region, self.done = caches.group_data_refs, region, []

        def copy(self, job_id, engine_spec, host_spec, to_host):
            start, at, nbytes = time.monotonic(), 0, 0
            for group, size in enumerate(engine_spec.group_sizes):
                for place in range(at, at + size):
                    block, chunk = int(engine_spec.block_ids[place]), int(host_spec.block_ids[place])
                    for ref in self.refs[group]:
                        mine = self.engine[ref.tensor_idx][block, : ref.page_size_bytes]
                        theirs = self.host[ref.tensor_idx][chunk, : ref.page_size_bytes]
                        theirs.copy_(mine) if to_host else mine.copy_(theirs)
                        nbytes += ref.page_size_bytes
                at += size
            seconds = time.monotonic() - start
            self.done.append(TransferResult(job_id=job_id, success=True, transfer_size=nbytes, transfer_time=seconds))
            return True

        def submit_store(self, job_id, src_spec, dst_spec):
            return self.copy(job_id, src_spec, dst_spec, True)

        def submit_load(self, job_id, src_spec, dst_spec, expedited=False):
            return self.copy(job_id, dst_spec, src_spec, False)

        def get_finished(self):
            done, self.done = self.done, []
            return done

        def wait(self, job_ids):
            pass

    def get_worker(self, kv_caches):
        assert self.blocks_per_chunk == 1
        if not self._worker:
            self._worker = CopyWorker(self, kv_caches)
        return self._worker

    module.CPUOffloadingSpec.get_worker = get_worker


def _random_weights(module):
    import torch

    generator = torch.Generator().manual_seed(1)

    def fill(param, *args, **kwargs):
        data = param.data
        if not data.is_floating_point():
            data.copy_(torch.randint(0, 256, data.shape, generator=generator).to(data.dtype))
        elif data.dim() >= 2:
            data.copy_((torch.randn(data.shape, generator=generator) * data.shape[-1] ** -0.5).to(data.dtype))
        else:
            data.copy_(torch.ones(data.shape).to(data.dtype))

    module.initialize_single_dummy_weight = fill


def _kernels(module):
    import plain_kernels

    plain_kernels.register()


CHANGES = {
    "vllm._custom_ops": _kernels,
    "triton.backends": _triton_backends,
    "vllm.platforms.cpu": _platform,
    "vllm.models.deepseek_v4.cpu.cpu_mla": _tile_schedulers,
    "vllm.v1.kv_offload.cpu.spec": _offloading,
    "vllm.model_executor.model_loader.dummy_loader": _random_weights,
}


class Changer(importlib.abc.MetaPathFinder):
    """An import finder that runs a change after a module is loaded. Another finder finds the module."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module):
            run(module)
            CHANGES[name](module)

        spec.loader.exec_module = run_and_change
        return spec


sys.meta_path.insert(0, Changer())
