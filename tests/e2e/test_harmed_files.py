"""A running store's files are cut, overwritten or deleted. No other process dies, and every answer is right."""

import os
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.services


def cut_index(store):
    os.truncate(store / "index" / "data.mdb", 0)


def zero_index(store):
    path = store / "index" / "data.mdb"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def cut_segments(store):
    for path in (store / "segments").iterdir():
        os.truncate(path, 5000)


def delete_all(store):
    shutil.rmtree(store)


@pytest.mark.parametrize(
    "harm",
    [cut_index, *(pytest.param(harm, marks=pytest.mark.long) for harm in (zero_index, cut_segments, delete_all))],
)
async def test_routers_and_workers_outlive_their_stores_files(
    deploy, ask, document, small_model, small_reference, harm
):
    prompts = [np.concatenate((document[:900], document[start : start + 40])) for start in (0, 100, 200)]
    async with deploy(model=small_model) as deployment:
        assert (await ask(deployment, prompts[0]))[0] == small_reference.generate(prompts[0], 24)
        harm(deployment.config.store_dir)
        for prompt in prompts:
            assert (await ask(deployment, prompt))[0] == small_reference.generate(prompt, 24)
        dead = [process.role for process in deployment.processes if process.process.returncode is not None]
        # The store may die when its mapped index is cut. Its supervisor would then restart it.
        assert set(dead) <= ({"kvstore"} if harm is cut_index else set())
